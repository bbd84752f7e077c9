"""Statistics against published values, brute force, and bad input."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from writesae.evaluation.statistics import (
    Interval,
    cliffs_delta,
    cluster_bootstrap,
    holm,
    median_mad,
    paired_dominance,
    paired_wilcoxon,
    permutation_test_paired,
    wilson_interval,
    win_rate,
)

few_numbers = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=12)


def test_wilson_gives_the_papers_interval():
    """4,481 of 4,851 firings: the paper prints 92.4% [91.6, 93.1]."""
    interval = wilson_interval(4481, 4851)
    assert round(100 * interval.estimate, 1) == 92.4
    assert (round(100 * interval.low, 1), round(100 * interval.high, 1)) == (91.6, 93.1)


@pytest.mark.parametrize(("successes", "total"), [(0, 10), (10, 10), (3, 7), (81, 263)])
def test_wilson_bounds_solve_the_score_equation(successes, total):
    interval = wilson_interval(successes, total, confidence=0.9)
    z = stats.norm.ppf(0.95)
    for bound in (interval.low, interval.high):
        assert abs(interval.estimate - bound) == pytest.approx(z * np.sqrt(bound * (1 - bound) / total), abs=1e-12)
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1
    assert interval.confidence == 0.9


def test_win_rate_counts_ties_as_losses():
    assert win_rate([1, 2, 3, 4], [2, 2, 1, 5]) == wilson_interval(2, 4)


def one_by_one(values, clusters, statistic, n_resamples, seed, confidence=0.95):
    """The bootstrap as its definition reads, one resample at a time, from the same draws."""
    names = np.unique(clusters)
    rng = np.random.default_rng(seed)
    found = []
    for times in rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=n_resamples):
        pooled = [values[clusters == name] for name, count in zip(names, times, strict=True) for _ in range(count)]
        found.append(statistic(np.concatenate(pooled)))
    tail = (1 - confidence) / 2
    return np.quantile(found, tail), np.quantile(found, 1 - tail)


@pytest.mark.parametrize("statistic", ["mean", "median", np.std])
@pytest.mark.parametrize("seed", [0, 1])
def test_cluster_bootstrap_is_its_definition(statistic, seed):
    rng = np.random.default_rng(10 + seed)
    clusters = rng.choice(np.array(["a", "b", "c", "d", "e"]), size=41)
    values = rng.normal(size=41).round(1)  # ties on purpose
    plain = {"mean": np.mean, "median": np.median}.get(statistic, statistic)
    interval = cluster_bootstrap(values, clusters, statistic, n_resamples=300, seed=seed)
    low, high = one_by_one(values, clusters, plain, 300, seed)
    assert interval.estimate == pytest.approx(plain(values), abs=1e-12)
    assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))


def test_median_in_blocks_equals_median_at_once(monkeypatch):
    import writesae.evaluation.statistics as module

    values, clusters = np.random.default_rng(0).normal(size=50), np.arange(50) % 7
    at_once = cluster_bootstrap(values, clusters, "median", n_resamples=100)
    monkeypatch.setattr(module, "_DRAWS_AT_ONCE", 120)
    assert cluster_bootstrap(values, clusters, "median", n_resamples=100) == at_once


def test_cluster_bootstrap_covers_the_truth_where_wilson_does_not():
    """Ten firings of one atom that always agree carry the information of one, and only the bootstrap knows."""
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(40), 10)
    covered = {"bootstrap": 0, "Wilson": 0}
    for seed in range(100):
        wins = np.repeat(rng.random(40) < 0.6, 10).astype(float)
        for name, interval in (
            ("bootstrap", cluster_bootstrap(wins, clusters, n_resamples=400, seed=seed)),
            ("Wilson", wilson_interval(int(wins.sum()), 400)),
        ):
            covered[name] += interval.low <= 0.6 <= interval.high
    assert covered["bootstrap"] >= 85
    assert covered["Wilson"] <= 65


def test_cluster_bootstrap_repeats_with_its_seed_and_ignores_row_order():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"win": rng.integers(0, 2, 60).astype(float), "atom": rng.integers(0, 9, 60)})
    first = cluster_bootstrap(frame["win"], frame["atom"], seed=4)
    turned = frame.iloc[::-1]
    again = cluster_bootstrap(turned["win"], turned["atom"], seed=4)
    assert (first.estimate, first.low, first.high) == pytest.approx((again.estimate, again.low, again.high), abs=1e-12)
    assert cluster_bootstrap(frame["win"], frame["atom"], seed=5) != first


def test_median_mad_by_hand():
    spread = median_mad([1, 1, 2, 2, 4, 6, 9])
    assert (spread.median, spread.mad, spread.n) == (2.0, 1.0, 7)
    assert spread.error == pytest.approx(1 / np.sqrt(7))


def test_wilcoxon_exact_by_enumeration():
    first, second = np.array([1.0, 5.0, 2.0, 8.0, 3.5]), np.array([2.0, 3.0, 6.0, 3.0, 0.5])
    ranks = stats.rankdata(abs(first - second))
    observed = ranks[first > second].sum()
    sums = [ranks[list(signs)].sum() for size in range(6) for signs in itertools.combinations(range(5), size)]
    share = np.mean(np.array(sums) <= observed)
    result = paired_wilcoxon(first, second, alternative="less")
    assert result.p_value == pytest.approx(share)
    assert result.n == 5


def test_wilcoxon_without_any_difference_has_p_one():
    assert paired_wilcoxon([1, 2], [1, 2]).p_value == 1.0
    assert permutation_test_paired([1, 2], [1, 2]).p_value == 1.0


def test_paired_dominance_is_the_papers_number():
    wins = 0.9125
    lower, higher = np.zeros(10_000), np.where(np.arange(10_000) < 10_000 * wins, 1.0, -1.0)
    assert paired_dominance(lower, higher) == pytest.approx(0.825)


@given(few_numbers, few_numbers)
def test_cliffs_delta_by_all_pairs(first, second):
    pairs = [(a > b) - (a < b) for a in first for b in second]
    assert cliffs_delta(first, second) == pytest.approx(np.mean(pairs), abs=1e-12)


def test_dominance_and_cliffs_delta_are_different_things():
    lower, higher = np.arange(100.0), np.arange(100.0) + 0.5
    assert paired_dominance(lower, higher) == 1.0
    assert abs(cliffs_delta(higher, lower)) < 0.05


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize(
    ("statistic", "measure"),
    [("mean", np.mean), ("median", np.median), ("sign", lambda difference: np.mean(np.sign(difference)))],
)
def test_permutation_exact_by_all_flips(statistic, measure):
    first, second = np.array([1.0, 2.5, 0.5, 3.0, 1.5, 0.0]), np.array([1.25, 4.0, 1.0, 3.5, 1.0, 2.0])
    difference = first - second
    flipped = [measure(difference * np.array(signs)) for signs in itertools.product((1, -1), repeat=6)]
    result = permutation_test_paired(first, second, statistic=statistic, alternative="less")
    assert result.statistic == pytest.approx(measure(difference))
    assert result.p_value == pytest.approx(np.mean(np.array(flipped) <= measure(difference) + 1e-12))


def test_permutation_by_draws_never_reports_zero_and_repeats():
    rng = np.random.default_rng(0)
    first = rng.random(200)
    result = permutation_test_paired(first, first + 0.1, n_resamples=999, seed=1)
    assert result.p_value == pytest.approx(2 / 1000)
    assert result == permutation_test_paired(first, first + 0.1, n_resamples=999, seed=1)


def test_permutation_holds_its_level_when_labels_mean_nothing():
    rng = np.random.default_rng(0)
    pairs = rng.lognormal(size=(200, 2, 30))
    small = sum(permutation_test_paired(a, b, n_resamples=199, seed=0).p_value <= 0.1 for a, b in pairs)
    assert 8 <= small <= 34  # 20 expected, standard deviation 4.2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: wilson_interval(0, 0), "total is 0"),
        (lambda: wilson_interval(5, 4), "successes must lie in 0..4, got 5"),
        (lambda: wilson_interval(1, 2, confidence=95.0), "0.95 means 95%"),
        (lambda: win_rate([], []), "lower is empty"),
        (lambda: win_rate([1.0], [1.0, 2.0]), "lower has 1 values but higher has 2"),
        (lambda: median_mad([1.0, float("nan"), 2.0]), "1 values that are not finite .*index 1"),
        (lambda: median_mad([float("inf")]), "not finite"),
        (lambda: median_mad(np.zeros((2, 2))), r"shape \(2, 2\)"),
        (lambda: cluster_bootstrap([], []), "values is empty"),
        (lambda: cluster_bootstrap([1.0, 2.0], ["a"]), "values has 2 entries"),
        (lambda: cluster_bootstrap([1.0, 2.0], ["a", "a"]), "only one label"),
        (lambda: cluster_bootstrap([1.0, 2.0], ["a", None]), "missing labels"),
        (lambda: cluster_bootstrap([1.0, 2.0], [0, 1], "mode"), "mean, median, got 'mode'"),
        (lambda: cluster_bootstrap([1.0, 2.0], [0, 1], n_resamples=0), "n_resamples"),
        (lambda: paired_wilcoxon([1.0], [2.0], "lower"), "two-sided, less, greater"),
        (lambda: paired_dominance([1.0, 2.0], [1.0]), "paired statistic"),
        (lambda: cliffs_delta([1.0], []), "second is empty"),
        (lambda: holm([0.5, 1.5]), r"\[0, 1\]"),
        (lambda: permutation_test_paired([1.0], [2.0], statistic="max"), "mean, median, sign"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_interval_is_plain_and_frozen():
    interval = wilson_interval(np.int64(3), np.int64(4))
    assert [type(value) for value in (interval.estimate, interval.low, interval.high)] == [float] * 3
    with pytest.raises(AttributeError):
        interval.low = 0.0
    assert isinstance(interval, Interval)
