"""The page as text: whole, small, with nothing to fetch, and with a policy that knows its own scripts."""

import base64
import hashlib
import json
import re

import pytest

from tests.writesae.browser.pages_for_tests import HOSTILE, random_data
from writesae.browser import render, write_page


@pytest.fixture(scope="module")
def html():
    return render(random_data(words=HOSTILE))


def parts(html, tag):
    return re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.S)


def policy_of(html):
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)[1]
    return {part.split()[0]: part.split()[1:] for part in found.split("; ")}


def test_every_script_and_style_is_allowed_by_its_hash_and_nothing_else(html):
    policy = policy_of(html)
    assert policy["default-src"] == ["'none'"] and "connect-src" not in policy and "unsafe" not in str(policy)
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in parts(html, tag)]
        assert policy[rule] == [f"'sha256-{digest}'" for digest in digests] and digests


def test_nothing_is_fetched_and_nothing_runs_by_attribute(html):
    assert not re.search(r"""(src|href|action)\s*=\s*["']?(https?:|//|data:)""", html)
    assert not re.search(r"<(link|iframe|object|embed|img|base)\b", html.split("<script")[0])
    assert not re.search(r"\son\w+\s*=", html.split("<script")[0]) and ' style="' not in html
    for script in parts(html, "script"):
        for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch("):
            assert forbidden not in script


def test_data_is_in_blocks_that_hold_no_tag(html):
    blocks = dict(re.findall(r'<script type="application/json" id="data-(\w+)">(.*?)</script>', html, flags=re.S))
    assert set(blocks) == {"about", "table", "words", "lists", "contexts", "shapes"}
    assert json.loads(blocks["words"])["text"] == HOSTILE
    assert not any("<" in block for block in blocks.values())
    assert html.count("<script") == html.count("</script>") == len(blocks) + len(parts(html, "script"))


def test_names_are_text_and_unseen_characters_show():
    data = random_data(5)
    data.about.update(model="<script>x\u202e", sae="runs/\x00")
    html = render(data)
    assert "&lt;script&gt;xU+202E" in html and "runs/\u2400" in html


def test_a_live_page_brings_its_own_scripts_and_may_talk_to_its_server():
    more = {
        "markup": "<section id='live'></section>",
        "styles": ["#live { margin: 0 }"],
        "scripts": ["AtomPage.live = 1;"],
    }
    html = render(random_data(5), live=True, **more)
    policy = policy_of(html)
    assert policy["connect-src"] == ["'self'"] and more["markup"] in html and '<body class="live">' in html
    digest = base64.b64encode(hashlib.sha256(b"AtomPage.live = 1;").digest()).decode()
    assert policy["script-src"][-1] == f"'sha256-{digest}'" and parts(html, "script")[-1] == "AtomPage.live = 1;"
    assert parts(html, "style")[-1] == more["styles"][0]


def test_a_script_that_would_end_itself_is_refused():
    with pytest.raises(ValueError, match="the tag that ends it"):
        render(random_data(5), scripts=["const x = '</SCRIPT>'"])


def test_the_same_data_give_the_same_page_and_it_is_written_whole(tmp_path, html):
    page = write_page(tmp_path / "new" / "atoms.html", random_data(words=HOSTILE))
    assert page.read_text(encoding="utf-8") == html and [one.name for one in page.parent.iterdir()] == ["atoms.html"]
