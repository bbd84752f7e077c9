"""Cards and tables: the numbers as they are, columns in order, nothing unescaped."""

import re

import pytest

from hooked_recurrent.display import stack, tokens_html
from hooked_recurrent.display.html import card, cell, details, table
from tests.hooked_recurrent.display.reading import Reader, table_of


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ""),
        (True, "True"),
        (12345, "12,345"),
        (0.123456, "0.1235"),
        (-1e-9, "-1e-09"),
        ("a\tb\n", 'a<i class="tab">⇥</i>b<i class="nl">↵</i>'),
        ("<b>", "&lt;b&gt;"),
        ([0.25, 1], "0.25, 1"),
        ({"low<": 0.5}, "low&lt; 0.5"),
    ],
)
def test_what_a_cell_shows(value, shown):
    assert str(cell(value)) == shown


def test_columns_are_the_names_that_occur_and_numbers_stand_right():
    markup = table([{"name": "a", "n": 1}, {"name": "b", "n": 2.5, "more": None}, {"n": 3}])
    assert table_of(markup) == [
        {"name": "a", "n": "1", "more": ""},
        {"name": "b", "n": "2.5", "more": ""},
        {"name": "", "n": "3", "more": ""},
    ]
    assert re.findall(r'<th class="hv-number">(\w+)', markup) == ["n", "more"]


def test_a_long_table_says_how_much_is_left_out():
    markup = table([{"n": index} for index in range(1500)], most=10)
    assert len(table_of(markup)) == 10 and "and 1,490 more rows" in Reader(markup).text
    assert "more rows" not in table([{"n": 1}], most=1)


def test_a_card_leaves_out_what_is_none_and_escapes_the_rest():
    reader = Reader(
        card("<i>", {"a<": "<script>", "gone": None}, [details("<u>", table([{"<s>": "<p>"}]))], note="\u202e")
    )
    assert all(text in reader.text for text in ("<i>", "a<", "<script>", "<u>", "<s>", "<p>", "U+202E"))
    assert "gone" not in reader.text and reader.tags.count("dt") == 1


def test_views_one_below_the_other():
    both = stack(tokens_html(["a"], [1.0]), tokens_html(["b"], [2.0]), title="<t>")
    assert str(both).index(">a</bdi>") < str(both).index(">b</bdi>") and "<t>" in Reader(str(both)).text
    assert (
        repr(both) == "Stack(2 views, first TokenView(1 tokens shaded by value))" and repr(stack()) == "Stack(0 views)"
    )
    with pytest.raises(TypeError, match="views with a _repr_html_, got int"):
        stack(tokens_html(["a"], [1.0]), 3)
