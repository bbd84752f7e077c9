"""The statistics of a replacement test, each with its definition; the arithmetic is scipy's and statsmodels'.

A replacement test yields one KL per firing and condition. Firings are paired (the same token under several edits), so
the tests here are paired; and firings of one atom or of one passage resemble each other, so their number overstates
what was learned. `cluster_bootstrap` therefore redraws whole atoms or passages, and its interval is the honest one
where it is wider than Wilson's.

Two numbers that the WriteSAE paper calls by one name are kept apart here. `paired_dominance` is 2w - 1, a rescaled win
rate. `cliffs_delta` compares every value of one group with every value of the other (Cliff 1993).

Every function refuses empty input, values that are not finite, and pairs of unequal number with a `ValueError`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

Numbers = Sequence | np.ndarray | pd.Series
Statistic = str | Callable[[np.ndarray], float]

_DRAWS_AT_ONCE = 4_000_000  # entries of one block of resampling weights: 32 MB of float64


@dataclass(frozen=True)
class Interval:
    """An estimate between two bounds."""

    estimate: float
    """The statistic on the data as they are."""
    low: float
    """Lower bound."""
    high: float
    """Upper bound."""
    method: str
    """How the bounds were found, in words that can stand in a table."""
    confidence: float = 0.95
    """Share of repetitions in which such an interval covers the truth."""


@dataclass(frozen=True)
class Comparison:
    """The outcome of a paired test."""

    statistic: float
    """The test's statistic; `method` says which."""
    p_value: float
    """Chance of a statistic at least this extreme if the two conditions were exchangeable."""
    n: int
    """Number of pairs."""
    method: str
    """Test, statistic and alternative in words."""


@dataclass(frozen=True)
class Spread:
    """A median and how far the values lie from it."""

    median: float
    """Middle value."""
    mad: float
    """Median absolute deviation from the median, not rescaled to a standard deviation."""
    error: float
    """mad / sqrt(n): the plus-minus of the paper's tables."""
    n: int
    """Number of values."""


def _column(name: str, values: Numbers) -> np.ndarray:
    """One finite float64 column, or a `ValueError` that says what is wrong with `name`."""
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1:
        raise ValueError(f"{name} must be one column of numbers, got an array of shape {column.shape}")
    if not len(column):
        raise ValueError(f"{name} is empty; a statistic needs at least one value")
    bad = np.flatnonzero(~np.isfinite(column))
    if len(bad):
        raise ValueError(
            f"{name} has {len(bad)} values that are not finite (first {column[bad[0]]} at index {bad[0]}); "
            "drop or repair those rows first"
        )
    return column


def _pairs(first_name: str, first: Numbers, second_name: str, second: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """Two columns of equal length, or a `ValueError` that names both."""
    left, right = _column(first_name, first), _column(second_name, second)
    if len(left) != len(right):
        raise ValueError(
            f"{first_name} has {len(left)} values but {second_name} has {len(right)}; a paired statistic needs one "
            "of each per firing"
        )
    return left, right


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence!r} (0.95 means 95%)")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def wilson_interval(successes: int | np.integer, total: int | np.integer, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share: sensible near 0 and 1, where the usual normal interval leaves [0, 1].

    Raises `ValueError` when `total` is not positive or `successes` lies outside 0..total.
    """
    _check_confidence(confidence)
    if total <= 0:
        raise ValueError(f"total is {total}; a share needs at least one trial")
    if not 0 <= successes <= total:
        raise ValueError(f"successes must lie in 0..{total}, got {successes}")
    low, high = proportion_confint(int(successes), int(total), alpha=1 - confidence, method="wilson")
    return Interval(int(successes) / int(total), float(low), float(high), "Wilson score", confidence)


def win_rate(lower: Numbers, higher: Numbers, confidence: float = 0.95) -> Interval:
    """Share of pairs in which `lower` is the lower one (ties lose), with Wilson's interval over pairs."""
    left, right = _pairs("lower", lower, "higher", higher)
    return wilson_interval(int((left < right).sum()), len(left), confidence)


