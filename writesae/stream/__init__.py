"""From text to passages to shuffled samples of any hook, live from the model or from a store on disk."""

from writesae.stream.activations import ActivationStream, split_passages
from writesae.stream.corpus import Passages, passages
from writesae.stream.sources import Source, collect, describe, expand
from writesae.stream.store import ActivationStore

__all__ = [
    "ActivationStore",
    "ActivationStream",
    "Passages",
    "Source",
    "collect",
    "describe",
    "expand",
    "passages",
    "split_passages",
]
