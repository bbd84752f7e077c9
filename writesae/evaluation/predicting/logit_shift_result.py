"""The outcome of the logit experiment: a row per edit and target, and how well each predictor did."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from writesae.evaluation.predicting.logit_shift_context import TAIL, TOP
from writesae.evaluation.predicting.logit_shift_statistics import estimates
from writesae.evaluation.result import Result

NATURAL = "natural"
NULL = "shuffled"


@dataclass(frozen=True, repr=False)
class LogitShiftResult(Result):
    """Predicted and measured shifts of logits.

    The table has a row per context, cell, matrix, size, horizon and token: `measured` and a column per predictor, in logits.
    `size` is the edit's share of the native write's norm, or "natural"; `fraction` is that share as it came out; `source`
    says whether the matrix is an atom that fires there, a silent one, or gaussian; `tokens` whether the token is one of the
    baseline's top or its tail. `read_change` and `stream_change` say how far the edit carries what the read-out's norm and
    the norms above look at, as a share of what they saw without it. "shuffled" is first_order with Lambda of another
    passage's context, NaN for the first passage.
    """

    kind = "logits"

    @property
    def predictors(self) -> list[str]:
        """The predictors that were asked, and the null."""
        return [*self.config["predictors"], NULL]

    def summary(self, n_resamples: int = 5000) -> list[dict[str, Any]]:
        """A row per token class, size, predictor and source, pooled over atoms, contexts, cells and horizons.

        `source` is "all", or what the matrices are: only an atom that fires has an amplitude natural to it; a silent one
        is tried at the size of the one that fires.
        """
        pooled = self.by("tokens", "size", n_resamples=n_resamples).assign(source="all")
        apart = self.by("tokens", "size", "source", n_resamples=n_resamples)
        return pd.concat([pooled, apart]).to_dict("records")

    def by(self, *columns: str, n_resamples: int = 5000) -> pd.DataFrame:
        """The same figures for every combination of some columns of the table, such as "size", "horizon", "layer".

        Rows of tail tokens are left out unless "tokens" is among the columns. Raises `KeyError` for an unknown column.
        """
        for column in columns:
            if column not in self.table:
                raise KeyError(f"no column {column!r}; the table has {', '.join(self.table)}")
        table = self.table if "tokens" in columns else self.table[self.table["tokens"] == TOP]
        rows = []
        for values, group in table.groupby(list(columns), sort=False):
            for predictor in self.predictors:
                found = estimates(group, predictor, n_resamples)
                rows.append({**dict(zip(columns, values, strict=True)), "predictor": predictor, **found})
        return pd.DataFrame(rows)

    def by_reach(
        self, column: str = "read_change", edges: Sequence[float] = (0.03, 0.1, 0.3, 1.0, 3.0)
    ) -> pd.DataFrame:
        """Where linearity ends: per range of `read_change` or `stream_change`, each predictor's error over top tokens.

        The error is sqrt(sum (measured - predicted)^2 / sum measured^2): 0 where all is right, 1 as good as predicting nothing.
        """
        table = self.table[self.table["tokens"] == TOP]
        bins = pd.cut(table[column], [-np.inf, *edges, np.inf])
        rows = []
        for span, group in table.groupby(bins, observed=True):
            squares = (group["measured"] ** 2).sum()
            errors = {
                name: float(np.sqrt(((group["measured"] - group[name]) ** 2).sum() / squares))
                for name in self.config["predictors"]
            }
            low, high = max(span.left, 0.0), span.right
            rows.append({f"{column}_above": low, f"{column}_to": high, "n": len(group), **errors})
        return pd.DataFrame(rows)

    def r2(self, predictor: str, size: float | str, tokens: str = TOP) -> float:
        """R^2 with nothing fitted, pooled over everything else."""
        rows = self.table[(self.table["size"] == str(size)) & (self.table["tokens"] == tokens)]
        if predictor not in self.predictors or rows.empty:
            known = f"predictors {', '.join(self.predictors)}; sizes {', '.join(self.table['size'].unique())}"
            raise KeyError(
                f"no {predictor!r} at size {size!r} on {tokens!r} tokens; there are {known}; {TOP} and {TAIL}"
            )
        return float(estimates(rows, predictor, n_resamples=1)["r2"])

    def figure(self) -> Figure:
        """R^2 with nothing fitted against the size of the edit, a line per predictor; the natural amplitude as crosses."""
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        found = self.by("size", n_resamples=200)
        for index, predictor in enumerate(self.predictors):
            mine = found[found["predictor"] == predictor]
            grid, natural = mine[mine["size"] != NATURAL].sort_values("fraction"), mine[mine["size"] == NATURAL]
            low, high = zip(*grid["r2_by_passage"], strict=True) if len(grid) else ((), ())
            axes.plot(grid["fraction"], grid["r2"], marker="o", color=f"C{index}", label=predictor.replace("_", " "))
            axes.fill_between(grid["fraction"], low, high, color=f"C{index}", alpha=0.15, linewidth=0)
            axes.plot(natural["fraction"], natural["r2"], marker="x", linestyle="none", color=f"C{index}")
        axes.set(xscale="log", ylim=(-0.55, 1.05), xlabel="size of the edit / norm of the native write")
        axes.set_ylabel("R² of the logit shift, nothing fitted")
        axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        axes.set_title("crosses: natural firing amplitude; bands: 95% over passages", fontsize=9)
        axes.legend(fontsize=8, frameon=False, loc="lower left")
        return figure