def cluster_bootstrap(
    values: Numbers,
    clusters: Numbers,
    statistic: Statistic = "mean",
    n_resamples: int = 5000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of a statistic when whole clusters, not single values, are what was sampled.

    Each resample draws as many clusters as there are, with replacement, and pools all their values. For a win rate
    pass the wins as 0 and 1.

    Args:
        values: One number per firing.
        clusters: One label per firing (an atom, a passage), of any type that numpy can sort.
        statistic: "mean", "median", or a function from a pooled column to a number (slower: called once a resample).
        n_resamples: Number of resamples.
        seed: Seed of the draws; the same seed gives the same interval.
        confidence: Share of the resamples between the bounds.

    Raises:
        ValueError: fewer than two clusters (their variation cannot be seen), or bad values as the module says.
    """
    column = _column("values", values)
    labels: np.ndarray = np.asarray(clusters)
    if labels.shape != column.shape:
        raise ValueError(f"values has {len(column)} entries but clusters has shape {labels.shape}; give one label each")
    if pd.isna(labels).any():
        raise ValueError("clusters has missing labels; every value must belong to a cluster")
    _check_confidence(confidence)
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
    if not callable(statistic):
        _check_choice("statistic", statistic, ("mean", "median"))
    names, member = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"clusters has only one label ({names[0]!r}); resampling needs at least two clusters")
    draws = _draw_clusters(len(names), n_resamples, seed)
    estimate, resampled = _resample(column, member, statistic, draws)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Interval(estimate, float(low), float(high), f"cluster bootstrap over {len(names)} clusters", confidence)


def interval(values: Numbers, clusters: Numbers, statistic: Statistic = "mean", n_resamples: int = 5000) -> list[float]:
    """[low, high] of `cluster_bootstrap`, for a table; NaN twice where there are fewer than two clusters to redraw."""
    column = np.asarray(values, dtype=float)
    labels: np.ndarray = np.asarray(clusters)
    if len(np.unique(labels)) < 2:
        return [float("nan"), float("nan")]
    found = cluster_bootstrap(column, labels, statistic, n_resamples=n_resamples)
    return [found.low, found.high]


@lru_cache(maxsize=4)  # a summary asks for the same draws a hundred times, and they take longer than all it does with them
def _draw_clusters(n_clusters: int, n_resamples: int, seed: int) -> np.ndarray:
    """How often each cluster is drawn: [resample, cluster], each row summing to n_clusters."""
    equal = np.full(n_clusters, 1 / n_clusters)
    draws = np.random.default_rng(seed).multinomial(n_clusters, equal, size=n_resamples)
    draws.flags.writeable = False
    return draws


def _resample(
    column: np.ndarray, member: np.ndarray, statistic: Statistic, draws: np.ndarray
) -> tuple[float, np.ndarray]:
    """The statistic on the data, and on every resample: [resample]."""
    if callable(statistic):
        pooled = [float(statistic(np.repeat(column, times[member]))) for times in draws]
        return float(statistic(column)), np.asarray(pooled)
    if statistic == "mean":  # a pooled mean needs each cluster's sum and size alone
        sums, sizes = np.bincount(member, weights=column), np.bincount(member)
        return float(column.mean()), (draws @ sums) / (draws @ sizes)
    order = np.argsort(column, kind="stable")
    column, member = column[order], member[order]
    rows = max(1, _DRAWS_AT_ONCE // len(column))
    blocks = [draws[start : start + rows] for start in range(0, len(draws), rows)]
    medians = [_weighted_medians(column, block[:, member]) for block in blocks]
    return float(np.median(column)), np.concatenate(medians)


def _weighted_medians(ascending: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Median of each pooled sample in which value j stands times[row, j] times: [row]."""
    reached = times.cumsum(axis=1)
    n = reached[:, -1:]
    lower, upper = (ascending[(reached > middle).argmax(axis=1)] for middle in ((n - 1) // 2, n // 2))
    return (lower + upper) / 2


def median_mad(values: Numbers) -> Spread:
    """Median, median absolute deviation, and mad / sqrt(n)."""
    column = _column("values", values)
    mad = float(stats.median_abs_deviation(column))
    return Spread(float(np.median(column)), mad, mad / float(np.sqrt(len(column))), len(column))


def paired_wilcoxon(first: Numbers, second: Numbers, alternative: str = "two-sided") -> Comparison:
    """Wilcoxon's signed-rank test of first - second; pairs without a difference are dropped, as Wilcoxon did.

    `alternative` is "two-sided", "less" (first tends to be smaller) or "greater". When no pair differs there is
    nothing to rank, and the p-value is 1.
    """
    left, right = _pairs("first", first, "second", second)
    _check_choice("alternative", alternative, ("two-sided", "less", "greater"))
    method = f"Wilcoxon signed-rank, {alternative}"
    if not np.any(left != right):
        return Comparison(0.0, 1.0, len(left), method)
    result = stats.wilcoxon(left, right, alternative=alternative)
    return Comparison(float(result.statistic), float(result.pvalue), len(left), method)


def paired_dominance(lower: Numbers, higher: Numbers) -> float:
    """2w - 1, where w is the share of pairs in which `lower` is the lower one (ties lose): the win rate, rescaled.

    This is the number that the paper prints as Cliff's delta (0.825 for a win rate of 91.25%). It says nothing that
    the win rate does not; the all-pairs measure is `cliffs_delta`.
    """
    left, right = _pairs("lower", lower, "higher", higher)
    return float(2 * (left < right).mean() - 1)


def cliffs_delta(first: Numbers, second: Numbers) -> float:
    """P(first > second) - P(first < second) over all pairs of one value from each group; the sizes may differ.

    Ties count for neither side. +1 when every value of `first` is above every value of `second`. Found from ranks, as
    Mann and Whitney's U is, so that large groups cost n log n steps and not n squared.
    """
    left, right = _column("first", first), _column("second", second)
    ranks = stats.rankdata(np.concatenate([left, right]))[: len(left)]
    above = ranks.sum() - len(left) * (len(left) + 1) / 2  # pairs that `first` wins; its ties count one half
    return float(2 * above / (len(left) * len(right)) - 1)


def holm(p_values: Numbers) -> np.ndarray:
    """Holm's step-down adjustment of a family of p-values, in the order they came; compare with the level itself.

    Raises `ValueError` for a p-value outside [0, 1].
    """
    column = _column("p_values", p_values)
    if column.min() < 0 or column.max() > 1:
        raise ValueError(f"p_values must lie in [0, 1], got values from {column.min():g} to {column.max():g}")
    return np.asarray(multipletests(column, method="holm")[1])


def _mean_difference(first: np.ndarray, second: np.ndarray, axis: int) -> np.ndarray | np.floating:
    return np.mean(first - second, axis=axis)


def _median_difference(first: np.ndarray, second: np.ndarray, axis: int) -> np.ndarray | np.floating:
    return np.median(first - second, axis=axis)


def _mean_sign(first: np.ndarray, second: np.ndarray, axis: int) -> np.ndarray | np.floating:
    return np.mean(np.sign(first - second), axis=axis)


_DIFFERENCES = {"mean": _mean_difference, "median": _median_difference, "sign": _mean_sign}


def permutation_test_paired(
    first: Numbers,
    second: Numbers,
    statistic: str = "mean",
    n_resamples: int = 10_000,
    seed: int = 0,
    alternative: str = "two-sided",
) -> Comparison:
    """Test whether the two labels of each firing can be swapped: flip them at random and compare.

    `statistic` is taken of first - second: "mean", "median", or "sign" (the mean sign, which only counts wins and is
    blind to the size of a KL). Where all 2^n flips number at most `n_resamples` they are all tried and the p-value is
    exact; otherwise the draw counts itself, so the p-value is never 0. `alternative` is as in `paired_wilcoxon`.
    """
    left, right = _pairs("first", first, "second", second)
    _check_choice("statistic", statistic, tuple(_DIFFERENCES))
    _check_choice("alternative", alternative, ("two-sided", "less", "greater"))
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
    method = f"paired permutation of the {statistic} difference, {alternative}"
    if not np.any(left != right):
        return Comparison(0.0, 1.0, len(left), method)
    result = stats.permutation_test(
        (left, right),
        _DIFFERENCES[statistic],
        permutation_type="samples",
        vectorized=True,
        n_resamples=n_resamples,
        batch=max(1, _DRAWS_AT_ONCE // len(left)),
        alternative=alternative,
        rng=np.random.default_rng(seed),
    )
    return Comparison(float(result.statistic), float(result.pvalue), len(left), method)
