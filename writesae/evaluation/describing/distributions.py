"""Shapes of distributions: mixtures and their BIC, bimodality, and comparisons whose values come in clusters.

The arithmetic is scikit-learn's and scipy's; `statistics.py` has the rest. What the WriteSAE paper (arXiv:2605.12770,
appendix G) reads off a BIC has a sign that is easily turned round: here a LOWER BIC is better, everywhere, and a difference
BIC(2) - BIC(1) below zero favours two components.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from sklearn.mixture import GaussianMixture

from writesae.evaluation.statistics import (
    Interval,
    Numbers,
    _check_choice,
    _check_confidence,
    _column,
    _draw_clusters,
    _pairs,
    cluster_bootstrap,
)


@dataclass(frozen=True)
class Mixture:
    """A one-dimensional Gaussian mixture, its components by rising mean."""

    bic: float
    """Bayesian information criterion, (3n - 1) log(number of values) - 2 log likelihood: LOWER IS BETTER."""
    weights: tuple[float, ...]
    """Share of every component; they add up to 1."""
    means: tuple[float, ...]
    """Their means, rising."""
    deviations: tuple[float, ...]
    """Their standard deviations."""

    @property
    def n_components(self) -> int:
        """How many Gaussians there are."""
        return len(self.means)

    def densities(self, values: Numbers) -> np.ndarray:
        """Weighted density of every component at every value: [component, value]."""
        at = np.asarray(values, dtype=np.float64)[None]
        weights, means, deviations = (np.asarray(side)[:, None] for side in (self.weights, self.means, self.deviations))
        return weights * stats.norm.pdf(at, means, deviations)

    def upper(self, values: Numbers) -> np.ndarray:
        """Which values belong to the component of the highest mean: that is the likeliest one, and not from its far side.

        A wide component is also the likeliest one beyond a narrow one's other end; a value below the lowest mean is never
        counted to the highest, so that the groups are cut at one point.
        """
        column = np.asarray(values, dtype=np.float64)
        return (self.densities(column).argmax(0) == self.n_components - 1) & (column > self.means[0])


@dataclass(frozen=True)
class Separation:
    """How far two groups' distributions lie apart."""

    statistic: float
    """Kolmogorov and Smirnov's: the largest difference of the two distribution functions."""
    low: float
    """Lower bound, by redrawing the clusters of each group. The statistic of a resample tends to lie above the estimate."""
    high: float
    """Upper bound."""
    p_value: float
    """Share of the reassignments of whole clusters to the groups whose statistic is as large, counting the data itself."""
    p_naive: float
    """Scipy's p-value, which takes every value for independent."""
    clusters: tuple[int, int]
    """Number of clusters in each group."""


def mixtures(values: Numbers, most: int = 4, seed: int = 0) -> list[Mixture]:
    """Gaussian mixtures of 1 to `most` components fitted to one column; no more than there are distinct values.

    Each is the best of ten starts of scikit-learn's EM. Raises `ValueError` for bad values and `most` below 1.
    """
    column = _column("values", values)
    if most < 1:
        raise ValueError(f"most must be at least 1 component, got {most}")
    return [_mixture(column, count, seed) for count in range(1, min(most, len(np.unique(column))) + 1)]


def _mixture(column: np.ndarray, count: int, seed: int) -> Mixture:
    # EM's floor on variances is absolute, so the values are brought to the same scale first.
    scale = float(column.std()) or 1.0
    scaled = ((column - column.mean()) / scale)[:, None]
    fit = GaussianMixture(count, n_init=10, random_state=seed, max_iter=500).fit(scaled)
    order = np.argsort(fit.means_[:, 0], kind="stable")
    return Mixture(
        # Back on the values' own scale every density is divided by it.
        float(fit.bic(scaled) + 2 * len(column) * np.log(scale)),
        tuple(fit.weights_[order].tolist()),
        tuple((fit.means_[order, 0] * scale + column.mean()).tolist()),
        tuple((np.sqrt(fit.covariances_[order, 0, 0]) * scale).tolist()),
    )


def best_mixture(fitted: Sequence[Mixture]) -> Mixture:
    """The one of the lowest BIC; of equal ones the smallest. Raises `ValueError` when there is none."""
    if not fitted:
        raise ValueError("there is no mixture to choose from")
    return min(fitted, key=lambda mixture: (mixture.bic, mixture.n_components))


