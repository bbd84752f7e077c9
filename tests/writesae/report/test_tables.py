"""The numbers that a page prints, against the same numbers found by hand."""

import numpy as np
import pandas as pd
import pytest

from writesae.evaluation.replacing.replacement import READINGS
from writesae.evaluation.replacing.replacement_result import ReplacementResult
from writesae.evaluation.replacing.substitutes import CONDITIONS
from writesae.evaluation.statistics import Interval, median_mad, wilson_interval
from writesae.report import tables

ATOM = "atom_listed_coef"


def test_headline_counts_only_its_reading(firings):
    head = tables.headline(firings, "in_recurrence", ATOM, "random_listed_coef")
    rows = firings[firings["reading"] == "in_recurrence"]
    wins = int((rows["kl_atom_listed_coef"] < rows["kl_delete"]).sum())
    assert head.win == wilson_interval(wins, len(rows))
    assert head.n == len(rows) == 48
    assert head.by_atom.estimate == pytest.approx(head.win.estimate)
    assert "6 clusters" in head.by_atom.method and "8 clusters" in head.by_passage.method
    assert head.medians["delete"] == median_mad(rows["kl_delete"])
    assert list(head.medians) == [ATOM, "delete", "random_listed_coef", "native"]


def test_headline_without_clusters_or_control(firings):
    rows = firings[firings["atom"] == 10].drop(columns=["passage", "kl_native"])
    head = tables.headline(rows, "cache", ATOM, None)
    assert head.by_atom is None and head.by_passage is None
    assert list(head.medians) == [ATOM, "delete"]


def test_conditions_keep_a_known_order_and_new_ones_are_not_lost(firings):
    assert tables.conditions_of(firings) == [
        "native",
        "atom_listed_coef",
        "atom_dominant_coef",
        "delete",
        "random_listed_coef",
        "something_new",
    ]
    assert tables.readings_of(firings) == ["in_recurrence", "cache"]


def test_conditions_table_shows_gaps_as_gaps(firings):
    table = {row["name"]: row for row in tables.conditions_table(firings)}
    not_run, run = table["atom_dominant_coef"]["cells"]
    assert (not_run["n"], not_run["median"], not_run["closer"]) == (0, None, None)
    assert run["n"] == 48
    assert table["delete"]["cells"][0]["closer"] is None
    assert table["something_new"]["words"] == "something new"
    assert table["something_new"]["cells"][0]["closer"].estimate == 0.0, "ties with deletion are no wins"


def test_wins_by_atom(firings):
    wins = tables.wins_by_atom(firings, "cache", ATOM)
    assert list(wins["atom"]) == [0, 10, 20, 30, 40, 50]
    assert set(wins["total"]) == {8}
    rows = firings[(firings["reading"] == "cache") & (firings["atom"] == 30)]
    assert wins.set_index("atom").loc[30, "wins"] == (rows["kl_atom_listed_coef"] < rows["kl_delete"]).sum()


def test_ratios_leave_out_zeros():
    frame = pd.DataFrame(
        {"atom": 1, "reading": "cache", "kl_a": [1.0, 0.0, 2.0], "kl_delete": [2.0, 1.0, 0.0], "kl_c": [0.0, 0.0, 0.0]}
    )
    ratios = tables.kl_ratios(frame, "cache", "a", ["delete", "c"])
    assert list(ratios) == ["delete"]
    assert ratios["delete"].tolist() == [2.0]


def test_rows_of_a_replacement_result_are_named_in_words():
    row = {"reading": "cache", "pool": "dominant", "scale": "norm", "n": 20, "win_rate": 0.5, "wilson": [0.3, 0.7]}
    row |= {"by_atom": [0.2, 0.8], "by_passage": [0.1, 0.9], "win_rate_vs_random": 0.95, "strict_chain": 0.45}
    row |= {"median_ratio_delete_to_atom": 1.5, "wilcoxon_p": 0.01, "more": "is left out"}
    ((name, cells),) = tables.replacement_rows([row]).items()
    assert name == "at the next token: strongest atom, write's norm"
    shown = {column: tables.cell_text(column, value) for column, value in cells.items()}
    assert shown["closer than deletion"] == "50.0% [30.0, 70.0]"
    assert shown["over atoms"] == "[20.0, 80.0]"
    assert shown["atom < deletion < random"] == "45.0%"
    assert (shown["median deletion ÷ atom"], shown["Wilcoxon p"]) == ("1.50", "0.0100")


def test_a_real_result_is_taken_as_it_is():
    """Ties the names of conditions and of summary columns to the module that measures them."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({f"kl_{name}": rng.random(12) for name in CONDITIONS})
    frame = frame.assign(
        reading="in_recurrence", atom=np.arange(12) % 3, dominant=np.arange(12) % 2, passage=np.arange(12) % 4
    )
    assert set(tables.CONDITIONS) == set(tables.SHORT_CONDITIONS) == set(CONDITIONS)
    assert set(tables.READINGS) == set(READINGS)
    rows = tables.replacement_rows(ReplacementResult(frame, layer=0, head=0, config={}).summary(n_resamples=20))
    assert list(rows)[0] == "at the firing token: listed atom"
    assert len(rows) == 6


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0312, "0.0312"),
        (1240.4, "1,240"),
        (3.14e-5, "3.1×10⁻⁵"),
        (9.996, "10.0"),
        (1e-3, "0.00100"),
        (0, "0"),
        (-2.5, "−2.50"),
        (float("nan"), "–"),
        (float("inf"), "∞"),
        (1.2e7, "1.2×10⁷"),
    ],
)
def test_numbers_read_well(value, shown):
    assert tables.number(value) == shown


@pytest.mark.parametrize(
    ("column", "value", "shown"),
    [
        ("win_rate", 0.8421, "84.2%"),
        ("win_rate", Interval(0.5, 0.25, 0.75, "by hand"), "50.0% [25.0, 75.0]"),
        ("win_rate", {"estimate": 0.5, "low": 0.25, "high": 0.75}, "50.0% [25.0, 75.0]"),
        ("median_kl", median_mad([1.0, 2.0, 3.0, 4.0]), "2.50 ± 0.50"),
        ("firings", 4851, "4,851"),
        ("firings", np.int64(12), "12"),
        ("p", 1e-30, "1.0×10⁻³⁰"),
        ("ok", True, "yes"),
        ("seeds", (1, 2), "1, 2"),
        ("missing", None, "–"),
        ("note", "words", "words"),
    ],
)
def test_cells_read_well(column, value, shown):
    assert tables.cell_text(column, value) == shown


def test_missing_columns_are_named_with_the_nearest(firings):
    with pytest.raises(ValueError, match="no column 'kl_atom_listed_coeff'; the nearest is 'kl_atom_listed_coef'"):
        tables.check_firings(firings, "atom_listed_coeff")
    with pytest.raises(ValueError, match="empty"):
        tables.check_firings(firings.iloc[:0], ATOM)
    with pytest.raises(ValueError, match="no firing has both"):
        tables.headline(firings, "in_recurrence", "atom_dominant_coef", None)
