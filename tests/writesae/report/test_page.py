"""The page: whole, self-contained, and inert whatever text it is given."""

import os
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from writesae.report import page, write_report

VOID = {"meta", "br", "img", "link", "input", "hr", "col", "wbr"}
# Attributes that load or run something when they hold an address or code.
LOADING = {"src", "srcset", "data", "poster", "action", "formaction", "background", "href", "xlink:href"}


class Page(HTMLParser):
    """What a browser would build: elements, their attributes, their nesting, and the text."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.elements, self.text, self.open, self.unbalanced = [], "", [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        self.text += data

    def named(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def parsed(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def assert_inert_and_self_contained(found: Page) -> None:
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"script", "iframe", "object", "embed", "link", "base", "form", "img", "audio", "video"}
    for tag, attributes in found.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} has {name}"
            if name in LOADING:
                assert value.startswith(("#", "data:image/png;base64,")), f"{tag} {name}={value[:60]}"
            if name == "style":
                assert "url(" not in value.replace("url(#", "")
    (policy,) = [meta["content"] for meta in found.named("meta") if meta.get("http-equiv")]
    assert "default-src 'none'" in policy and "script" not in policy


def test_page_has_everything_once(tmp_path, report):
    path = write_report(tmp_path / "new" / "report.html", **report)
    assert path == tmp_path / "new" / "report.html"
    found = parsed(path)
    assert_inert_and_self_contained(found)
    assert found.unbalanced == [] and found.open == []
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids)), "no two elements share an id"
    cards = [attributes["id"] for attributes in found.named("section") if attributes.get("class") == "card"]
    assert cards == ["atom-10", "atom-30"]
    assert len(found.named("figure")) == len(found.named("figcaption")) == 6
    assert [attributes["href"] for attributes in found.named("a") if "atom-" in attributes["href"]] == [
        "#atom-10",
        "#atom-30",
        "#atom-10",
        "#atom-30",
    ]
    targets = [a["href"][1:] for tag in ("a", "use") for a in found.named(tag) if a.get("href", "").startswith("#")]
    assert set(targets) <= set(ids), "every link inside the page leads somewhere"
    for words in ("A made-up report", "83.3% [", "blocks.0.mixer.hook_write", "Two.", "something new"):
        assert words in found.text
    assert len(found.named("mark")) == 4
    assert path.stat().st_size < 3_000_000


def test_hostile_text_is_shown_and_runs_nothing(tmp_path, report, hostile):
    safe = parsed(write_report(tmp_path / "safe.html", **report))
    context = report["atoms"][0]["contexts"][0]
    context.update(tokens=hostile, weights=[1.0] * len(hostile), firing_index=0)
    evil = "".join(hostile)
    report["atoms"][0]["contexts"][0]["file"] = evil
    report.update(title=evil, notes=[evil], settings={evil: evil}, summary={evil: {evil: evil}})
    report["firings"] = report["firings"].rename(columns={"kl_something_new": f"kl_{evil}$x_$".replace("\ud800", "")})
    found = parsed(write_report(tmp_path / "evil.html", **report))
    assert_inert_and_self_contained(found)
    assert found.unbalanced == [] and found.open == []
    new_tags = {tag for tag, _ in found.elements} - {tag for tag, _ in safe.elements}
    assert new_tags == set()
    assert found.text.count("<script>alert(1)</script>") >= 6
    assert "{{ 7 * 7 }}" in found.text and "49" not in "".join(found.text.split("{{ 7 * 7 }}")[1][:3])
    body = (tmp_path / "evil.html").read_text(encoding="utf-8")
    assert not [
        code for code in map(ord, body) if (code < 32 and code != 10) or code == 127 or 0x202A <= code <= 0x202E
    ]
    for shown in ("␀", "␛", "␡", "U+202E", "U+200B", "U+2028", "U+FEFF", "U+D800", "שלום عليكم", "👩\u200d👩\u200d👧"):
        assert shown.replace(" ", "") in found.text.replace(" ", "")


def test_optional_parts_may_be_missing(tmp_path, report):
    report.update(training_log=None, half_lives=None, notes=(), summary={}, atoms=[], cell=None)
    report["firings"] = report["firings"].drop(columns=["kl_native", "kl_random_listed_coef", "passage"])
    found = parsed(write_report(tmp_path / "r.html", reading="horizon", **report))
    assert len(found.named("figure")) == 4
    assert "No atom is shown" in found.text


def test_an_atom_outside_the_test_shows_the_rate_it_came_with(tmp_path, report):
    report["atoms"][0].update(id=999, win_rate=0.123)
    report["atoms"][1].update(id=998, win_rate=None, contexts=[])
    text = parsed(write_report(tmp_path / "r.html", **report)).text
    assert "12.3%" in text
    assert "No context was kept" in text


def test_the_same_inputs_give_the_same_bytes(tmp_path, report):
    first, second = (write_report(tmp_path / name, **report).read_bytes() for name in ("a", "b"))
    assert first == second


def test_a_failing_report_leaves_the_old_page_and_no_rubbish(tmp_path, report, monkeypatch):
    path = write_report(tmp_path / "r.html", **report)
    before = path.read_bytes()

    def fail(_descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(page.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, **{**report, "title": "another"})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["r.html"]


def change_atom(report, **changes):
    report["atoms"][0].update(changes)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda r: r.update(firings=r["firings"].iloc[:0]), "firings is empty"),
        (lambda r: r.update(firings=r["firings"].drop(columns="kl_delete")), "no column 'kl_delete'"),
        (lambda r: r.update(condition="atom_listed"), "no column 'kl_atom_listed'"),
        (lambda r: r["atoms"][0].pop("win_rate"), "no 'win_rate'"),
        (lambda r: change_atom(r, id=30), "atom 30 comes twice"),
        (lambda r: r["atoms"][0]["contexts"][0].update(firing_index=99), "firing_index is 99"),
        (lambda r: r.update(training_log=[{"step": 1, "loss": 2.0}]), "training_log has no column 'fvu'"),
        (lambda r: r.update(half_lives=r["half_lives"].drop(columns="head")), "half_lives has no column 'head'"),
    ],
)
def test_bad_input_is_named_and_writes_nothing(tmp_path, report, spoil, words):
    spoil(report)
    with pytest.raises(ValueError, match=words):
        write_report(tmp_path / "r.html", **report)
    assert os.listdir(tmp_path) == []


def test_drawing_leaves_matplotlib_as_it_was():
    """No pyplot: a page written inside a notebook must not change the notebook's figures."""
    code = "import sys, writesae.report.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