def bimodality_coefficient(values: Numbers) -> float:
    """(skewness^2 + 1) / (excess kurtosis + 3 (n - 1)^2 / ((n - 2) (n - 3))), both corrected for bias, as SAS defines it.

    5/9 for a uniform distribution, 1/3 for a Gaussian, 1 for two points; above 5/9 hints at two modes. NaN for fewer than
    four values and for values that are all the same.
    """
    column = _column("values", values)
    n = len(column)
    if n < 4 or np.ptp(column) == 0:
        return float("nan")
    skewness, kurtosis = stats.skew(column, bias=False), stats.kurtosis(column, bias=False)
    return float((skewness**2 + 1) / (kurtosis + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3))))


def ks_clustered(
    first: Numbers,
    second: Numbers,
    first_clusters: Numbers,
    second_clusters: Numbers,
    n_resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Separation:
    """Kolmogorov and Smirnov's two-sample statistic where values come in clusters (the firings of an atom).

    The interval redraws whole clusters within each group; the p-value hands whole clusters out to the groups anew, as many
    to each as it has. A cluster belongs to one group: labels that both columns use mean different clusters.

    Raises `ValueError` for bad values, labels that do not fit, and a group of fewer than two clusters.
    """
    _check_confidence(confidence)
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
    groups = [_parts("first", first, first_clusters), _parts("second", second, second_clusters)]
    sizes = (len(groups[0]), len(groups[1]))
    observed = stats.ks_2samp(np.concatenate(groups[0]), np.concatenate(groups[1]), method="asymp")
    drawn = [_draw_clusters(size, n_resamples, seed + side) for side, size in enumerate(sizes)]
    resampled = [_ks(_repeated(groups[0], one), _repeated(groups[1], other)) for one, other in zip(*drawn, strict=True)]
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    together, generator = groups[0] + groups[1], np.random.default_rng(seed)
    orders = [generator.permutation(len(together)) for _ in range(n_resamples)]
    null = [_ks([together[i] for i in order[: sizes[0]]], [together[i] for i in order[sizes[0] :]]) for order in orders]
    as_large = sum(value >= observed.statistic - 1e-12 for value in null)
    p_value = float((1 + as_large) / (1 + n_resamples))
    return Separation(float(observed.statistic), float(low), float(high), p_value, float(observed.pvalue), sizes)


def _parts(name: str, values: Numbers, clusters: Numbers) -> list[np.ndarray]:
    """The values of every cluster."""
    column, labels = _column(name, values), np.asarray(clusters)
    if labels.shape != column.shape:
        raise ValueError(
            f"{name} has {len(column)} values but its clusters have shape {labels.shape}; give one label each"
        )
    names, member = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"{name} has only one cluster ({names[0]!r}); resampling needs at least two")
    order = np.argsort(member, kind="stable")
    return np.split(column[order], np.cumsum(np.bincount(member))[:-1])


def _repeated(parts: list[np.ndarray], times: np.ndarray) -> list[np.ndarray]:
    return [part for part, count in zip(parts, times, strict=True) for _ in range(count)]


def _ks(first: list[np.ndarray], second: list[np.ndarray]) -> float:
    """The statistic alone: scipy's also finds a p-value, which takes most of its time."""
    left, right = np.sort(np.concatenate(first)), np.sort(np.concatenate(second))
    at = np.concatenate([left, right])
    gap = np.searchsorted(left, at, "right") / len(left) - np.searchsorted(right, at, "right") / len(right)
    return float(np.abs(gap).max())


def correlation(
    first: Numbers,
    second: Numbers,
    clusters: Numbers,
    method: str = "pearson",
    n_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Pearson's or Spearman's correlation with a percentile interval over clusters of pairs.

    A resample in which a column is constant has no correlation and counts as 0.

    Raises `ValueError` for bad values, an unknown method, and a column that is constant as it came.
    """
    left, right = _pairs("first", first, "second", second)
    _check_choice("method", method, ("pearson", "spearman"))
    for name, column in (("first", left), ("second", right)):
        if np.ptp(column) == 0:
            raise ValueError(f"{name} is constant ({column[0]:g}), so it has no correlation with anything")
    found = stats.pearsonr if method == "pearson" else stats.spearmanr

    def of_rows(rows: np.ndarray) -> float:
        chosen = rows.astype(int)
        one, other = left[chosen], right[chosen]
        return 0.0 if np.ptp(one) == 0 or np.ptp(other) == 0 else float(found(one, other).statistic)

    return cluster_bootstrap(np.arange(len(left)), clusters, of_rows, n_resamples, seed, confidence)
