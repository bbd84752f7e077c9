"""The texts of experiments that train dictionaries of their own."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hooked_recurrent import HookedRecurrentModel
    from writesae.stream.corpus import Passages

PASSAGES = 600
"""How many there are where nothing says it."""


def training_text(
    model: "HookedRecurrentModel",
    provenance: Mapping[str, Any] | None = None,
    *,
    passages: int | None = None,
    length: int = 256,
    text: Path | None = None,
) -> "Passages":
    """Passages of training files: those that a dictionary was trained on, as far as its provenance tells, or `passages`."""
    from hooked_recurrent.zoo.corpus import standard_library
    from writesae.stream.corpus import passages as cut
    from writesae.stream.corpus import text_folder

    record = ((provenance or {}).get("split") or {}).get("train") or {}
    files = standard_library("train") if text is None else text_folder(text, "train")
    count = passages or record.get("n_passages", PASSAGES)
    return cut(
        files,
        model,
        record.get("length", length),
        split="train",
        max_passages=count,
        seed=record.get("seed", 0),
    )


def held_text(model: "HookedRecurrentModel", *, passages: int, length: int, text: Path | None = None) -> "Passages":
    """Passages of held-out files, as every experiment takes them."""
    from hooked_recurrent.zoo.corpus import standard_library
    from writesae.stream.corpus import passages as cut
    from writesae.stream.corpus import text_folder

    files = standard_library("heldout") if text is None else text_folder(text, "heldout")
    return cut(files, model, length, split="heldout", max_passages=passages, seed=0)
