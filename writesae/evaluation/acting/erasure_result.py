"""The outcome of an erasure study: a row per intervention, reading and token, and what they amount to per atom."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from writesae.evaluation.acting.paired import change, with_holm
from writesae.evaluation.result import Result
from writesae.evaluation.statistics import interval

ALL = "all"
"""The atom column of a row that pools all atoms."""
NULLS = {
    ("erase", "delete"): ("delete", "random"),
    ("erase", "atom"): ("random_atom", "own"),
    ("write", "atom"): ("random_atom", "preferred"),
}
"""For each condition at the preferred token, the condition and the kind of token that are its null."""
N_RESAMPLES = 2000


@dataclass(frozen=True, repr=False)
class ErasureResult(Result):
    """Every measurement of one cell; the columns are told in `erasure.py`."""

    kind = "erase"

    def rows(self, test: str, reading: str, half: str = "test") -> pd.DataFrame:
        """The measurements of one test and reading, in one half of the firings."""
        table = self.table
        found = table[(table["test"] == test) & (table["reading"] == reading) & (table["half"] == half)]
        if found.empty:
            raise KeyError(f"no rows of test {test!r}, reading {reading!r} and half {half!r} in this result")
        return found

    def summary(self, n_resamples: int = N_RESAMPLES) -> list[dict[str, Any]]:
        """Rows per test, reading, condition and token: one that pools all atoms, then one per atom.

        `median`, `mean` and their intervals (clustered by passage) are of delta, in nats. `half` "test" holds what was chosen
        on other passages, "same_half" the circular number. `p_holm` adjusts p_passages over the atoms of a family.
        `minus_null` is the mean difference to the null at the same positions: for deletion a random token, for the atom taken
        away a random atom with its own preferred token, for the atom written a random atom with the same token. `test`
        "slope" is the change of delta per median coefficient that is written.
        """
        rows: list[dict[str, Any]] = []
        for reading in self.table["reading"].unique():
            for half, label in (("test", "test"), ("select", "same_half")):
                rows += self._erased(reading, half, label, n_resamples)
            rows += self._written(reading, n_resamples)
        return rows

    def floor(self, reading: str) -> float:
        """Largest change that putting the native write back in its place makes to a log-probability, in nats."""
        table = self.table[(self.table["test"] == "floor") & (self.table["reading"] == reading)]
        return float(table["delta"].abs().max())

    def _erased(self, reading: str, half: str, label: str, n_resamples: int) -> list[dict[str, Any]]:
        rows, told = self.rows("erase", reading, half), []
        for (condition, kind), group in rows.groupby(["condition", "token_kind"], sort=False):
            shared = {"test": "erase", "reading": reading, "half": label, "condition": condition, "token_kind": kind}
            null = _null("erase", condition, kind, rows)
            told += self._family(shared | {"dose": 1.0}, group, null, n_resamples, by_atom=kind != "random")
        return told

    def _written(self, reading: str, n_resamples: int) -> list[dict[str, Any]]:
        table, told = self.table, []
        rows = table[(table["test"] == "write") & (table["reading"] == reading)]
        for (condition, kind), group in rows.groupby(["condition", "token_kind"], sort=False):
            shared = {"reading": reading, "half": "test", "condition": condition, "token_kind": kind}
            for dose, at_dose in group.groupby("dose"):
                null = _null("write", condition, kind, rows[rows["dose"] == dose])
                at = {"test": "write", **shared, "dose": float(dose)}
                told += self._family(at, at_dose, null, n_resamples, by_atom=False)
            at, null = {"test": "slope", **shared, "dose": float("nan")}, _null("write", condition, kind, rows)
            steep = None if null is None else slopes(null)
            told += self._family(at, slopes(group), steep, n_resamples, by_atom=kind != "random")
        return told

    def _family(
        self, shared: dict[str, Any], rows: pd.DataFrame, null: pd.DataFrame | None, n_resamples: int, by_atom: bool
    ) -> list[dict[str, Any]]:
        """A row that pools all atoms, and with `by_atom` one per atom with Holm's adjustment over them."""
        pooled = self._row(shared | {"atom": ALL}, rows, null, n_resamples)
        per_atom = []
        for atom, mine in rows.groupby("atom") if by_atom else ():
            own = None if null is None else null[null["atom"] == atom]
            per_atom.append(self._row(shared | {"atom": int(atom)}, mine, own, n_resamples))
        return [pooled | {"p_holm": pooled["p_passages"]}, *with_holm(per_atom)]

    def _row(
        self, shared: dict[str, Any], rows: pd.DataFrame, null: pd.DataFrame | None, n_resamples: int
    ) -> dict[str, Any]:
        row = shared | change(rows["delta"], rows["passage"], n_resamples)
        row["token"] = int(rows["token"].iloc[0]) if rows["token"].nunique() == 1 else None
        for name in ("rank_native", "rank", "kl", "kl_reverse"):
            row[f"median_{name}"] = float(rows[name].median()) if name in rows else float("nan")
        row["minus_null"], row["minus_null_interval"] = float("nan"), [float("nan")] * 2
        if null is not None:
            place = ["atom", "passage", "position"]
            both = rows.merge(null[[*place, "delta"]], on=place, suffixes=("", "_null"), validate="one_to_one")
            difference = both["delta"] - both["delta_null"]
            row["minus_null"] = float(difference.mean())
            row["minus_null_interval"] = interval(difference, both["passage"], "mean", n_resamples)
        return row | {"floor": self.floor(shared["reading"])}

    def figure(self, reading: str = "in_recurrence") -> Figure:
        """Left: what erasing does to each atom's preferred token, beside the nulls. Right: what writing it does, by dose."""
        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        if reading not in set(self.table["reading"]):
            reading = str(self.table["reading"].iloc[0])
        _paint_erased(left, self.rows("erase", reading))
        table = self.table
        _paint_written(right, table[(table["test"] == "write") & (table["reading"] == reading)])
        figure.suptitle(f"erasure, layer {self.layer}, head {self.head}, {reading}")
        return figure


