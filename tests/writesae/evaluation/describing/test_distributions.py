"""Mixtures, bimodality and clustered comparisons against planted distributions and definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from writesae.evaluation.describing.distributions import (
    best_mixture,
    bimodality_coefficient,
    correlation,
    ks_clustered,
    mixtures,
)


def planted(means, deviation=0.02, each=150, seed=0):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(mean, deviation, each) for mean in means])


@pytest.mark.parametrize("means", [(0.2,), (0.0, 0.3), (-0.2, 0.1, 0.4)])
def test_the_lowest_bic_finds_the_planted_number_of_groups(means):
    fitted = mixtures(planted(means))
    assert [fit.n_components for fit in fitted] == [1, 2, 3, 4]
    chosen = best_mixture(fitted)
    assert chosen.n_components == len(means)
    assert chosen.means == pytest.approx(means, abs=0.01)
    assert chosen.deviations == pytest.approx((0.02,) * len(means), rel=0.3)
    assert sum(chosen.weights) == pytest.approx(1)


def test_bic_is_the_definition_on_the_values_own_scale():
    values = planted((0.0, 0.3))
    one, two = mixtures(values, most=2)
    for fit, parameters in ((one, 2), (two, 5)):
        likelihood = np.log(fit.densities(values).sum(0)).sum()
        assert fit.bic == pytest.approx(parameters * np.log(len(values)) - 2 * likelihood, rel=1e-4)
    assert two.bic < one.bic  # two groups were planted, and lower is better


def test_upper_is_cut_at_one_point_even_where_a_wide_component_surrounds_a_narrow_one():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0.0, 0.005, 100), rng.normal(0.3, 0.2, 200)])
    upper = mixtures(values, most=2)[1].upper(np.linspace(-0.5, 1, 400))
    assert not upper[0] and upper[-1]
    assert (np.diff(upper.astype(int)) >= 0).all()


def test_no_more_components_than_distinct_values():
    assert len(mixtures([0.1, 0.1, 0.4])) == 2
    assert len(mixtures([0.1, 0.1])) == 1
    with pytest.raises(ValueError, match="at least 1"):
        mixtures([0.1], most=0)
    with pytest.raises(ValueError, match="no mixture"):
        best_mixture([])


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 100), st.floats(-10, 10))
def test_bimodality_does_not_depend_on_scale_or_place(scale, shift):
    values = planted((0.0, 1.0), each=20)
    assert bimodality_coefficient(values * scale + shift) == pytest.approx(bimodality_coefficient(values), rel=1e-6)


def test_bimodality_of_known_shapes():
    rng = np.random.default_rng(0)
    assert bimodality_coefficient(rng.normal(size=200_000)) == pytest.approx(1 / 3, abs=0.01)
    assert bimodality_coefficient(rng.uniform(size=200_000)) == pytest.approx(5 / 9, abs=0.01)
    assert bimodality_coefficient([0, 1] * 5000) == pytest.approx(1, abs=0.01)
    assert np.isnan(bimodality_coefficient([1, 1, 1, 1, 1])) and np.isnan(bimodality_coefficient([1, 2, 3]))


def clustered(n_clusters, size, shift=0.0, seed=0):
    """Values that differ between clusters far more than inside them."""
    rng = np.random.default_rng(seed)
    values = rng.normal(shift, 1, n_clusters)[:, None] + rng.normal(0, 0.05, (n_clusters, size))
    return values.ravel(), np.repeat(np.arange(n_clusters), size)


def test_ks_statistic_is_scipys_and_clusters_take_away_false_certainty():
    first, second = clustered(8, 50, seed=1), clustered(8, 50, seed=2)
    apart = ks_clustered(first[0], second[0], first[1], second[1], n_resamples=300)
    assert apart.statistic == pytest.approx(stats.ks_2samp(first[0], second[0]).statistic)
    assert apart.p_naive < 1e-3 < 0.05 < apart.p_value  # the same distribution, eight clusters of each
    assert apart.low <= apart.high and apart.clusters == (8, 8)
    far = clustered(8, 50, shift=6.0, seed=3)
    assert ks_clustered(first[0], far[0], first[1], far[1], n_resamples=300).p_value < 0.01


def test_ks_of_one_value_per_cluster_is_a_permutation_test():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=30), rng.normal(0.4, 1, 30)
    labels = np.arange(30)
    ours = ks_clustered(one, other, labels, labels, n_resamples=1000)
    assert ours.p_value == pytest.approx(ours.p_naive, abs=0.06)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.integers(2, 6), st.integers(0, 100))
def test_ks_is_symmetric_and_blind_to_order(n_first, n_second, seed):
    rng = np.random.default_rng(seed)
    first, of_first = rng.integers(0, 4, 3 * n_first).astype(float), np.repeat(np.arange(n_first), 3)
    second, of_second = rng.integers(0, 4, 3 * n_second).astype(float), np.repeat(np.arange(n_second), 3)
    one = ks_clustered(first, second, of_first, of_second, n_resamples=5)
    assert ks_clustered(second, first, of_second, of_first, n_resamples=5).statistic == pytest.approx(one.statistic)
    order = rng.permutation(len(first))
    again = ks_clustered(first[order], second, of_first[order], of_second, n_resamples=5)
    assert (again.statistic, again.low, again.high, again.p_value) == (one.statistic, one.low, one.high, one.p_value)
    assert one.statistic == pytest.approx(stats.ks_2samp(first, second, method="asymp").statistic)


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_correlation_is_scipys_with_an_interval_as_wide_as_the_clusters(method):
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=10), 30)
    y = np.repeat(rng.normal(size=10), 30)
    by_row = correlation(x, y, np.arange(300), method, n_resamples=200)
    by_cluster = correlation(x, y, np.repeat(np.arange(10), 30), method, n_resamples=200)
    expected = (stats.pearsonr if method == "pearson" else stats.spearmanr)(x, y).statistic
    assert by_row.estimate == by_cluster.estimate == pytest.approx(expected)
    assert by_cluster.high - by_cluster.low > 2 * (by_row.high - by_row.low)
    cubed = correlation(x + 1e-3 * rng.normal(size=300), x**3, np.arange(300), method, n_resamples=50)
    assert (cubed.estimate > 0.99) == (method == "spearman")


def test_bad_input_is_refused():
    for wrong, words in (
        (lambda: correlation([1, 1, 1], [1, 2, 3], [0, 1, 2]), "constant"),
        (lambda: correlation([1, 2], [1, 2], [0, 1], "kendall"), "pearson, spearman"),
        (lambda: ks_clustered([1, 2], [1, 2], [0, 0], [0, 1]), "one cluster"),
        (lambda: ks_clustered([1, 2], [1, 2], [0], [0, 1]), "one label each"),
        (lambda: ks_clustered([1, 2], [1, 2], [0, 1], [0, 1], n_resamples=0), "at least 1"),
        (lambda: mixtures([]), "empty"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
