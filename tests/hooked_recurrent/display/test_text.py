"""Hostile and invisible text becomes something to look at, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooked_recurrent.display.text import picture, plain, visible
from tests.hooked_recurrent.display.reading import Reader

anything = st.text(st.characters(exclude_categories=()), max_size=40)


@given(anything)
def test_any_text_stays_text(text):
    reader = Reader(visible(text))
    assert set(reader.tags) <= {"i"}
    assert {name for name, _ in reader.attributes} <= {"class", "title"}
    shown = text.replace("\n", "↵\n").replace("\t", "⇥")
    kept = "".join(character for character in shown if character == "\n" or picture(character) is None)
    remaining = iter(reader.text)
    assert all(character in remaining for character in kept), "what can be seen is shown, in order"
    hidden = [character for character in reader.text if picture(character) and character not in "\n\u200d"]
    assert hidden == []


@given(anything)
def test_plain_is_encodable_and_on_one_line(text):
    line = plain(text)
    line.encode("utf-8")
    assert "\n" not in line and "\x00" not in line


@pytest.mark.parametrize(
    ("character", "shown"),
    [
        ("\x00", "␀"),
        ("\x1b", "␛"),
        ("\x7f", "␡"),
        ("\x85", "U+0085"),
        ("\u202e", "U+202E"),
        ("\ufeff", "U+FEFF"),
        ("\ud800", "U+D800"),
        ("\u2028", "U+2028"),
        ("a", None),
        ("ש", None),
        ("\ufffd", None),
        ("🎉", None),
    ],
)
def test_what_stands_for_an_unseen_character(character, shown):
    assert picture(character) == shown


def test_whitespace_shows():
    markup = visible(" \n\t")
    assert '<i class="sp"> </i>' in markup
    assert '<i class="nl">↵</i>\n' in markup
    assert "⇥" in markup


def test_a_joiner_holds_emoji_together_and_is_shown_elsewhere():
    assert "👩\u200d👧" in visible("👩\u200d👧")
    assert "U+200D" in visible("a\u200db")
