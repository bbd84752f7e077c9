"""The firings of a replacement test, reduced to the rows that a page prints.

`firings` has one row per firing and reading: `atom`, `reading` (where the KL was read: "in_recurrence" at the firing
token, "cache" at the next one, "horizon" as a mean over the next few) and one column `kl_<condition>` per condition, in
nats; the other direction of the divergence, `kl_reverse_<condition>`, is not shown. A condition that was not run in
some reading is NaN there, and every number printed says how many firings it rests on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from difflib import get_close_matches
from typing import Any, SupportsFloat

import numpy as np
import pandas as pd

from writesae.evaluation.statistics import Interval, Spread, cluster_bootstrap, median_mad, win_rate

CONDITIONS = {
    "native": "the write itself, put back (the floor)",
    "atom_listed_coef": "the listed atom at its coefficient",
    "atom_listed_norm": "the listed atom at the write's norm",
    "atom_listed_best": "the listed atom at the size that fits the write best",
    "atom_dominant_coef": "the strongest active atom at its coefficient",
    "atom_dominant_norm": "the strongest active atom at the write's norm",
    "atom_dominant_best": "the strongest active atom at the size that fits the write best",
    "delete": "nothing: the write deleted",
    "random_listed_coef": "a random atom at the listed atom's coefficient",
    "random_dominant_coef": "a random atom at the strongest atom's coefficient",
    "random_silent_norm": "a random silent atom at the write's norm",
    "random_empirical_norm": "coordinates of real writes, mixed, at the write's norm",
    "random_gaussian_norm": "a Gaussian outer product at the write's norm",
}
"""What takes the place of the write, in words; a condition that is missing here is shown by its own name."""

SHORT_CONDITIONS = {
    "native": "write put back",
    "atom_listed_coef": "listed atom",
    "atom_listed_norm": "listed atom, write's norm",
    "atom_listed_best": "listed atom, best size",
    "atom_dominant_coef": "strongest atom",
    "atom_dominant_norm": "strongest atom, write's norm",
    "atom_dominant_best": "strongest atom, best size",
    "delete": "deletion",
    "random_listed_coef": "random atom",
    "random_dominant_coef": "random atom, strongest's size",
    "random_silent_norm": "silent atom, write's norm",
    "random_empirical_norm": "mixed writes, write's norm",
    "random_gaussian_norm": "Gaussian, write's norm",
}
"""The same, short enough for a figure."""

READINGS = {
    "in_recurrence": "at the firing token",
    "cache": "at the next token",
    "horizon": "mean over the next tokens",
}
"""Where a KL is read, in words."""

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Headline:
    """The one comparison that the page opens with."""

    reading: str
    """Where the KLs were read."""
    win: Interval
    """Share of firings in which the atom is closer than deletion, with Wilson's interval."""
    by_atom: Interval | None
    """The same share with the bootstrap over atoms; None for a single atom."""
    by_passage: Interval | None
    """The same share with the bootstrap over passages; None without passages."""
    n: int
    """Number of firings."""
    medians: dict[str, Spread]
    """Median KL by condition, in nats: the atom, deletion, and the control and the floor where they were run."""


