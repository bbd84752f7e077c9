"""R^2 against scikit-free arithmetic: what is fitted, over which rows, and redrawn passages."""

import numpy as np
import pandas as pd
import pytest

from writesae.evaluation.predicting.logit_shift_statistics import (
    estimates,
    fitted,
    r_squared,
    r_squared_interval,
    slope,
)


def rows(seed=0, n=120):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(
        {"context": np.arange(n) // 4, "passage": (10 * (np.arange(n) / n) ** 2).astype(int), "layer": 0, "head": 1}
    )
    table["atom"], table["size"], table["horizon"] = np.arange(n) % 3, "0.1", 0
    table["guess"], table["fraction"] = rng.normal(size=n) + 0.3, 0.1
    table["measured"] = table["guess"] * (1.0 + table["atom"]) + 0.1 * rng.normal(size=n)
    return table


def test_r_squared_by_hand():
    measured = np.array([1.0, 2.0, 3.0])
    assert r_squared(measured, np.array([1.0, 2.0, 4.0])) == pytest.approx(1 - 1 / 2)
    assert r_squared(measured, np.array([2.0, 2.0, 2.0])) == 0.0
    assert r_squared(measured, measured[::-1]) == pytest.approx(-3.0)
    assert np.isnan(r_squared(np.ones(2), np.ones(2))) and np.isnan(r_squared(np.ones(0), np.ones(0)))


def test_slope_is_least_squares_through_the_origin():
    table = rows()
    expected = np.linalg.lstsq(table[["guess"]].to_numpy(), table["measured"].to_numpy(), rcond=None)[0][0]
    assert slope(table["measured"], table["guess"]) == pytest.approx(expected)
    assert slope(np.ones(2), np.zeros(2)) == 0.0


def test_a_slope_per_group_is_that_of_its_rows():
    table = rows()
    made = fitted(table, "guess", ["atom"])
    for _, group in table.groupby("atom"):
        expected = group["guess"] * slope(group["measured"], group["guess"])
        assert np.allclose(made[group.index], expected)
    table["guess"] = 0.0
    assert (fitted(table, "guess", ["atom"]) == 0).all()


def test_the_more_is_fitted_the_better_it_fits():
    found = estimates(rows(), "guess", n_resamples=100)
    order = [found[name] for name in ("r2", "r2_pooled_slope", "r2_slope_per_atom", "r2_slope_per_context")]
    assert order == sorted(order) and order[2] > 0.99 > order[1] > order[0]
    assert (found["n"], found["n_contexts"], found["n_passages"]) == (120, 30, 10)


def test_rows_without_a_prediction_are_left_out():
    table = rows()
    kept = table.iloc[24:]
    table.loc[:23, "guess"] = np.nan
    one, other = (estimates(given, "guess", n_resamples=50) for given in (table, kept))
    assert one == other
    nothing = estimates(table.iloc[:24], "guess", n_resamples=50)
    assert nothing["n"] == 0 and np.isnan(nothing["r2"]) and np.isnan(nothing["r2_by_passage"]).all()


def test_the_interval_is_that_of_redrawn_passages():
    """Against redrawing rows outright with the same draws."""
    table = rows()
    low, high = r_squared_interval(table["measured"], table["guess"], table["passage"], n_resamples=60, seed=3)
    draws = np.random.default_rng(3).multinomial(10, np.full(10, 0.1), size=60)
    values = []
    for times in draws:
        drawn = pd.concat([table[table["passage"] == p] for p, n in enumerate(times) for _ in range(n)])
        values.append(r_squared(drawn["measured"], drawn["guess"]))
    assert (low, high) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])))
    assert low < r_squared(table["measured"], table["guess"]) < high


def test_the_interval_keeps_its_digits_far_from_zero():
    """A constant on both changes neither R^2 nor its interval."""
    table = rows()
    near = r_squared_interval(table["measured"], table["guess"], table["passage"], 50)
    far = r_squared_interval(table["measured"] + 1e6, table["guess"] + 1e6, table["passage"], 50)
    assert far == pytest.approx(near, rel=1e-6)


def test_signs_and_sizes():
    table = rows().assign(measured=[1.0, -2.0] * 60, guess=[0.5, 1.0] * 60)
    found = estimates(table, "guess", n_resamples=10)
    assert found["sign_agreement"] == 0.5 and found["shift"] == pytest.approx(np.sqrt(2.5))
