"""What a page that `writesae report` wrote shows, read back from it, so that a live page need not be measured again.

A page keeps its data as JSON in blocks that no browser runs; they are read as data here too, never as anything else. Factors
and activations come back as they were packed, in 16 bits of each row's largest (browser/packing.py).
"""

import base64
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from writesae.browser import AtomBrowserData
from writesae.browser.atoms import leading_factors
from writesae.browser.data import COLUMNS, KINDS, Contexts, Listed
from writesae.sae.write_sae import WriteSAE

BLOCK = re.compile(r'<script type="application/json" id="data-(\w+)">(.*?)</script>', re.DOTALL)
LISTS = ("fires_on", "promoted", "suppressed", "neighbours")
SAME = 1e-3
"""How far a page's factors may be from the dictionary's, as a share of the largest entry: their packing takes 2e-5."""


def read_page(path: str | os.PathLike) -> AtomBrowserData:
    """The data of a page that `writesae report` wrote. `ValueError` for a file that is no such page, `OSError` for none."""
    path = Path(path)
    try:
        blocks = {name: json.loads(text) for name, text in BLOCK.findall(path.read_text(encoding="utf-8"))}
        return _data(blocks)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no page that `writesae report` of this version wrote ({error!r}): write it anew, or leave --page out"
        ) from None


def check_page(data: AtomBrowserData, sae: WriteSAE, path: str | os.PathLike) -> None:
    """Raise `ValueError` unless a page's atoms are those of this dictionary."""
    sides = leading_factors(sae)[:2]
    for shown, own in zip((data.key, data.value), sides, strict=True):
        # by size: whole matrices have their leading pair only up to a common sign
        if shown.shape != own.shape or np.abs(np.abs(shown) - np.abs(own)).max() > SAME * np.abs(own).max():
            raise ValueError(f"{path} shows the atoms of another dictionary: write it anew, or leave --page out")


def _data(blocks: dict[str, Any]) -> AtomBrowserData:
    about, words, contexts, shapes = (blocks[name] for name in ("about", "words", "contexts", "shapes"))
    if about.pop("kinds") != list(KINDS):
        raise ValueError("its kinds of atoms are others")
    files = about.pop("files")
    atoms = pd.DataFrame({name: _unpacked(blocks["table"][name]) for name in COLUMNS})
    atoms["kind"] = [KINDS[number] for number in atoms["kind"]]
    pieces = {name: _unpacked(contexts[name]) for name in ("first", "passage", "position", "at", "word", "activation")}
    arrays: dict[str, Any] = {name: _unpacked(shapes[name]) for name in ("key", "value", "leading", "histogram")}
    for name in LISTS:
        arrays[name] = Listed(*(_unpacked(blocks["lists"][name][side]) for side in ("index", "number")))
    return AtomBrowserData(
        about=about,
        words=words["text"],
        word_ids=_unpacked(words["id"]),
        files=files,
        atoms=atoms,
        contexts=Contexts(random=_unpacked(contexts["random"]).astype(bool), **pieces),
        **arrays,
    )


def _unpacked(packed: dict[str, Any]) -> np.ndarray:
    """An array as `pack` or `pack_quantised` was given it; whole numbers as int64, all others as float64."""
    kind, shape = packed["type"], packed["shape"]
    if kind not in ("i1", "i2", "i4", "u1", "u2", "u4", "f4"):
        raise ValueError(f"it has numbers of type {kind!r}")
    values = np.frombuffer(base64.b64decode(packed["data"], validate=True), dtype=f"<{kind}")
    if len(values) != math.prod(shape):
        raise ValueError(f"it has {len(values)} numbers where {shape} were promised")
    values = values.reshape(shape)
    if "scale" in packed:
        return values * _unpacked(packed["scale"])[:, None]
    return values.astype(np.float64 if kind == "f4" else np.int64)
