"""What a column of paired changes amounts to when its rows come from passages: estimates, intervals, tests.

Rows of one passage resemble each other. So there are two p-values: `p_rows`, Wilcoxon's over all rows as the WriteSAE paper
takes it, which overstates what was learned; and `p_passages`, Wilcoxon's over the mean change of each passage, which does not.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from writesae.evaluation.statistics import Numbers, holm, interval, paired_wilcoxon


def passage_p(values: Numbers, clusters: Numbers) -> float:
    """Two-sided p of Wilcoxon's signed-rank test over the mean of every cluster; NaN for fewer than two clusters."""
    means = pd.Series(np.asarray(values, dtype=float)).groupby(np.asarray(clusters)).mean().to_numpy()
    return paired_wilcoxon(means, np.zeros_like(means)).p_value if len(means) > 1 else float("nan")


def change(values: pd.Series, clusters: pd.Series, n_resamples: int = 5000) -> dict[str, Any]:
    """A column of changes in numbers: n, n_passages, median and mean with intervals clustered by passage, both p-values."""
    column = values.to_numpy(dtype=float)
    return {
        "n": len(column),
        "n_passages": int(clusters.nunique()),
        "median": float(np.median(column)),
        "median_interval": interval(column, clusters, "median", n_resamples),
        "mean": float(column.mean()),
        "mean_interval": interval(column, clusters, "mean", n_resamples),
        "p_rows": paired_wilcoxon(column, np.zeros_like(column)).p_value if len(column) > 1 else float("nan"),
        "p_passages": passage_p(column, clusters),
    }


def with_holm(rows: list[dict[str, Any]], p: str = "p_passages", name: str = "p_holm") -> list[dict[str, Any]]:
    """The rows of one family with Holm's adjustment of their p-values added; a row without a p-value gets none."""
    known = [index for index, row in enumerate(rows) if np.isfinite(row[p])]
    adjusted: Iterable[float] = holm([rows[index][p] for index in known]) if known else []
    corrected = {index: float(value) for index, value in zip(known, adjusted, strict=True)}
    return [row | {name: corrected.get(index, float("nan"))} for index, row in enumerate(rows)]
