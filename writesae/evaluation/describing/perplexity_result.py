"""The outcome of a splice: a row per passage and condition, and what the conditions cost."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from writesae.evaluation.result import Result
from writesae.evaluation.statistics import cluster_bootstrap

SELF, ZERO, MEAN, SVD, THROUGHOUT = "self", "zero", "mean", "svd", "throughout"


@dataclass(frozen=True, repr=False)
class PerplexityResult(Result):
    """A row per passage and condition.

    Columns: passage, variant, rank (of svd), k heads, which heads; ce and ce_native over all tokens behind the splice, ce_near
    and ce_native_near over the first of them, nats per token; tokens; and error, |put - native|^2 / |native|^2 of the exchanged
    memories.
    """

    kind = "perplexity"

    heads: list[int] = field(default_factory=list)
    """Heads with a dictionary; `head` is the lowest."""
    dictionary: str = ""
    """Variant that is the dictionary's: "state", "writes" or "net_writes"."""

    def summary(self, n_resamples: int = 2000) -> list[dict[str, Any]]:
        """A row per variant, rank and number of heads; perplexities are exp of the mean over all tokens.

        percent is the rise of the perplexity over the untouched run, its interval redraws passages; rise_near is that of the
        first tokens, in nats; of_zero is the rise in nats as a share of emptying the memory's, NaN where that is not above
        zero. A dictionary's rows name the lowest rank that is at least as good.
        """
        return self._rows(self.table, ["variant", "rank", "k"], n_resamples)

    def by_heads(self, n_resamples: int = 2000) -> list[dict[str, Any]]:
        """The same for every subset of heads by itself."""
        return self._rows(self.table, ["variant", "rank", "k", "heads"], n_resamples)

    def floor(self) -> float:
        """Largest change, in nats per token, from putting a memory in the place of itself."""
        own = self.table[self.table["variant"] == SELF]
        return float((own["ce"] - own["ce_native"]).abs().max())

    def _rows(self, table: pd.DataFrame, by: list[str], n_resamples: int) -> list[dict[str, Any]]:
        floor, native = self.floor(), table.drop_duplicates("passage")["ce_native"].mean()
        rows = []
        for names, group in table.groupby(by, sort=False):
            rise = (group["ce"] - group["ce_native"]).to_numpy()
            found = cluster_bootstrap(rise, group["passage"].to_numpy(), n_resamples=n_resamples)
            close = (group["ce_near"] - group["ce_native_near"]).to_numpy()
            near = cluster_bootstrap(close, group["passage"].to_numpy(), n_resamples=n_resamples)
            rows.append(
                {
                    **dict(zip(by, names, strict=True)),
                    "n_passages": int(group["passage"].nunique()),
                    "n_subsets": int(group["heads"].nunique()),
                    "ce": float(group["ce"].mean()),
                    "perplexity": float(np.exp(group["ce"].mean())),
                    "native_perplexity": float(np.exp(native)),
                    "rise": found.estimate,
                    "rise_interval": [found.low, found.high],
                    "percent": float(100 * np.expm1(found.estimate)),
                    "percent_interval": [float(100 * np.expm1(bound)) for bound in (found.low, found.high)],
                    "rise_near": near.estimate,
                    "rise_near_interval": [near.low, near.high],
                    "median_error": float(group["error"].median()),
                    "floor": floor,
                }
            )
        for row in rows:
            same = [other for other in rows if all(other.get(name) == row.get(name) for name in ("k", "heads"))]
            empty = next(other for other in same if other["variant"] == ZERO)
            # where emptying the memory costs nothing for sure, there is nothing to be a share of
            row["of_zero"] = row["rise"] / empty["rise"] if empty["rise_interval"][0] > floor else float("nan")
            if row["variant"] in (self.dictionary, THROUGHOUT):
                good = [o["rank"] for o in same if o["variant"] == SVD and o["rise"] <= row["rise"]]
                row["svd_rank_as_good"] = int(min(good)) if good else None
        return [
            {name: value.item() if isinstance(value, np.generic) else value for name, value in row.items()}
            for row in rows
        ]

    def figure(self) -> Figure:
        """Rise of the perplexity against the number of heads, and against the rank of the best approximation."""
        figure = Figure(figsize=(8.4, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        rows = [row for row in self.summary(n_resamples=500) if row["variant"] != SELF]
        most = max(row["k"] for row in rows)
        for variant in dict.fromkeys(row["variant"] for row in rows if row["variant"] != SVD):
            mine = [row for row in rows if row["variant"] == variant]
            percents = np.array([row["percent"] for row in mine])
            bounds = np.array([row["percent_interval"] for row in mine]).T
            line = left.errorbar(
                [row["k"] for row in mine], percents, np.abs(bounds - percents), marker="o", capsize=3, label=variant
            )
            right.axhline(mine[-1]["percent"], color=line.lines[0].get_color(), linestyle="--", label=variant)
        svd = [row for row in rows if row["variant"] == SVD and row["k"] == most]
        right.plot(
            [row["rank"] for row in svd], [row["percent"] for row in svd], marker="o", color="black", label="svd"
        )
        left.set(xlabel="heads", ylabel="rise of the perplexity, %", xticks=sorted({row["k"] for row in rows}))
        right.set(xlabel=f"rank, {most} heads", xscale="log")
        right.set_xticks([row["rank"] for row in svd], [str(row["rank"]) for row in svd])
        for axes in (left, right):
            axes.set_yscale("symlog", linthresh=0.1)
            axes.legend(frameon=False)
        return figure
