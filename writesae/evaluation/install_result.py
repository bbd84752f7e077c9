"""The outcome of an install: a row per trial and condition, and what each condition achieves against its controls."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from writesae.evaluation.result import Result
from writesae.evaluation.statistics import cluster_bootstrap

NATIVE = "native"
AGAINST = (NATIVE, "random", "random_value", "fixed_native_key", "steering", "steering_gradient")
"""What the inclusion of every condition is compared with, trial by trial."""
TRIAL = ["passage", "position", "target"]


@dataclass(frozen=True, repr=False)
class InstallResult(Result):
    """Every trial of an install.

    The table has a row per prompt (passage, position), target, cell choice, magnitude and condition; the native run has one
    row per prompt and target, of magnitude 0.
    """

    kind = "install"

    def paired(self, condition: str, control: str, cell: str) -> pd.DataFrame:
        """The trials of a condition with `control_included` of the same trial beside them.

        Raises `KeyError` for a condition, control or way to choose the cell that was not run.
        """
        mine, other = (self._rows(name, cell) for name in (condition, control))
        keys = TRIAL if control == NATIVE else [*TRIAL, "magnitude"]
        beside = other[[*keys, "included"]].rename(columns={"included": "control_included"})
        return mine.merge(beside, on=keys, validate="m:1")

    def advantage(
        self,
        condition: str,
        control: str,
        *,
        cell: str,
        stratum: str | None = None,
        magnitude: float | None = None,
        n_resamples: int = 5000,
    ) -> dict[str, Any]:
        """How much more often the target appears than under a control: mean paired difference with two clustered intervals.

        One is clustered by prompt and target (the paper's trials hardly vary within them), one by passage alone, which
        also allows for prompts that give in to anything. `significant` where the lower ends of both are above 0.
        """
        pairs = _part(self.paired(condition, control, cell), stratum, magnitude)
        if pairs.empty:
            raise KeyError(f"no trial of {condition!r} in stratum {stratum!r} at magnitude {magnitude!r}")
        difference = pairs["included"].astype(float) - pairs["control_included"].astype(float)
        trial, passage = pairs["passage"].astype(str) + "/" + pairs["target"].astype(str), pairs["passage"]
        by_trial, by_passage = (_interval(difference, labels, n_resamples) for labels in (trial, passage))
        return {
            "difference": float(difference.mean()),
            "by_prompt_and_target": by_trial,
            "by_passage": by_passage,
            "significant": bool(min(by_trial[0], by_passage[0]) > 0),
            "n": len(pairs),
            "clusters": int(trial.nunique()),
            "passages": int(passage.nunique()),
        }

    def summary(self, n_resamples: int = 5000) -> list[dict[str, Any]]:
        """A row per cell choice, stratum, magnitude (also all together, as None) and condition.

        inclusion with its intervals, medians of the first-step change of log p(T) in nats and of the improvement of the
        rank, share of ranks improved, collateral KLs in nats (mean and median), and `advantage` over every control.
        """
        edited = self.table[self.table["condition"] != NATIVE]
        rows = []
        for cell in edited["cell"].unique():
            conditions = edited.loc[edited["cell"] == cell, "condition"].unique()
            for stratum in (*self.table["stratum"].unique(), None):
                for magnitude in (*sorted(edited["magnitude"].unique()), None):
                    where = {"cell": str(cell), "stratum": stratum, "magnitude": magnitude}
                    rows += [self._summarise(str(name), where, conditions, n_resamples) for name in conditions]
        return rows

    def figure(self) -> Figure:
        """Inclusion of the middle stratum over the magnitude, a line per condition, a panel per way to choose the cell."""
        edited = self.table[self.table["condition"] != NATIVE]
        cells = list(edited["cell"].unique())
        figure = Figure(figsize=(5.5 * len(cells), 4), layout="constrained")
        for place, cell in enumerate(cells):
            axes = figure.add_subplot(1, len(cells), place + 1)
            of_cell = edited[(edited["cell"] == cell) & (edited["stratum"] == "middle")]
            for name, rows in of_cell.groupby("condition", sort=False):
                means = rows.groupby("magnitude")["included"].mean()
                axes.plot(means.index, means.to_numpy(), marker="o", label=str(name))
            native = self.table[(self.table["condition"] == NATIVE) & (self.table["stratum"] == "middle")]
            if len(native):
                axes.axhline(native["included"].mean(), color="0.6", linestyle="--", label=NATIVE)
            axes.set(xlabel="norm / native norm", ylabel="share of trials whose target appears", title=f"cell: {cell}")
            axes.legend(fontsize=7)
        return figure

    def _rows(self, condition: str, cell: str) -> pd.DataFrame:
        table = self.table
        rows = table[(table["condition"] == condition) & ((table["cell"] == cell) | (condition == NATIVE))]
        if rows.empty:
            names = ", ".join(table["condition"].unique())
            raise KeyError(f"no {condition!r} with cell {cell!r}; the conditions are {names}")
        return rows

    def _summarise(
        self, condition: str, where: dict[str, Any], conditions: np.ndarray, n_resamples: int
    ) -> dict[str, Any]:
        rows = _part(self._rows(condition, where["cell"]), where["stratum"], where["magnitude"])
        summary = {
            **where,
            "condition": condition,
            "n": len(rows),
            "inclusion": float(rows["included"].mean()),
            "inclusion_by_passage": _interval(rows["included"].astype(float), rows["passage"], n_resamples),
            "median_delta_logprob": float(rows["delta_logprob"].median()),
            "median_rank_improvement": float(rows["rank_improvement"].median()),
            "rank_improved": float((rows["rank_improvement"] > 0).mean()),
            "mean_collateral_kl": float(rows["collateral_kl"].mean()),
            "median_collateral_kl": float(rows["collateral_kl"].median()),
            "mean_collateral_kl_reverse": float(rows["collateral_kl_reverse"].mean()),
        }
        for control in AGAINST:
            if control != condition and (control == NATIVE or control in conditions):
                found = self.advantage(condition, control, n_resamples=n_resamples, **where)
                summary[f"over_{control}"] = found["difference"]
                summary[f"over_{control}_by_prompt_and_target"] = found["by_prompt_and_target"]
                summary[f"over_{control}_by_passage"] = found["by_passage"]
                summary[f"over_{control}_significant"] = found["significant"]
        return summary


def _part(rows: pd.DataFrame, stratum: str | None, magnitude: float | None) -> pd.DataFrame:
    if stratum is not None:
        rows = rows[rows["stratum"] == stratum]
    return rows if magnitude is None else rows[rows["magnitude"] == magnitude]


def _interval(values: pd.Series, labels: pd.Series, n_resamples: int) -> list[float]:
    """Bounds of a clustered mean; NaN where one cluster holds everything."""
    if labels.nunique() < 2:
        return [float("nan"), float("nan")]
    interval = cluster_bootstrap(values.to_numpy(), labels.to_numpy(), n_resamples=n_resamples)
    return [interval.low, interval.high]
