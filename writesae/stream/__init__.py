"""From text to passages to shuffled writes."""

from writesae.stream.activations import WriteStream, collect_writes
from writesae.stream.corpus import Passages, passages

__all__ = ["Passages", "WriteStream", "collect_writes", "passages"]
