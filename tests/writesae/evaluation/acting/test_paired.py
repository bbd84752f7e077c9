"""Changes in numbers: intervals and p-values that count passages, and Holm's adjustment."""

import numpy as np
import pandas as pd
import pytest

from writesae.evaluation.acting.paired import change, passage_p, with_holm
from writesae.evaluation.statistics import interval


def test_rows_without_a_p_value_are_left_out_of_the_family():
    rows = with_holm([{"p_passages": 0.02}, {"p_passages": float("nan")}, {"p_passages": 0.5}])
    assert [row["p_holm"] for row in rows[::2]] == pytest.approx([0.04, 0.5]) and np.isnan(rows[1]["p_holm"])
    assert with_holm([]) == []


def test_copies_of_a_passage_add_nothing():
    """Twenty rows of each of four passages: certain by rows, undecided by passages, with the passages' wide interval."""
    values, passages = np.repeat([1.0, 0.2, 0.6, 0.4], 20), np.repeat([0, 1, 2, 3], 20)
    told = change(pd.Series(values), pd.Series(passages), 500)
    assert (told["n"], told["n_passages"], told["median"], told["mean"]) == (80, 4, 0.5, pytest.approx(0.55))
    assert told["p_rows"] < 1e-10 and told["p_passages"] == pytest.approx(0.125)
    once = interval([1.0, 0.2, 0.6, 0.4], np.arange(4), n_resamples=500)
    assert told["mean_interval"] == pytest.approx(once) and once[1] - once[0] > 0.3
    assert told["median_interval"][0] < 0.5 < told["median_interval"][1]


def test_one_passage_gives_no_interval():
    assert np.isnan(interval([1.0, 2.0], [3, 3])).all() and np.isnan(passage_p([1.0, 2.0], [3, 3]))
    assert np.isnan(change(pd.Series([1.0]), pd.Series([0]))["p_rows"])
