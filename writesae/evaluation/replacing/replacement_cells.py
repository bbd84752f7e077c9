"""The replacement test of many cells (protocol section 5): every head of a layer, every layer, a dictionary each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.files import plain
from writesae.evaluation.firings import check_cell, check_passages
from writesae.evaluation.replacing.replacement import NoFirings, ReplacementConfig, replacement
from writesae.evaluation.replacing.replacement_figures import cells_figure
from writesae.evaluation.replacing.replacement_result import ReplacementResult
from writesae.evaluation.result import Result
from writesae.sae.storage import HEADER, TENSORS
from writesae.sae.write_sae import WriteSAE

MANY = -1
"""What a result of many cells has in the place of a layer or head that they do not share."""
Cell = tuple[int, int]
_NUMBERS = ("win_rate", "low", "high", "win_rate_vs_random", "strict_chain")
_KLS = ("median_kl_atom", "median_kl_delete", "median_kl_random", "median_ratio_delete_to_atom", "floor_max")


@dataclass(frozen=True, repr=False)
class CellsResult(Result):
    """A row per cell, reading, pool and scale: n, n_atoms, n_passages, then what was measured.

    `win_rate` is the share of firings whose atom is closer than deletion, `low` and `high` its interval over passages; KLs are
    in nats. A cell where no listed atom fired has n = 0 and no numbers. `layer` and `head` are -1 where the cells differ.
    """

    kind = "replacement_cells"

    def of(self, reading: str = "in_recurrence", pool: str = "dominant", scale: str = "coef") -> pd.DataFrame:
        """One row per cell; `KeyError` where nothing of that name was measured."""
        table = self.table
        rows = table[(table["reading"] == reading) & (table["pool"] == pool) & (table["scale"] == scale)]
        if rows.empty:
            known = sorted(set(zip(table["reading"], table["pool"], table["scale"], strict=True)))
            raise KeyError(f"nothing is called {(reading, pool, scale)}; this result has {known}")
        return rows

    def summary(self) -> list[dict[str, Any]]:
        """A row per reading, pool and scale: mean and standard deviation of the win rate over the cells where atoms fired.

        `pooled` counts every firing once, `worst` names the cell with the lowest rate, and `above_half` is the share of cells
        whose interval lies above one half.
        """
        found = []
        for (reading, pool, scale), rows in self.table.groupby(["reading", "pool", "scale"], sort=False):
            here = rows[rows["n"] > 0]
            rates = here["win_rate"]
            worst = here.loc[rates.idxmin()] if len(here) else None
            found.append(
                {
                    "reading": str(reading),
                    "pool": str(pool),
                    "scale": str(scale),
                    "cells": len(here),
                    "silent_cells": int((rows["n"] == 0).sum()),
                    "n": int(here["n"].sum()),
                    "mean_win_rate": float(rates.mean()),
                    "sd_win_rate": float(rates.std(ddof=1)),
                    "pooled": float(np.average(rates, weights=here["n"])) if len(here) else float("nan"),
                    "range": [float(rates.min()), float(rates.max())],
                    "worst": "" if worst is None else f"{worst['layer']}.{worst['head']}",
                    "above_half": float((here["low"] > 0.5).mean()),
                    **{f"mean_{name}": float(here[name].mean()) for name in _KLS[:3]},
                    "floor_max": float(here["floor_max"].max()),
                }
            )
        return found

    def figure(self) -> Figure:
        """Win rate of every cell, strongest atom at its coefficient, in the first reading that was measured."""
        reading = str(self.table["reading"].iloc[0])
        rows = self.of(reading).sort_values(["layer", "head"]).to_dict("records")
        return cells_figure(rows, f"{reading.replace('_', ' ')}: strongest atom at its coefficient")


def sweep_cells(
    model: HookedRecurrentModel,
    saes: Mapping[Cell, WriteSAE],
    tokens: Int[Tensor, "passage pos"],
    config: ReplacementConfig | None = None,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    on_cell: Callable[[ReplacementResult], None] | None = None,
    n_resamples: int = 2000,
) -> CellsResult:
    """A replacement test of every cell that has a dictionary, all with the same config and passages.

    Args:
        model: any HookedRecurrentModel.
        saes: a dictionary per (layer, head).
        tokens: held-out passages.
        config: as of one cell; the listed atoms, if any, are numbers in every dictionary, where they mean different things.
        on_progress: called with (cells done, cells in all).
        on_cell: given the whole result of every cell where atoms fired, for instance to keep it.
        n_resamples: of the intervals over passages.

    Raises:
        ValueError, IndexError: no cells, or one whose dictionary does not fit it; before anything runs.
    """
    config = ReplacementConfig.given(config)
    check_passages(tokens)
    if not saes:
        raise ValueError("a sweep over cells needs a dictionary at least, got none")
    for (layer, head), sae in saes.items():
        check_cell(model, sae, layer, head)
    rows: list[dict[str, Any]] = []
    silent: list[Cell] = []
    for done, (layer, head) in enumerate(sorted(saes), start=1):
        try:
            result = replacement(model, saes[layer, head], tokens, layer=layer, head=head, config=config)
        except NoFirings:
            silent.append((layer, head))
        else:
            rows += [_row(layer, head, line) for line in result.summary(n_resamples)]
            if on_cell is not None:
                on_cell(result)
        if on_progress is not None:
            on_progress(done, len(saes))
    if not rows:
        raise NoFirings("no listed atom fires in any of the cells on these passages")
    names = list(dict.fromkeys((row["reading"], row["pool"], row["scale"]) for row in rows))
    rows += [_silent_row(cell, name) for cell in silent for name in names]
    table = pd.DataFrame(rows).sort_values(["layer", "head"], kind="stable", ignore_index=True)
    layers, heads = ({cell[side] for cell in saes} for side in (0, 1))
    return CellsResult(table, _shared(layers), _shared(heads), plain(config.to_dict()))


def find_cells(folder: str | Path) -> dict[Cell, tuple[Path, WriteSAE]]:
    """Every dictionary saved in or below a folder, with its place, by the cell (layer, head) that it was trained on.

    Raises:
        ValueError: none is there, one does not say its cell, or two are of the same cell.
    """
    places = sorted(path.parent for path in Path(folder).rglob(TENSORS) if (path.parent / HEADER).exists())
    if not places:
        raise ValueError(f"no dictionary lies in or below {str(folder)!r}: train some with writesae train")
    found: dict[Cell, tuple[Path, WriteSAE]] = {}
    for place in places:
        sae = WriteSAE.load(place)
        layer, head = (sae.provenance.get(name) for name in ("layer", "head"))
        if not isinstance(layer, int) or not isinstance(head, int):
            raise ValueError(f"the dictionary in {str(place)!r} does not say which layer and head it was trained on")
        if (layer, head) in found:
            both = f"{str(found[layer, head][0])!r} and {str(place)!r}"
            raise ValueError(f"two dictionaries are of layer {layer}, head {head}: {both}")
        found[layer, head] = (place, sae)
    return dict(sorted(found.items()))


def _shared(numbers: set[int]) -> int:
    """The one number, or what stands for many."""
    return min(numbers) if len(numbers) == 1 else MANY


def _row(layer: int, head: int, line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of one cell's summary as a row of the table."""
    low, high = line["by_passage"]
    kept = {name: line[name] for name in ("reading", "pool", "scale", "n", "n_atoms", "n_passages")}
    numbers = {**line, "low": low, "high": high}
    return {"layer": layer, "head": head, **kept, **{name: numbers[name] for name in (*_NUMBERS, *_KLS)}}


def _silent_row(cell: Cell, name: tuple[str, str, str]) -> dict[str, Any]:
    counts = dict.fromkeys(("n", "n_atoms", "n_passages"), 0)
    named = dict(zip(("reading", "pool", "scale"), name, strict=True))
    return {"layer": cell[0], "head": cell[1], **named, **counts, **dict.fromkeys((*_NUMBERS, *_KLS), float("nan"))}