def _null(test: str, condition: str, kind: str, rows: pd.DataFrame) -> pd.DataFrame | None:
    """The rows that are the null of a condition at a kind of token; None where it has none."""
    null = NULLS.get((test, condition)) if kind == "preferred" else None
    return None if null is None else rows[(rows["condition"] == null[0]) & (rows["token_kind"] == null[1])]


def slopes(rows: pd.DataFrame) -> pd.DataFrame:
    """The least-squares slope of delta over dose at every position, through the origin, as no dose is no change."""
    place = ["atom", "passage", "position"]
    worked = rows.assign(product=rows["dose"] * rows["delta"], square=rows["dose"] ** 2)
    summed = worked.groupby([*place, "token"], as_index=False)[["product", "square"]].sum()
    return summed.assign(delta=summed["product"] / summed["square"])


def _paint_erased(axes: Axes, rows: pd.DataFrame) -> None:
    atoms = sorted(rows["atom"].unique())
    drawn = [("delete", "preferred"), ("atom", "preferred"), ("random_atom", "own"), ("delete", "random")]
    for offset, (condition, kind) in enumerate(drawn):
        mine = rows[(rows["condition"] == condition) & (rows["token_kind"] == kind)]
        medians = mine.groupby("atom")["delta"].median().reindex(atoms)
        places = np.arange(len(atoms)) + 0.2 * (offset - 1.5)
        axes.plot(places, medians, marker="o", linestyle="none", label=f"{condition}, {kind} token")
    axes.axhline(0, linewidth=0.8, color="0.6")
    axes.set_xticks(range(len(atoms)), [str(atom) for atom in atoms])
    axes.set(xlabel="atom", ylabel="median change of log p, nats", title="erased at its firings")
    axes.legend(fontsize=7)


def _paint_written(axes: Axes, rows: pd.DataFrame) -> None:
    for condition, kind in (("atom", "preferred"), ("random_atom", "preferred"), ("atom", "random")):
        mine = rows[(rows["condition"] == condition) & (rows["token_kind"] == kind)]
        means = mine.groupby("dose")["delta"].mean()
        axes.plot(means.index, means, marker="o", label=f"{condition}, {kind} token")
    axes.axhline(0, linewidth=0.8, color="0.6")
    axes.set(
        xlabel="dose, median coefficients", ylabel="mean change of log p, nats", title="written where it is silent"
    )
    axes.set_xscale("log")
    axes.legend(fontsize=7)
