"""What a comparison of objectives found: a row per dictionary and reading, means over seeds, and paired tests."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from writesae.evaluation.result import Result
from writesae.evaluation.statistics import cluster_bootstrap, permutation_test_paired

REFERENCE = ("state", "write")
"""What every objective is compared with: the first of these that was run."""
_SPREAD = ("win_rate", "fvu", "dead_fraction", "loss_recovered", "median_ratio_delete_to_atom")
_MIDDLE = ("median_kl_atom", "median_kl_delete", "median_kl_random", "strict_chain", "seconds")


@dataclass(frozen=True, repr=False)
class ObjectivesResult(Result):
    """Every dictionary of one cell by objective, seed and reading.

    The table holds per row the win rate of the most active atom against deletion with its interval by passage (low, high), the
    median KLs in nats, and the dictionary's unexplained variance, dead atoms and spliced losses.
    """

    kind = "objectives"

    wins: list[dict[str, Any]] = field(default_factory=list)
    """Per objective, seed, reading and passage: firings, and how many of them the atom won."""

    @property
    def objectives(self) -> list[str]:
        """Names, as they were run."""
        return list(dict.fromkeys(self.table["objective"]))

    def summary(self, n_resamples: int = 2000) -> list[dict[str, Any]]:
        """A row per reading and objective: means and standard deviations over seeds, and the difference to the reference.

        `by_passage` is the interval of the win rate pooled over seeds, clustered by passage; `ahead` is how much higher the
        win rate is than the reference's, with its interval and p-value by passage (see `difference`).
        """
        reference = next((name for name in REFERENCE if name in self.objectives), self.objectives[0])
        return [
            self._summarise(str(reading), objective, reference, n_resamples)
            for reading in self.table["reading"].unique()
            for objective in self.objectives
        ]

    def difference(self, first: str, second: str, reading: str, n_resamples: int = 2000) -> dict[str, Any]:
        """How much higher the win rate of the first objective is, passage by passage.

        Both are tested on the same passages, so the pairs are passages, each with its wins over all seeds; the interval is a
        bootstrap over passages, the p-value that of swapping the objectives' names within passages (a sign-flip permutation).
        NaN where fewer than two passages were met by both.
        """
        rates = self._rates(reading)
        both = rates[[first, second]].dropna() if {first, second} <= set(rates) else pd.DataFrame()
        if len(both) < 2:
            return {"ahead": float("nan"), "interval": [float("nan")] * 2, "p": float("nan"), "n_passages": len(both)}
        gained = (both[first] - both[second]).to_numpy()
        interval = cluster_bootstrap(gained, np.arange(len(gained)), n_resamples=n_resamples)
        test = permutation_test_paired(both[first], both[second], n_resamples=n_resamples)
        return {
            "ahead": interval.estimate,
            "interval": [interval.low, interval.high],
            "p": test.p_value,
            "n_passages": len(both),
        }

    def figure(self) -> Figure:
        """Win rates per reading: a point per seed, and the mean with its interval by passage."""
        rows = pd.DataFrame(self.summary(500))
        readings = list(rows["reading"].unique())
        figure = Figure(figsize=(4.2 * len(readings), 0.5 * len(self.objectives) + 1.6), layout="constrained")
        for place, reading in enumerate(readings):
            axes = figure.add_subplot(1, len(readings), place + 1)
            for line, objective in enumerate(self.objectives):
                mine = self._of(reading, objective)
                row = rows[(rows["reading"] == reading) & (rows["objective"] == objective)].iloc[0]
                axes.plot(mine["win_rate"], np.full(len(mine), line), "o", ms=3, color="0.6")
                axes.plot(row["by_passage"], [line, line], "-", color="C0")
                axes.plot([row["win_rate"]], [line], "D", color="C0")
            axes.axvline(0.5, color="0.8", lw=1)
            axes.set_yticks(range(len(self.objectives)), self.objectives if place == 0 else [""] * len(self.objectives))
            axes.invert_yaxis()
            axes.set_title(reading.replace("_", " "))
            axes.set_xlabel("atom beats deletion")
        return figure

    # --- inside ------------------------------------------------------------------------------------------------

    def _of(self, reading: str, objective: str) -> pd.DataFrame:
        return self.table[(self.table["reading"] == reading) & (self.table["objective"] == objective)]

    def _counts(self, reading: str) -> pd.DataFrame:
        """Wins and firings by objective and passage, over all seeds."""
        table = pd.DataFrame(self.wins)
        mine = table[table["reading"] == reading]
        return mine.groupby(["objective", "passage"])[["wins", "firings"]].sum()

    def _rates(self, reading: str) -> pd.DataFrame:
        """Win rate by passage (rows) and objective (columns)."""
        counts = self._counts(reading)
        return (counts["wins"] / counts["firings"]).unstack("objective")

    def _summarise(self, reading: str, objective: str, reference: str, n_resamples: int) -> dict[str, Any]:
        mine = self._of(reading, objective)
        found: dict[str, Any] = {
            "reading": reading,
            "objective": objective,
            "seeds": len(mine),
            "n": int(mine["n"].sum()),
        }
        for name in _SPREAD:
            if name in mine:
                found[name] = float(mine[name].mean())
                found[f"{name}_sd"] = float(mine[name].std(ddof=1)) if len(mine) > 1 else float("nan")
        found |= {name: float(mine[name].mean()) for name in _MIDDLE if name in mine}
        counts = self._counts(reading).loc[objective]
        won = np.repeat(
            np.tile([1.0, 0.0], len(counts)), np.c_[counts["wins"], counts["firings"] - counts["wins"]].ravel()
        )
        found["by_passage"] = [float("nan")] * 2
        if len(counts) > 1:
            interval = cluster_bootstrap(
                won, np.repeat(counts.index.to_numpy(), counts["firings"]), n_resamples=n_resamples
            )
            found["by_passage"] = [interval.low, interval.high]
        if objective != reference:
            against = self.difference(objective, reference, reading, n_resamples)
            found |= {
                "against": reference,
                "ahead": against["ahead"],
                "ahead_interval": against["interval"],
                "p": against["p"],
            }
        return found
