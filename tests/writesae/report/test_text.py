"""Hostile and invisible text becomes something to look at, and nothing else."""

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from writesae.report.text import context_markup, picture, plain, visible


class Reader(HTMLParser):
    """Collects tags and text the way a browser's parser would see them."""

    def __init__(self, markup: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


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


def test_context_marks_the_firing_token_and_shades_by_activation():
    context = {"tokens": ["a", "<b>", "c"], "weights": [0.0, 2.0, 1.0], "firing_index": 1}
    markup = context_markup(context, largest=4.0)
    assert markup.startswith("<bdi>a</bdi><mark>")
    assert '<mark><bdi style="--a:0.50" title="2">&lt;b&gt;</bdi></mark>' in markup
    assert '<bdi style="--a:0.25" title="1">c</bdi>' in markup


def test_a_frame_does_not_reach_into_the_next_line():
    markup = context_markup({"tokens": ["x\n", "y"], "weights": [1.0, 0.0], "firing_index": 0}, largest=1.0)
    assert '<i class="nl">↵</i></bdi></mark>\n<bdi>y' in markup


def test_silent_contexts_have_no_shade():
    markup = context_markup({"tokens": ["x"], "weights": [0.0], "firing_index": 0}, largest=0.0)
    assert markup == "<mark><bdi>x</bdi></mark>"


@pytest.mark.parametrize(
    ("change", "words"),
    [({"weights": [1.0]}, "2 tokens but 1 weights"), ({"firing_index": 2}, "firing_index is 2")],
)
def test_contexts_that_do_not_fit_are_refused(change, words):
    context = {"tokens": ["a", "b"], "weights": [1.0, 2.0], "firing_index": 0}
    with pytest.raises(ValueError, match=words):
        context_markup({**context, **change}, largest=1.0)
