"""WriteSAE: sparse autoencoders over the rank-1 writes of recurrent language models.

A name is imported from its room when it is first asked for, so that `writesae --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hooked_recurrent import __version__ as __version__
    from writesae.config import TrainConfig, WriteSAEConfig
    from writesae.sae import Codes, Factored, LossOutput, Matrices, Samples, Vectors, WriteSAE, atoms_html
    from writesae.stream import ActivationStore, ActivationStream, Passages, Source, passages
    from writesae.training import Job, TrainResult, fit, train, train_many

__all__ = [
    "ActivationStore",
    "ActivationStream",
    "Codes",
    "Factored",
    "Job",
    "LossOutput",
    "Matrices",
    "Passages",
    "Samples",
    "Source",
    "TrainConfig",
    "TrainResult",
    "Vectors",
    "WriteSAE",
    "WriteSAEConfig",
    "atoms_html",
    "fit",
    "passages",
    "train",
    "train_many",
]
# Where each public name lives, as type checkers read it above.
_HOMES = {
    "__version__": "hooked_recurrent",
    **dict.fromkeys(["TrainConfig", "WriteSAEConfig"], "writesae.config"),
    **dict.fromkeys(
        ["Codes", "Factored", "LossOutput", "Matrices", "Samples", "Vectors", "WriteSAE", "atoms_html"], "writesae.sae"
    ),
    **dict.fromkeys(["ActivationStore", "ActivationStream", "Passages", "Source", "passages"], "writesae.stream"),
    **dict.fromkeys(["Job", "TrainResult", "fit", "train", "train_many"], "writesae.training"),
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
