"""The texts that commands read: files to train on, and held-out files."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hooked_recurrent import HookedRecurrentModel
    from writesae.stream.corpus import Passages

PASSAGES = 600
"""How many there are where nothing says it."""


def check_text(folder: Path | None, splits: tuple[str, ...] = ("train", "heldout"), pattern: str = "*.txt") -> None:
    """Raise `ValueError` for a folder without text on these sides of the split, before a model is loaded."""
    from writesae.stream.corpus import text_folder

    for split in splits:
        if folder is not None:
            text_folder(folder, split, pattern)


def training_text(
    model: "HookedRecurrentModel",
    provenance: Mapping[str, Any] | None = None,
    *,
    passages: int | None = None,
    length: int = 256,
    text: Path | None = None,
) -> "Passages":
    """Passages of training files: those that a dictionary was trained on, as far as its provenance tells, or `passages`."""
    record = ((provenance or {}).get("split") or {}).get("train") or {}
    count = record.get("n_passages", PASSAGES) if passages is None else passages
    length, seed = record.get("length", length), record.get("seed", 0)
    return cut_text(model, "train", passages=count, length=length, text=text, seed=seed)


def held_text(
    model: "HookedRecurrentModel", *, passages: int, length: int, text: Path | None = None, seed: int = 0
) -> "Passages":
    """Passages of held-out files, as every experiment takes them."""
    return cut_text(model, "heldout", passages=passages, length=length, text=text, seed=seed)


def cut_text(
    model: "HookedRecurrentModel", split: str, *, passages: int, length: int, text: Path | None = None, seed: int = 0
) -> "Passages":
    """Passages of one side of a folder of text, or of the standard library."""
    from hooked_recurrent.zoo.corpus import standard_library
    from writesae.stream.corpus import passages as cut
    from writesae.stream.corpus import text_folder

    files = standard_library(split) if text is None else text_folder(text, split)
    return cut(files, model, length, split=split, max_passages=passages, seed=seed)
