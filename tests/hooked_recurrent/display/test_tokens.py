"""Shaded texts: the shade is the number, a button shows its row, and hostile text stays text."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_recurrent.display import tokens_html
from hooked_recurrent.display.html import NEGATIVE, POSITIVE, STRONGEST
from hooked_recurrent.display.text import picture
from tests.hooked_recurrent.display.reading import Reader

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "\u202eabc",
    "שלום",
    "\x00\x1b[31m",
    "\n",
    "",
    "a\tb",
]
anything = st.lists(st.text(st.characters(exclude_categories=()), max_size=8), min_size=1, max_size=6)


def shades(view):
    """(hue, opacity) per token of the first row; None for one without a shade."""
    tokens = re.findall(r'<bdi( style="background:rgb\(([\d ]+) / ([\d.]+)\)")? title=', str(view))
    return [(hue, float(opacity)) if given else None for given, hue, opacity in tokens]


def test_the_shade_is_the_number_over_the_largest():
    assert shades(tokens_html(["a", "b", "c", "d"], [0.0, 2.0, -4.0, 1e-9])) == [
        None,
        (POSITIVE, STRONGEST / 2),
        (NEGATIVE, STRONGEST),
        None,
    ]


def test_a_scale_of_ones_own_is_kept_and_what_lies_above_is_full():
    assert shades(tokens_html(["a", "b"], [1.0, 9.0], scale=4.0)) == [(POSITIVE, STRONGEST / 4), (POSITIVE, STRONGEST)]


def test_what_is_no_number_has_no_shade_and_infinity_a_full_one():
    view = tokens_html(["a", "b", "c"], [float("nan"), float("inf"), 2.0])
    assert shades(view) == [None, (POSITIVE, STRONGEST), (POSITIVE, STRONGEST)]
    assert "position 0: nan" in Reader(str(view)).of("title")


def test_hover_says_position_and_value_and_the_mark_is_framed():
    view = tokens_html(["a", "b"], torch.tensor([0.25, -1.5], requires_grad=True), first=7, mark=1)
    assert Reader(str(view)).of("title") == ["position 7: 0.25", "position 8: -1.5"]
    assert re.search(r"<mark><bdi[^>]*>b</bdi></mark>", str(view)) and str(view).count("<mark>") == 1


@pytest.mark.parametrize(
    ("values", "ends"),
    [([0.0, 3.0], ("0", "3")), ([-3.0, -1.0], ("-3", "0")), ([-3.0, 1.0], ("-3", "3")), ([0.0, 0.0], ("0", "1"))],
)
def test_the_legend_has_the_ends_of_the_scale(values, ends):
    assert re.findall(r"<span>(.*?)</span>", str(tokens_html(["a", "b"], values))) == list(ends)


def test_rows_have_a_button_each_and_the_first_is_chosen():
    reader = Reader(
        str(tokens_html(["a", "b"], {"one": [1, 2], "<b>": np.array([3, 4]), "three": torch.tensor([5, 6])}))
    )
    assert reader.of("data-name") == ["one", "<b>", "three"] == reader.of("aria-label")
    assert reader.of("checked") == [None] and reader.tags.count("section") == 3
    assert [title.split(": ")[1] for title in reader.of("title")] == ["1", "2", "3", "4", "5", "6"]


def test_a_single_row_needs_no_button():
    assert "input" not in Reader(str(tokens_html(["a"], [1.0]))).tags


def test_a_batch_of_rows_is_named_by_number_or_by_names():
    assert Reader(str(tokens_html(["a"], torch.ones(2, 1)))).of("data-name") == ["row 0", "row 1"]
    assert Reader(str(tokens_html(["a"], torch.ones(2, 1), names=["x", "y"]))).of("data-name") == ["x", "y"]


def test_hostile_text_is_shown_and_runs_nothing():
    view = tokens_html(HOSTILE, {name: list(range(8)) for name in HOSTILE[:3]}, title=HOSTILE[0], mark=1)
    reader = Reader(str(view))
    assert set(reader.tags) <= {"div", "style", "form", "input", "section", "bdi", "mark", "i", "b", "span"}
    for shown in (*HOSTILE[:2], "U+202E", "שלום", "␀", "␛", "↵\n", "∅", "a⇥b"):
        assert shown in reader.text
    assert not set("\u202e\x00\x1b\t") & set(str(view))


@given(anything)
def test_any_text_stays_text(tokens):
    reader = Reader(str(tokens_html(tokens, np.linspace(-1, 1, len(tokens)), title=tokens[0])))
    assert [c for c in reader.text if picture(c) and c not in "\n\u200d"] == []
    assert len(reader.of("title")) >= len(tokens) and reader.tags.count("bdi") == len(tokens)


def test_a_very_long_token_is_cut():
    assert len(str(tokens_html(["x" * 100_000], [1.0]))) < 10_000


def test_line_ends_stand_outside_of_their_token():
    assert re.search(r'<bdi[^>]*>x<i class="nl">↵</i></bdi>\n<bdi', str(tokens_html(["x\n", "y"], [1.0, 2.0])))


def test_one_line_for_a_terminal():
    view = tokens_html(["a"] * 3, {f"atom {index}\n": [1, 2, 3] for index in range(6)})
    assert repr(view) == "TokenView(3 tokens shaded by atom 0␊, atom 1␊, atom 2␊, ... 6 in all)"


@pytest.mark.parametrize(
    ("values", "more", "error", "words"),
    [
        ([1.0], {}, ValueError, r"'value' has values of shape \(1,\), expected one number for each of 2 tokens"),
        ({"a": [1, 2], "b": [1]}, {}, ValueError, "'b' has values"),
        ([[1, 2], [3, 4]], {"names": ["x"]}, ValueError, "2 rows of values, but 1 different names"),
        ([[1, 2], [3, 4]], {"names": ["x", "x"]}, ValueError, "2 rows of values, but 1 different"),
        ({"a": [1, 2]}, {"names": ["x"]}, ValueError, "have their names already"),
        ({}, {}, ValueError, "no row of values"),
        ([1, 2], {"scale": 0.0}, ValueError, "must be above 0, got 0.0"),
        ([1, 2], {"mark": 2}, IndexError, "mark is token 2, but the text has 2"),
    ],
)
def test_what_does_not_fit_is_refused(values, more, error, words):
    with pytest.raises(error, match=words):
        tokens_html(["a", "b"], values, **more)
