"""The outcome of steering: a row per condition, dose and prompt, and every dose against the unsteered run and its controls."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from writesae.evaluation.acting.paired import with_holm
from writesae.evaluation.result import Result
from writesae.evaluation.statistics import interval

BASELINE = "baseline"
METRICS = ("tokens", "newlines", "word_length")
N_RESAMPLES = 10_000


@dataclass(frozen=True, repr=False)
class SteeringResult(Result):
    """Every generation: its wanted tokens, newlines, paragraphs, mean word length, text, and KL on the unsteered one.

    `about` names the heads, the wanted tokens and the atoms of every head.
    """

    kind = "steer"

    def wide(self, metric: str) -> pd.DataFrame:
        """One metric with a row per prompt and a column per (condition, dose)."""
        return self.table.pivot(index="prompt", columns=["condition", "dose"], values=metric)

    def summary(self, n_resamples: int = N_RESAMPLES) -> list[dict[str, Any]]:
        """A row per metric, condition and dose: its mean, and its difference to the unsteered run of the same prompts.

        `difference` has a bootstrap interval over prompts; `p` is of the paired t-test, `p_holm` adjusted over doses,
        `cohen_d` the mean difference over its standard deviation. `minus_other` and `minus_gaussian` are the atoms' mean
        difference to each control at the same dose, with `p_other` and `p_gaussian`. `floor` is the largest KL of adding
        nothing.
        """
        rows = []
        for metric in (name for name in METRICS if name in self.table):
            wide = self.wide(metric)
            for condition in dict.fromkeys(self.table["condition"]):
                doses = [dose for name, dose in wide.columns if name == condition]
                told = [self._row(wide, metric, condition, dose, n_resamples) for dose in sorted(doses)]
                rows += told if condition == BASELINE else with_holm(told, p="p")
        return rows

    def floor(self) -> float:
        """Largest |KL| of adding nothing, in nats."""
        return float(self.table.loc[self.table["condition"] == BASELINE, "kl"].abs().max())

    def _row(self, wide: pd.DataFrame, metric: str, condition: str, dose: float, n_resamples: int) -> dict[str, Any]:
        values = wide[condition, dose]
        mine = self.table[(self.table["condition"] == condition) & (self.table["dose"] == dose)]
        row = {"metric": metric, "condition": condition, "dose": float(dose), "n": int(values.notna().sum())}
        row |= {
            "mean": float(values.mean()),
            "kl": float(mine["kl"].mean()),
            "kl_reverse": float(mine["kl_reverse"].mean()),
        }
        row |= _against(values, wide[BASELINE, 0.0], n_resamples)
        for name, control in (("other", "other_atoms"), ("gaussian", "gaussian")):
            there = condition == "atoms" and (control, dose) in wide
            told = _against(values, wide[control, dose], n_resamples) if there else None
            row[f"minus_{name}"] = told["difference"] if told else float("nan")
            row[f"minus_{name}_interval"] = told["interval"] if told else [float("nan")] * 2
            row[f"p_{name}"] = told["p"] if told else float("nan")
        return row | {"floor": self.floor()}

    def figure(self) -> Figure:
        """Per metric the mean difference to the unsteered run by dose, with its interval, for the atoms and both controls."""
        rows = pd.DataFrame(self.summary(n_resamples=1000))
        metrics = list(rows["metric"].unique())
        figure = Figure(figsize=(4 * len(metrics), 3.6), layout="constrained")
        for axes, metric in zip(np.atleast_1d(figure.subplots(1, len(metrics))), metrics, strict=True):
            for condition, mine in rows[(rows["metric"] == metric) & (rows["condition"] != BASELINE)].groupby(
                "condition"
            ):
                bounds = np.array(mine["interval"].tolist())
                error = np.abs(bounds - mine["difference"].to_numpy()[:, None]).T
                axes.errorbar(mine["dose"], mine["difference"], error, marker="o", capsize=2, label=condition)
            axes.axhline(0, linewidth=0.8, color="0.6")
            axes.set(xlabel="dose", title=metric.replace("_", " "), xscale="log")
        figure.axes[0].set_ylabel("steered minus unsteered")
        figure.axes[0].legend(fontsize=7)
        return figure


def _against(values: pd.Series, others: pd.Series, n_resamples: int) -> dict[str, Any]:
    """The paired difference of two columns by prompt; prompts that lack one of the two are left out."""
    difference = (values - others).dropna()
    empty = {"difference": float("nan"), "interval": [float("nan")] * 2, "p": float("nan"), "cohen_d": float("nan")}
    if difference.empty:
        return empty
    spread = float(difference.std(ddof=1)) if len(difference) > 1 else float("nan")
    mean, told = float(difference.mean()), empty
    if spread > 0:  # equal differences, such as those of the unsteered run to itself, leave nothing to test
        told = {"p": float(stats.ttest_1samp(difference, 0.0).pvalue), "cohen_d": mean / spread}
    bounds = interval(difference, np.arange(len(difference)), "mean", n_resamples)
    return empty | told | {"difference": mean, "interval": bounds}
