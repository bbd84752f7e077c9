"""The outcome of an install: a row per trial and condition, and what each condition achieves against its controls."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from writesae.evaluation.result import Result
from writesae.evaluation.statistics import interval

NATIVE = "native"
STEERING = ("steering", "steering_shorter", "steering_gradient", "steering_gradient_shorter")
AGAINST = (NATIVE, "random", "random_value", "fixed_native_key", "fixed_next_query", *STEERING)
"""What the inclusion of every condition is compared with, trial by trial."""
TRIAL = ["passage", "position", "target", "stratum"]


@dataclass(frozen=True, repr=False)
class InstallResult(Result):
    """Every trial of an install.

    The table has a row per prompt (passage, position), target, cell choice, magnitude and condition; the native run has one
    row per prompt and target, of magnitude 0.
    """

    kind = "install"

    def trials(self, cell: str) -> pd.DataFrame:
        """The trials of one way to choose the cell, a row each, with a column per condition: whether the target appeared.

        Raises `KeyError` for a way that was not run.
        """
        of_cell = self.table[self.table["cell"] == cell]
        if of_cell.empty:
            raise KeyError(f"no trial with cell {cell!r}; there are {', '.join(self.table['cell'].unique())}")
        wide = of_cell.pivot(index=[*TRIAL, "magnitude"], columns="condition", values="included").reset_index()
        native = self.table[self.table["condition"] == NATIVE]
        beside = native[[*TRIAL, "included"]].rename(columns={"included": NATIVE})
        return wide.merge(beside, on=TRIAL, validate="m:1")

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

        Raises `KeyError` for a condition, control, stratum, magnitude or way to choose the cell that was not run.
        """
        trials = _part(self.trials(cell), stratum, magnitude)
        for name in (condition, control):
            if name not in trials:
                known = ", ".join(str(column) for column in trials.columns if column not in (*TRIAL, "magnitude"))
                raise KeyError(f"no condition {name!r} with cell {cell!r}; there are {known}")
        if trials.empty:
            raise KeyError(f"no trial in stratum {stratum!r} at magnitude {magnitude!r}")
        return _advantage(trials, _labels(trials), condition, control, n_resamples)

    def summary(self, n_resamples: int = 5000) -> list[dict[str, Any]]:
        """A row per cell choice, stratum, magnitude (also all together, as None) and condition.

        inclusion with its intervals, medians of the first-step change of log p(T) in nats and of the improvement of the
        rank, share of ranks improved, collateral KLs in nats (mean and median), and `advantage` over every control.
        """
        edited = self.table[self.table["condition"] != NATIVE]
        rows = []
        for cell in edited["cell"].unique():
            trials, of_cell = self.trials(str(cell)), edited[edited["cell"] == cell]
            for stratum in (*self.table["stratum"].unique(), None):
                for magnitude in (*sorted(edited["magnitude"].unique()), None):
                    here, measured = (_part(part, stratum, magnitude) for part in (trials, of_cell))
                    labels, where = _labels(here), {"cell": str(cell), "stratum": stratum, "magnitude": magnitude}
                    for name, block in measured.groupby("condition", sort=False):
                        rows.append({**where, **_summarise(str(name), block, here, labels, n_resamples)})
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


def _labels(trials: pd.DataFrame) -> np.ndarray:
    """A number per prompt and target, in the order of their names. Made once: names take longer to join than to resample."""
    names = trials["passage"].astype(str) + "/" + trials["target"].astype(str)
    return np.unique(names.to_numpy(dtype=str), return_inverse=True)[1]


def _summarise(
    condition: str, rows: pd.DataFrame, trials: pd.DataFrame, labels: np.ndarray, n_resamples: int
) -> dict[str, Any]:
    summary = {
        "condition": condition,
        "n": len(rows),
        "inclusion": float(rows["included"].mean()),
        "inclusion_by_passage": interval(rows["included"].astype(float), rows["passage"], n_resamples=n_resamples),
        "native_inclusion": float(trials[NATIVE].mean()),
        "median_delta_logprob": float(rows["delta_logprob"].median()),
        "median_rank_improvement": float(rows["rank_improvement"].median()),
        "rank_improved": float((rows["rank_improvement"] > 0).mean()),
        "mean_collateral_kl": float(rows["collateral_kl"].mean()),
        "median_collateral_kl": float(rows["collateral_kl"].median()),
        "mean_collateral_kl_reverse": float(rows["collateral_kl_reverse"].mean()),
    }
    for control in AGAINST:
        if control != condition and control in trials:
            found = _advantage(trials, labels, condition, control, n_resamples)
            summary[f"over_{control}"] = found["difference"]
            summary[f"over_{control}_by_prompt_and_target"] = found["by_prompt_and_target"]
            summary[f"over_{control}_by_passage"] = found["by_passage"]
            summary[f"over_{control}_significant"] = found["significant"]
    return summary


def _advantage(
    trials: pd.DataFrame, labels: np.ndarray, condition: str, control: str, n_resamples: int
) -> dict[str, Any]:
    difference = trials[condition].to_numpy(dtype=float) - trials[control].to_numpy(dtype=float)
    passage = trials["passage"].to_numpy()
    by_trial, by_passage = (interval(difference, by, n_resamples=n_resamples) for by in (labels, passage))
    return {
        "difference": float(difference.mean()),
        "by_prompt_and_target": by_trial,
        "by_passage": by_passage,
        "significant": bool(min(by_trial[0], by_passage[0]) > 0),
        "n": len(trials),
        "clusters": len(np.unique(labels)),
        "passages": len(np.unique(passage)),
    }


def _part(rows: pd.DataFrame, stratum: str | None, magnitude: float | None) -> pd.DataFrame:
    if stratum is not None:
        rows = rows[rows["stratum"] == stratum]
    return rows if magnitude is None else rows[rows["magnitude"] == magnitude]
