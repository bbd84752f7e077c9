"""How well predicted shifts fit measured ones: R^2 with nothing fitted first, then with ever more that is.

R^2 = 1 - sum (measured - predicted)^2 / sum (measured - mean measured)^2, pooled over rows; negative where predicting the mean
would be better. The paper's readings of what is fitted (protocol section 6), from none to most:

    nothing          the number that counts
    pooled slope     one factor for all rows
    slope per atom   a factor per (layer, head, atom)
    per context      a factor per context, atom, size and horizon (the paper's "fitted G"), over the tokens alone

Slopes are least squares through the origin. Intervals redraw whole passages; what is fitted is fitted once, on all rows.
"""

from typing import Any

import numpy as np
import pandas as pd

Numbers = np.ndarray | pd.Series
ATOM = ["layer", "head", "atom"]
CONTEXT = ["context", *ATOM, "size", "horizon"]


def r_squared(measured: Numbers, predicted: Numbers) -> float:
    """1 - SS_res / SS_tot; NaN where nothing was measured to vary."""
    measured, predicted = np.asarray(measured, float), np.asarray(predicted, float)
    total = ((measured - measured.mean()) ** 2).sum() if len(measured) else 0.0
    return float(1 - ((measured - predicted) ** 2).sum() / total) if total > 0 else float("nan")


def r_squared_interval(
    measured: Numbers, predicted: Numbers, clusters: Numbers, n_resamples: int = 5000, seed: int = 0
) -> list[float]:
    """Percentile interval (95%) of R^2 over redrawn clusters; NaN where one cluster holds everything."""
    measured, predicted = np.asarray(measured, float), np.asarray(predicted, float)
    labels: np.ndarray = np.asarray(clusters)
    names, member = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        return [float("nan"), float("nan")]
    centred = measured - measured.mean()  # R^2 is the same, and the difference of squares below loses no digits
    parts = [np.ones_like(centred), centred, centred**2, (measured - predicted) ** 2]
    sums = np.stack([np.bincount(member, weights=part) for part in parts], axis=1)
    times = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=n_resamples)
    n, first, second, residual = (times @ sums).T
    total = second - first**2 / n
    values = 1 - residual / np.where(total > 0, total, np.nan)
    return [float(bound) for bound in np.nanpercentile(values, [2.5, 97.5])]


def slope(measured: Numbers, predicted: Numbers) -> float:
    """The least-squares factor from predicted to measured; 0 where nothing was predicted."""
    measured, predicted = np.asarray(measured, float), np.asarray(predicted, float)
    squares = (predicted**2).sum()
    return float((measured * predicted).sum() / squares) if squares > 0 else 0.0


def fitted(rows: pd.DataFrame, predictor: str, by: list[str]) -> pd.Series:
    """The prediction times a slope of its own per group."""
    products = pd.DataFrame({"top": rows["measured"] * rows[predictor], "bottom": rows[predictor] ** 2})
    sums = products.groupby([rows[name] for name in by]).transform("sum")
    factor = (sums["top"] / sums["bottom"].where(sums["bottom"] > 0)).fillna(0.0)
    return rows[predictor] * factor


def estimates(rows: pd.DataFrame, predictor: str, n_resamples: int = 5000) -> dict[str, Any]:
    """Every figure of one predictor on some rows; rows that it could not predict (NaN) are left out."""
    rows = rows[rows[predictor].notna()]
    measured, predicted = rows["measured"].to_numpy(), rows[predictor].to_numpy()
    pooled = slope(measured, predicted)
    return {
        "n": len(rows),
        "n_contexts": int(rows["context"].nunique()),
        "n_passages": int(rows["passage"].nunique()),
        "r2": r_squared(measured, predicted),
        "r2_by_passage": r_squared_interval(measured, predicted, rows["passage"].to_numpy(), n_resamples),
        "r2_pooled_slope": r_squared(measured, pooled * predicted),
        "pooled_slope": pooled,
        "r2_slope_per_atom": r_squared(measured, fitted(rows, predictor, ATOM)),
        "r2_slope_per_context": r_squared(measured, fitted(rows, predictor, CONTEXT)),
        "sign_agreement": float((np.sign(measured) == np.sign(predicted)).mean()) if len(rows) else float("nan"),
        "shift": float(np.sqrt((measured**2).mean())) if len(rows) else float("nan"),
        "fraction": float(rows["fraction"].median()),
    }
