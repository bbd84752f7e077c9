"""Contexts: the firing token is marked, and tokens are shaded by activation."""

import pytest

from writesae.report.text import context_markup


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
