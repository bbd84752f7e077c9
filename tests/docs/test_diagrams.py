"""The pictures of blocks: drawn from their data, with exactly the hooks of the model, each at a place of its own."""

from pathlib import Path

import pytest

from docs.diagrams.draw import Drawing
from docs.diagrams.make import HERE, pictures
from docs.diagrams.rules import PICTURES
from hooked_recurrent.mixers.registry import MIXERS
from tests.hooked_recurrent.models import tiny_model

CONCEPTS = Path(__file__).resolve().parents[2] / "docs" / "concepts"


def test_every_rule_has_a_picture_in_the_page():
    assert set(PICTURES) == set(MIXERS)
    page = (CONCEPTS / "hooks.md").read_text(encoding="utf-8")
    assert all(f"(../diagrams/{rule}.svg)" in page for rule in PICTURES)


@pytest.mark.parametrize("rule", PICTURES)
def test_a_picture_shows_the_hooks_of_the_model_and_no_other(rule):
    model, prefix = tiny_model((rule, rule)), "blocks.1."
    there = {name.removeprefix(prefix) for name in model.hook_dict if name.startswith(prefix)}
    inside = {name for name in there if name.startswith("mixer.norm.")}  # a norm inside a mixer is one box
    drawn = PICTURES[rule]().hooks()
    assert len(drawn) == len(set(drawn))
    assert set(drawn) == there - inside


@pytest.mark.parametrize("rule", PICTURES)
def test_nothing_covers_anything(rule):
    """Pills and boxes keep apart, lie in the picture, and every wire has two ends."""
    drawing = PICTURES[rule]()
    nodes = list(drawing.nodes.values())
    for index, a in enumerate(nodes):
        assert a.width / 2 <= a.x + 4 and a.x + a.width / 2 <= drawing.width and a.y + a.height / 2 <= drawing.height
        for b in nodes[:index]:
            apart = abs(a.x - b.x) >= (a.width + b.width) / 2 or abs(a.y - b.y) >= (a.height + b.height) / 2
            assert apart, (a.text, b.text)
    assert all({wire.source, wire.target} <= set(drawing.nodes) for wire in drawing.wires)


def test_the_committed_pictures_are_what_the_script_draws():
    assert {path.stem for path in HERE.glob("*.svg")} == set(pictures())
    for name, svg in pictures().items():
        assert (HERE / f"{name}.svg").read_text(encoding="utf-8") == svg, "run python -m docs.diagrams.make"


def test_text_in_a_picture_is_text():
    drawing = Drawing("a <b>", "c & d")
    drawing.box("one", 10, 10, "x < y")
    assert "<b>" not in drawing.svg() and "x &lt; y" in drawing.svg() and "c &amp; d" in drawing.svg()
