"""The outcome of a replacement test: a table with a row per firing and reading, its summary, and where the atoms lose."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from writesae.evaluation.replacing.replacement_figures import replacement_figure
from writesae.evaluation.replacing.substitutes import CONDITIONS, DELETE, NATIVE, POOLS, SCALES
from writesae.evaluation.result import Result
from writesae.evaluation.statistics import interval, median_mad, paired_wilcoxon, wilson_interval

# The column of the atom that each pool substitutes, by which its wins are grouped.
ATOM_COLUMN = {"listed": "atom", "dominant": "dominant"}

# Which random control stands beside which atom in the strict chain atom < delete < random; all others have the silent atom.
CONTROL_OF = {("listed", "coef"): "random_listed_coef", ("dominant", "coef"): "random_dominant_coef"}
SILENT = "random_silent_norm"
OTHER = "given"
"""The scale of a further condition in the summary: whatever the caller gave it."""


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

    @property
    def others(self) -> tuple[str, ...]:
        """The further conditions that were measured beside the built-in ones."""
        names = [str(name).removeprefix("norm_") for name in self.table.columns if str(name).startswith("norm_")]
        return tuple(name for name in names if name not in CONDITIONS)

    def summary(self, n_resamples: int = 5000) -> list[dict[str, Any]]:
        """A row per reading, pool and scale: medians in nats, win rates with their intervals, the floor.

        A further condition stands in `pool` by its name, with scale "given".
        """
        return [
            self._summarise(str(reading), pool, scale, n_resamples)
            for reading in self.table["reading"].unique()
            for pool, scale in self._substitutes()
        ]

    def win_rate(self, reading: str = "in_recurrence", pool: str = "dominant", scale: str = "coef") -> float:
        """Share of firings whose atom has a lower KL than deletion; a tie loses."""
        rows = self.reading(reading)
        return float((rows[self._column(pool, scale)] < rows[f"kl_{DELETE}"]).mean())

    def by_atom(self, reading: str = "in_recurrence", pool: str = "dominant", scale: str = "coef") -> pd.DataFrame:
        """Firings, wins, median coefficient and cosine of every atom that was substituted."""
        rows = self.reading(reading)
        prefix, suffix = ("dominant_", "_dominant") if pool == "dominant" else ("", "")
        won = rows[self._column(pool, scale)] < rows[f"kl_{DELETE}"]
        grouped = rows.assign(win=won).groupby(rows[_atoms_of(pool)].rename("substituted"))
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

    def losses(
        self,
        reading: str = "in_recurrence",
        pool: str = "dominant",
        scale: str = "coef",
        *,
        bins: int = 4,
        n_resamples: int = 2000,
    ) -> pd.DataFrame:
        """Where the atom loses: its win rate in every quartile of what might explain it (protocol 4.5).

        Explanations: `kl_delete`, how much the write mattered (beside the floor a loss means nothing); `write_norm`; `rate`,
        how often the atom fires; `cosine` of atom and native write; `coefficient`; `size_ratio`, the substitute's norm over
        the write's; and `position`.

        Args:
            reading, pool, scale: which comparison.
            bins: how many groups of about equal size; fewer where many firings share a value.
            n_resamples: of the intervals, clustered by passage.

        Returns:
            A row per explanation and bin: by, bin, low, high (its range), n, wins, win_rate, from, to (the win rate's interval
            over passages; NaN where one passage holds everything), share_of_losses, median_kl_atom, median_kl_delete.
        """
        rows, suffix = self.reading(reading), "_dominant" if pool == "dominant" else ""
        kl, delete = rows[self._column(pool, scale)], rows[f"kl_{DELETE}"]
        norm = rows[self._column(pool, scale).replace("kl_", "norm_", 1)]
        explanations = {
            "kl_delete": delete,
            "write_norm": rows["write_norm"],
            "rate": rows[f"rate{suffix}"],
            "cosine": rows[f"cosine{suffix}"],
            "coefficient": rows["dominant_coefficient" if suffix else "coefficient"],
            "size_ratio": norm / rows["write_norm"].where(rows["write_norm"] > 0),
            "position": rows["position"].astype(float),
        }
        won = kl < delete
        lost = max(1, int((~won).sum()))
        found = []
        for name, values in explanations.items():
            for number, here in _quantiles(values, bins):
                bounds = interval(won[here].to_numpy(float), rows.loc[here, "passage"], n_resamples=n_resamples)
                found.append(
                    {
                        "by": name,
                        "bin": number,
                        "low": float(values[here].min()),
                        "high": float(values[here].max()),
                        "n": int(here.sum()),
                        "wins": int(won[here].sum()),
                        "win_rate": float(won[here].mean()),
                        "from": bounds[0],
                        "to": bounds[1],
                        "share_of_losses": float((~won[here]).sum() / lost),
                        "median_kl_atom": float(kl[here].median()),
                        "median_kl_delete": float(delete[here].median()),
                    }
                )
        return pd.DataFrame(found)

    def figure(self) -> Figure:
        """KL of atom, deletion, random and floor per reading; and every win rate with its interval over passages."""
        return replacement_figure(self.summary(1000))

    def _substitutes(self) -> list[tuple[str, str]]:
        """(pool, scale) of whatever has a column: files of older versions have no scale "best"."""
        built_in = [(pool, scale) for pool in POOLS for scale in SCALES if self._column(pool, scale) in self.table]
        return built_in + [(name, OTHER) for name in self.others]

    def _column(self, pool: str, scale: str) -> str:
        return f"kl_{pool}" if scale == OTHER else f"kl_atom_{pool}_{scale}"

    def _summarise(self, reading: str, pool: str, scale: str, n_resamples: int) -> dict[str, Any]:
        rows, atoms = self.reading(reading), _atoms_of(pool)
        atom, delete = rows[self._column(pool, scale)].to_numpy(), rows[f"kl_{DELETE}"].to_numpy()
        random = rows[f"kl_{CONTROL_OF.get((pool, scale), SILENT)}"].to_numpy()
        won = (atom < delete).astype(float)
        wilson = wilson_interval(int(won.sum()), len(won))
        by_atom = interval(won, rows[atoms], n_resamples=n_resamples)
        by_passage = interval(won, rows["passage"], n_resamples=n_resamples)
        spreads = {
            name: median_mad(values) for name, values in (("atom", atom), ("delete", delete), ("random", random))
        }
        floor_median, floor_max = self.floor(reading)
        return {
            "reading": reading,
            "pool": pool,
            "scale": scale,
            "n": len(won),
            "n_atoms": int(rows[atoms].nunique()),
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


def _atoms_of(pool: str) -> str:
    """The column by which wins are clustered; a further condition goes with the atom that fired."""
    return ATOM_COLUMN.get(pool, "atom")


def _quantiles(values: pd.Series, bins: int) -> Iterator[tuple[int, pd.Series]]:
    """(number, which rows) of every group of about equal size, the lowest values first; ties stay together."""
    groups = pd.qcut(values, bins, labels=False, duplicates="drop")
    if groups.isna().all():  # one value throughout has no edges
        groups = groups.fillna(0)
    for number, code in enumerate(sorted(groups.dropna().unique())):
        yield number, groups == code
