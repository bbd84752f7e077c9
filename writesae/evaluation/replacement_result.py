"""The outcome of a replacement test: a table with a row per firing and reading, and its summary."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from writesae.evaluation.result import Result
from writesae.evaluation.statistics import cluster_bootstrap, median_mad, paired_wilcoxon, wilson_interval
from writesae.evaluation.substitutes import DELETE, NATIVE, POOLS, SCALES

# The column of the atom that each pool substitutes, by which its wins are grouped.
ATOM_COLUMN = {"listed": "atom", "dominant": "dominant"}

# Which random control stands beside which atom in the strict chain atom < delete < random.
CONTROL_OF = {
    ("listed", "coef"): "random_listed_coef",
    ("dominant", "coef"): "random_dominant_coef",
    ("listed", "norm"): "random_silent_norm",
    ("dominant", "norm"): "random_silent_norm",
}


@dataclass(frozen=True, repr=False)
class ReplacementResult(Result):
    """Every measurement of one cell.

    The table has a row per firing and reading; `kl_{condition}`, `kl_reverse_`, `flip_`, `logprob_`, `rank_` in columns.
    """

    kind = "replacement"

    def reading(self, reading: str) -> pd.DataFrame:
        """The rows of one reading, a row per firing."""
        rows = self.table[self.table["reading"] == reading]
        if rows.empty:
            raise KeyError(f"no reading {reading!r}; this result has {', '.join(self.table['reading'].unique())}")
        return rows

    def summary(self, n_resamples: int = 5000) -> list[dict[str, Any]]:
        """A row per reading, pool and scale: medians in nats, win rates with their intervals, the floor."""
        return [
            self._summarise(str(reading), pool, scale, n_resamples)
            for reading in self.table["reading"].unique()
            for pool in POOLS
            for scale in SCALES
        ]

    def win_rate(self, reading: str = "in_recurrence", pool: str = "dominant", scale: str = "coef") -> float:
        """Share of firings whose atom has a lower KL than deletion; a tie loses."""
        rows = self.reading(reading)
        return float((rows[f"kl_atom_{pool}_{scale}"] < rows[f"kl_{DELETE}"]).mean())

    def by_atom(self, reading: str = "in_recurrence", pool: str = "dominant", scale: str = "coef") -> pd.DataFrame:
        """Firings, wins, median coefficient and cosine of every atom that was substituted."""
        rows = self.reading(reading)
        prefix, suffix = ("dominant_", "_dominant") if pool == "dominant" else ("", "")
        won = rows[f"kl_atom_{pool}_{scale}"] < rows[f"kl_{DELETE}"]
        grouped = rows.assign(win=won).groupby(rows[ATOM_COLUMN[pool]].rename("substituted"))
        return grouped.agg(
            firings=("win", "size"),
            wins=("win", "sum"),
            win_rate=("win", "mean"),
            median_coefficient=(f"{prefix}coefficient", "median"),
            median_cosine=(f"cosine{suffix}", "median"),
        ).reset_index(names="atom")

    def floor(self, reading: str = "in_recurrence") -> tuple[float, float]:
        """Median and largest |KL| of substituting the native write for itself, in nats."""
        values = self.reading(reading)[f"kl_{NATIVE}"].abs()
        return float(values.median()), float(values.max())

    def _summarise(self, reading: str, pool: str, scale: str, n_resamples: int) -> dict[str, Any]:
        rows = self.reading(reading)
        atom, delete = rows[f"kl_atom_{pool}_{scale}"].to_numpy(), rows[f"kl_{DELETE}"].to_numpy()
        random = rows[f"kl_{CONTROL_OF[pool, scale]}"].to_numpy()
        won = (atom < delete).astype(float)
        wilson = wilson_interval(int(won.sum()), len(won))
        by_atom = _bootstrap(won, rows[ATOM_COLUMN[pool]], n_resamples)
        by_passage = _bootstrap(won, rows["passage"], n_resamples)
        spreads = {
            name: median_mad(values) for name, values in (("atom", atom), ("delete", delete), ("random", random))
        }
        floor_median, floor_max = self.floor(reading)
        return {
            "reading": reading,
            "pool": pool,
            "scale": scale,
            "n": len(won),
            "n_atoms": int(rows[ATOM_COLUMN[pool]].nunique()),
            "n_passages": int(rows["passage"].nunique()),
            "win_rate": wilson.estimate,
            "wilson": [wilson.low, wilson.high],
            "by_atom": by_atom,
            "by_passage": by_passage,
            "win_rate_vs_random": float((atom < random).mean()),
            "strict_chain": float(((atom < delete) & (delete < random)).mean()),
            **{f"median_kl_{name}": spread.median for name, spread in spreads.items()},
            **{f"error_kl_{name}": spread.error for name, spread in spreads.items()},
            "median_ratio_delete_to_atom": float(np.median(delete / np.maximum(atom, floor_max or 1e-300))),
            "wilcoxon_p": paired_wilcoxon(atom, delete).p_value if len(won) > 1 else float("nan"),
            "floor_median": floor_median,
            "floor_max": floor_max,
        }


def _bootstrap(won: np.ndarray, clusters: pd.Series, n_resamples: int) -> list[float]:
    """The interval of a mean clustered by a column; NaN where one cluster holds everything."""
    if clusters.nunique() < 2:
        return [float("nan"), float("nan")]
    interval = cluster_bootstrap(won, clusters.to_numpy(), n_resamples=n_resamples)
    return [interval.low, interval.high]
