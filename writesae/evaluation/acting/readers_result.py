"""The outcome of a search for readers: a row per deletion and later head, and the readers that stand out."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from writesae.evaluation.acting.paired import passage_p, with_holm
from writesae.evaluation.result import Result
from writesae.evaluation.statistics import interval

ALL = "all"
"""The atom column of a row that pools all atoms."""
N_RESAMPLES = 2000


@dataclass(frozen=True, repr=False)
class ReadersResult(Result):
    """Every measurement of one cell.

    Columns: pair, kind ("firing", "control", or "native", the write put back in its place), atom, passage, position,
    write_norm; the later head (layer, head) and the relative change of its output.
    """

    kind = "readers"

    def pairs(self) -> pd.DataFrame:
        """A row per pair and later head: change at the firing, at its control, log_ratio of the two, and `above`, how far that
        lies above the mean over the later heads of the same pair."""
        place = ["atom", "pair", "passage", "layer", "head"]
        wide = self.table.pivot_table(index=place, columns="kind", values="change").reset_index()
        smallest = np.finfo(float).tiny
        wide["log_ratio"] = np.log(wide["firing"].clip(lower=smallest)) - np.log(wide["control"].clip(lower=smallest))
        wide["above"] = wide["log_ratio"] - wide.groupby("pair")["log_ratio"].transform("mean")
        return wide.rename_axis(columns=None)

    def floor(self) -> float:
        """Largest relative change that putting the native write back in its place makes anywhere."""
        return float(self.table.loc[self.table["kind"] == "native", "change"].max())

    def summary(self, strongest: int | None = None, n_resamples: int = N_RESAMPLES) -> list[dict[str, Any]]:
        """A row per atom and later head (and per head over all atoms), the strongest reader first.

        `ratio` and `specificity` as in `readers.py`, with intervals clustered by passage; `p_ratio` and `p_specificity` are of
        Wilcoxon's test of the passages' mean logarithms against 0, and `holm_ratio` and `holm_specificity` adjust them over all
        atoms and heads (for the pooled rows over heads). `strongest` keeps that many readers of each atom.
        """
        pairs, rows = self.pairs(), []
        pooled = self._of(ALL, pairs, n_resamples)
        single = [row for atom, mine in pairs.groupby("atom") for row in self._of(int(atom), mine, n_resamples)]
        for name in ("ratio", "specificity"):
            pooled, single = (with_holm(family, f"p_{name}", f"holm_{name}") for family in (pooled, single))
        for atom in (ALL, *sorted({row["atom"] for row in single})):
            mine = [row for row in (pooled if atom == ALL else single) if row["atom"] == atom]
            rows += sorted(mine, key=lambda row: -row["ratio"])[:strongest]
        return rows

    def _of(self, atom: int | str, pairs: pd.DataFrame, n_resamples: int) -> list[dict[str, Any]]:
        norms = self.table.groupby(["pair", "kind"])["write_norm"].first().unstack()
        norms = norms.loc[pairs["pair"].unique()]
        matched, floor = float(np.median(norms["firing"] / norms["control"].clip(lower=1e-30))), self.floor()
        rows = []
        for (layer, head), mine in pairs.groupby(["layer", "head"]):
            estimates: dict[str, Any] = {}
            for name, column in (("ratio", mine["log_ratio"]), ("specificity", mine["above"])):
                bounds = interval(column, mine["passage"], "mean", n_resamples)
                estimates[name] = float(np.exp(column.mean()))
                estimates[f"{name}_interval"] = [float(np.exp(bound)) for bound in bounds]
                estimates[f"p_{name}"] = passage_p(column, mine["passage"])
            rows.append(
                {
                    "atom": atom,
                    "reader": f"L{layer}H{head}",
                    "layer": int(layer),
                    "head": int(head),
                    "n": len(mine),
                    "n_passages": int(mine["passage"].nunique()),
                    **estimates,
                    "median_change": float(mine["firing"].median()),
                    "median_change_control": float(mine["control"].median()),
                    "norm_ratio": matched,
                    "floor": floor,
                }
            )
        return rows

    def figure(self) -> Figure:
        """The ratio of every later head, a row per atom: log2, so that red reads the atom more than other writes."""
        pairs = self.pairs()
        grid = pairs.pivot_table(index="atom", columns=["layer", "head"], values="log_ratio") / np.log(2)
        figure = Figure(figsize=(2 + 0.35 * grid.shape[1], 1.5 + 0.3 * grid.shape[0]), layout="constrained")
        axes = figure.subplots()
        limit = max(float(np.abs(grid.to_numpy()).max()), 1e-9)
        image = axes.imshow(grid, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axes.set_xticks(range(grid.shape[1]), [f"L{layer}H{head}" for layer, head in grid.columns], rotation=90)
        axes.set_yticks(range(grid.shape[0]), [str(atom) for atom in grid.index])
        axes.set(ylabel="atom", title=f"readers of layer {self.layer}, head {self.head}")
        figure.colorbar(image, ax=axes, label="log2 of the change at firings over controls")
        return figure