def check_firings(firings: pd.DataFrame, atom: str) -> None:
    """Raise `ValueError` for an empty table, or one without the columns that a report rests on."""
    if firings.empty:
        raise ValueError("firings is empty; a report needs at least one firing")
    for column in ("atom", "reading", "kl_delete", f"kl_{atom}"):
        if column not in firings:
            near = get_close_matches(column, [str(name) for name in firings.columns], n=1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise ValueError(f"firings has no column {column!r}{hint}")


def conditions_of(firings: pd.DataFrame) -> list[str]:
    """The conditions of the table: known ones in the order of `CONDITIONS`, then the others as they stand."""
    columns = [str(column) for column in firings.columns]
    names = [column[3:] for column in columns if column.startswith("kl_") and not column.startswith("kl_reverse_")]
    known = list(CONDITIONS)
    return sorted(names, key=lambda name: known.index(name) if name in known else len(known))


def readings_of(firings: pd.DataFrame) -> list[str]:
    """The readings of the table, known ones first."""
    names, known = list(dict.fromkeys(firings["reading"])), list(READINGS)
    return sorted(names, key=lambda name: known.index(name) if name in known else len(known))


def words(name: str, known: Mapping[str, str]) -> str:
    """A name as a phrase."""
    return known.get(name, name.replace("_", " "))


def compared(firings: pd.DataFrame, reading: str, *conditions: str) -> pd.DataFrame:
    """The firings of one reading in which all of these conditions were run."""
    return firings[firings["reading"] == reading].dropna(subset=[f"kl_{name}" for name in conditions])


def headline(firings: pd.DataFrame, reading: str, atom: str, control: str | None) -> Headline:
    """Compare the atom with deletion in one reading; the two bootstraps redraw atoms and passages."""
    rows = compared(firings, reading, atom, "delete")
    if rows.empty:
        raise ValueError(f"no firing has both kl_{atom} and kl_delete in the reading {reading!r}")
    wins = (rows[f"kl_{atom}"] < rows["kl_delete"]).astype(float)
    bounds = {}
    for name in ("atom", "passage"):
        many = name in rows and rows[name].notna().all() and rows[name].nunique() > 1
        bounds[name] = cluster_bootstrap(wins, rows[name]) if many else None
    shown = [name for name in (atom, "delete", control, "native") if name and f"kl_{name}" in rows]
    medians = {name: median_mad(rows[f"kl_{name}"].dropna()) for name in shown if rows[f"kl_{name}"].notna().any()}
    win = win_rate(rows[f"kl_{atom}"], rows["kl_delete"])
    return Headline(reading, win, bounds["atom"], bounds["passage"], len(rows), medians)


def conditions_table(firings: pd.DataFrame) -> list[dict[str, Any]]:
    """One row per condition: in each reading its median KL, and the share of firings where it beats deletion."""
    table = []
    for name in conditions_of(firings):
        cells = []
        for reading in readings_of(firings):
            rows = compared(firings, reading, name, "delete")
            column = rows[f"kl_{name}"]
            cells.append(
                {
                    "n": len(rows),
                    "median": median_mad(column) if len(rows) else None,
                    "closer": win_rate(column, rows["kl_delete"]) if len(rows) and name != "delete" else None,
                }
            )
        table.append({"name": name, "words": words(name, CONDITIONS), "cells": cells})
    return table


def wins_by_atom(firings: pd.DataFrame, reading: str, atom: str) -> pd.DataFrame:
    """Columns `atom`, `wins`, `total`: how often each atom is closer than deletion."""
    rows = compared(firings, reading, atom, "delete")
    wins = (rows[f"kl_{atom}"] < rows["kl_delete"]).groupby(rows["atom"])
    return pd.DataFrame({"wins": wins.sum(), "total": wins.size()}).rename_axis("atom").reset_index()


def kl_ratios(firings: pd.DataFrame, reading: str, atom: str, others: list[str]) -> dict[str, np.ndarray]:
    """KL of each other condition over the atom's, firing by firing; firings with a KL of zero have no ratio."""
    ratios = {}
    for name in others:
        rows = compared(firings, reading, atom, name)
        rows = rows[(rows[f"kl_{atom}"] > 0) & (rows[f"kl_{name}"] > 0)]
        if len(rows):
            ratios[name] = (rows[f"kl_{name}"] / rows[f"kl_{atom}"]).to_numpy()
    return ratios


def replacement_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows of `ReplacementResult.summary()`, named by reading and substitute, shares with their intervals."""
    table = {}
    for row in rows:
        given = row["pool"] if row["scale"] == "given" else f"atom_{row['pool']}_{row['scale']}"
        substitute = words(given, SHORT_CONDITIONS)
        low, high = row["wilson"]
        table[f"{words(row['reading'], READINGS)}: {substitute}"] = {
            "firings": row["n"],
            "closer than deletion": Interval(row["win_rate"], low, high, "Wilson score"),
            "over atoms": bounds(row["by_atom"], is_share=True),
            "over passages": bounds(row["by_passage"], is_share=True),
            "closer than random": percent(row["win_rate_vs_random"]),
            "atom < deletion < random": percent(row["strict_chain"]),
            "median deletion ÷ atom": row["median_ratio_delete_to_atom"],
            "Wilcoxon p": row["wilcoxon_p"],
        }
    return table


def kls_by_condition(firings: pd.DataFrame, reading: str) -> dict[str, np.ndarray]:
    """All KLs of one reading, by condition; conditions that were not run in it are left out."""
    columns = {name: compared(firings, reading, name)[f"kl_{name}"].to_numpy() for name in conditions_of(firings)}
    return {name: column for name, column in columns.items() if len(column)}


def number(value: SupportsFloat, digits: int = 3) -> str:
    """A number for reading: 0.0312, 1,240, 3.1×10⁻⁵."""
    value = float(value)
    if not np.isfinite(value):
        return "∞" if value > 0 else "−∞" if value < 0 else "–"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        power = int(f"{value:.{digits - 1}e}".split("e")[1])  # of the rounded number: 9.996 is 10.0
        decimals = max(0, digits - 1 - power)
        return f"{value:,.{decimals}f}".replace("-", "−")
    mantissa, exponent = f"{value:.{max(0, digits - 2)}e}".split("e")
    return f"{mantissa.replace('-', '−')}×10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def percent(value: SupportsFloat) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * float(value):.1f}%"


def bounds(pair: Sequence[SupportsFloat], is_share: bool) -> str:
    """Two bounds in brackets; of a share in per cent, whose sign stands at the estimate."""
    return f"[{', '.join(percent(bound).removesuffix('%') if is_share else number(bound) for bound in pair)}]"


def cell_text(column: str, value: Any) -> str:
    """One cell of a summary: shares as percentages by their column's name, intervals with their bounds."""
    is_share = any(part in column.lower() for part in ("rate", "share", "win", "fraction", "chain", "closer"))
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping) and {"estimate", "low", "high"} <= set(value):
        show = percent if is_share else number
        return f"{show(value['estimate'])} {bounds((value['low'], value['high']), is_share)}"
    if isinstance(value, Mapping) and {"median", "mad", "error"} <= set(value):
        return f"{number(value['median'])} ± {number(value['error'], 2)}"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    if isinstance(value, float | np.floating):
        return percent(value) if is_share and np.isfinite(value) else number(float(value))
    if isinstance(value, list | tuple):
        return ", ".join(cell_text(column, part) for part in value)
    return "–" if value is None else str(value)
