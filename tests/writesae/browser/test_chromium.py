"""The page in a real Chromium: read, searched, sorted, opened, linked to, in the dark and on a phone; and with hostile text."""

import re

import pytest

from tests.browser_for_tests import browser, serious_violations, shot, watched_page  # noqa: F401 (browser is a fixture)
from tests.writesae.browser.pages_for_tests import HOSTILE, random_data
from writesae.browser import write_page

WIDE, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def data():
    return random_data(300)


@pytest.fixture(scope="module")
def address(data, tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("page") / "atoms.html", data).as_uri()


@pytest.fixture
def page(browser, address):  # noqa: F811
    with watched_page(browser, own=[address], viewport=WIDE) as opened:
        opened.goto(address)
        yield opened


def listed(page):
    """The numbers of the atoms in the rows that are drawn, in order."""
    return [int(text) for text in page.locator("#rows a").all_text_contents()]


def title(page):
    return page.locator("#atom-pane h2").text_content()


def as_shown(x):
    """A small positive number as the page writes it."""
    if x >= 1e-3:
        return f"{x:.3g}"
    size, power = f"{x:.1e}".split("e-")
    return f"{size}e−{int(power)}"


def fragment(page):
    return page.evaluate("location.hash")


def test_the_table_lists_every_atom_and_draws_those_in_sight(page, data):
    expected = data.atoms["firings"].sort_values(ascending=False, kind="stable").index.tolist()
    first = listed(page)
    assert first == expected[: len(first)] and 15 < len(first) < 60
    assert page.locator("#found").text_content() == "300 atoms" and title(page) == "The dictionary"
    page.locator("#scroll").evaluate("node => (node.scrollTop = node.scrollHeight)")
    page.wait_for_function("[...document.querySelectorAll('#rows a')].at(-1).textContent === '0'")
    assert listed(page)[-3:] == expected[-3:]


def test_searching_finds_tokens_contexts_and_numbers(page, data):
    word = data.words[7]
    in_lists = (getattr(data, name).index == 7 for name in ("fires_on", "promoted", "suppressed"))
    found = set().union(*(set(rows.any(1).nonzero()[0]) for rows in in_lists))
    contexts = data.contexts
    owner = contexts.first.searchsorted((contexts.word == 7).any(1).nonzero()[0], side="right") - 1
    texts = [text for text in data.words if word in text]  # " h7" is in " h7" alone, not in longer words
    page.keyboard.press("/")
    page.keyboard.type(word)
    expected = found | set(owner.tolist())
    if len(texts) == 1:
        assert page.locator("#found").text_content() == f"{len(expected)} of 300 atoms"
        assert set(listed(page)) <= expected
    assert "q=+h7" in fragment(page)
    page.fill("#search", "123")
    assert listed(page)[0] == 123
    page.fill("#search", "no such thing anywhere")
    assert "No atom has this" in page.locator("#found").text_content() and listed(page) == []
    page.keyboard.press("Escape")
    assert page.locator("#found").text_content() == "300 atoms" and fragment(page) == ""
    page.select_option("#kind", "silent")
    assert listed(page) == [0] and fragment(page) == "#kind=silent"


def test_sorting_either_way_leaves_what_was_not_measured_at_the_end(page, data):
    cosines = data.atoms["cosine"].drop(0)
    page.click("button[data-sort=cosine]")
    assert listed(page)[0] == cosines.idxmax() and fragment(page) == "#sort=cosine"
    assert page.locator("th.c-cosine").get_attribute("aria-sort") == "descending"
    page.keyboard.press("Enter")  # the button keeps the focus
    assert listed(page)[0] == cosines.idxmin() and fragment(page) == "#sort=cosine&dir=asc"
    page.locator("#scroll").evaluate("node => (node.scrollTop = node.scrollHeight)")
    page.wait_for_function("[...document.querySelectorAll('#rows a')].at(-1).textContent === '0'")


def test_an_atom_opens_by_click_and_shows_what_was_measured(page, data):
    row = data.atoms.loc[5]
    page.fill("#search", "5")
    page.click("#rows a >> nth=0")
    assert title(page) == "Atom 5" and "atom=5" in fragment(page)
    shown = page.locator("#atom-pane").text_content()
    assert f"{row['firings']:,} of 15,360 tokens" in shown and row["kind"] in shown
    assert "3 of 5" in shown and as_shown(row["kl_atom"]) in shown
    contexts = data.contexts
    first = contexts.first[5]
    tokens = page.locator(".contexts li >> nth=0").locator(".tok").all_text_contents()
    assert tokens == [data.words[word] for word in contexts.word[first] if word >= 0]
    framed = page.locator(".contexts li >> nth=0").locator(".tok.at")
    assert framed.text_content() == data.words[contexts.word[first, contexts.at[first]]]
    assert framed.evaluate("node => getComputedStyle(node).backgroundColor") != "rgba(0, 0, 0, 0)"
    assert page.locator(".contexts li").count() == 12 and page.locator(".bars rect").count() == 24
    raised = page.locator(".panel:has(h3:text-is('Raises')) li .chip").all_text_contents()
    assert raised == [data.words[word] for word in data.promoted.index[5]]
    near = page.locator(".nearest a").all_text_contents()
    assert near == [str(atom) for atom in data.neighbours.index[5]]
    page.click(".nearest a >> nth=1")
    assert title(page) == f"Atom {near[1]}"
    page.go_back()
    assert title(page) == "Atom 5"


def test_an_atom_that_was_not_measured_or_never_fired_says_so(page, data):
    untested = data.atoms.index[(data.atoms["tested"] == 0) & (data.atoms["firings"] > 0)][0]
    page.evaluate(f"AtomPage.open({untested})")
    assert "Not measured. The 40 most frequent atoms were." in re.sub(
        r"\.(?=\S)", ". ", page.locator("#atom-pane").text_content()
    )
    page.evaluate("AtomPage.open(0)")
    assert "This atom did not fire on this text." in page.locator("#atom-pane").text_content()


def test_everything_is_reached_by_keyboard(page):
    page.keyboard.press("/")
    page.keyboard.press("ArrowDown")
    order = listed(page)
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.textContent") == str(order[3])
    page.keyboard.press("Enter")
    assert title(page) == f"Atom {order[3]}"
    page.keyboard.press("j")
    assert title(page) == f"Atom {order[4]}"
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.textContent") == "0"
    page.keyboard.press("k")
    assert title(page) == f"Atom {order[3]}"
    page.locator(".tok.at >> nth=0").focus()
    assert "coefficient" in page.locator("#card").text_content()
    before = page.evaluate("document.activeElement.textContent")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.textContent") == before and page.locator("#card").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#card").is_hidden()


def test_a_token_under_the_pointer_tells_its_coefficient(page, data):
    page.evaluate("AtomPage.open(5)")
    page.hover(".tok.at >> nth=0")
    card = page.locator("#card")
    assert card.is_visible() and "100%" in card.text_content()
    word = data.contexts.word[data.contexts.first[5], data.contexts.at[data.contexts.first[5]]]
    assert str(data.word_ids[word]) in card.text_content()
    page.mouse.move(5, 5)
    assert card.is_hidden()


def test_a_deep_link_opens_the_atom_the_search_and_the_order(browser, address, data):  # noqa: F811
    with watched_page(browser, own=[address], viewport=WIDE) as page:
        page.goto(f"{address}#atom=17&q=7&sort=atom&dir=asc&kind=register")
        assert title(page) == "Atom 17" and page.input_value("#search") == "7"
        rows = listed(page)
        assert rows[1:] == sorted(rows[1:]) and all(data.atoms.loc[atom, "kind"] == "register" for atom in rows)
        assert page.locator("th.c-atom").get_attribute("aria-sort") == "ascending"
        page.goto(f"{address}#atom=99999&sort=nonsense&kind=odd&dir=up")
        assert title(page) == "The dictionary" and len(listed(page)) > 15


@pytest.mark.parametrize(("view", "scheme"), [(WIDE, "light"), (WIDE, "dark"), (PHONE, "light")])
def test_nobody_is_kept_out(browser, address, scheme, view):  # noqa: F811
    name = f"atoms-{'phone' if view is PHONE else 'wide'}-{scheme}"
    with watched_page(browser, own=[address], viewport=view, color_scheme=scheme) as page:
        for state in ("", "#atom=5"):
            page.goto(address + state)
            assert serious_violations(page) == []
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            shot(page, f"{name}{'-atom' if state else ''}")
        if view is WIDE:
            page.click("#about-open")
            assert serious_violations(page) == [] and page.locator("dialog").is_visible()


def test_dark_by_system_and_by_choice(browser, address):  # noqa: F811
    def is_dark():
        return page.evaluate(
            "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).every((x) => x < 60)"
        )

    with watched_page(browser, own=[address], viewport=WIDE, color_scheme="light") as page:
        page.goto(address)
        assert not is_dark()
        page.emulate_media(color_scheme="dark")
        assert is_dark()
        page.click("#theme")
        assert page.locator("#theme").text_content() == "Light" and not is_dark()
        page.click("#theme")
        page.emulate_media(color_scheme="light")
        assert is_dark()
        page.reload()
        assert is_dark()  # the choice is kept
        page.click("#theme")
        assert page.locator("#theme").text_content() == "Auto" and not is_dark()


def test_on_a_phone_the_list_gives_way_to_the_atom_and_comes_back(browser, address):  # noqa: F811
    with watched_page(browser, own=[address], viewport=PHONE, has_touch=True) as page:
        page.goto(address)
        order = listed(page)
        page.tap("#rows tr[data-row='1']")
        assert title(page) == f"Atom {order[1]}" and page.locator("#scroll").is_hidden()
        assert page.evaluate("document.activeElement.id") == "atom-title"
        page.tap(".tok.at >> nth=0")
        assert page.locator("#card").is_visible()
        page.tap(".back")
        assert page.locator("#scroll").is_visible() and page.locator("#atom-pane").is_hidden()


def test_hostile_text_is_text(browser, tmp_path):  # noqa: F811
    data = random_data(8, words=HOSTILE, seed=4)
    address = write_page(tmp_path / "hostile.html", data).as_uri()
    with watched_page(browser, own=[address], viewport=WIDE) as page:
        page.goto(address)
        for atom in range(8):
            page.evaluate(f"AtomPage.open({atom})")
        page.hover(".tok.at >> nth=0")
        shown = page.locator("#atom-pane").inner_text()
        for text in HOSTILE[:3] + ["U+202E", "שלום", "👩\u200d🔬", "␀", "␛", "U+D800", "U+2028", "U+FEFF", "↵", "⇥"]:
            assert text in shown, text
        assert not re.search("[\x00-\x08\x1b\u202e\u2028\ufeff]", shown)
        assert (
            page.evaluate("window.ran") is None
            and page.locator("#atom-pane script, #atom-pane img, #rows script").count() == 0
        )
        assert page.title() == "tiny-<b>model</b>, layer 2, head 1: 8 atoms"
        assert "folder/<i>file</i>" in shown
        page.fill("#search", "<script>")
        assert len(listed(page)) == 7
        isolated = page.locator(".tok", has_text="שלום").first
        assert isolated.evaluate("node => [node.localName, getComputedStyle(node).unicodeBidi]") == ["bdi", "isolate"]
        shot(page, "atoms-hostile")


def test_two_thousand_atoms_are_small_and_soon_there(browser, tmp_path, capsys):  # noqa: F811
    """The size is asserted; the time to the first paint is measured and said, for a loaded machine has a clock of its own."""
    path = write_page(
        tmp_path / "large.html", random_data(2048, words=[f" word{i}" for i in range(30000)], d_k=128, d_v=128)
    )
    size = path.stat().st_size
    assert size < 20e6
    with watched_page(browser, own=[path.as_uri()], viewport=WIDE) as page:
        page.goto(path.as_uri() + "#atom=77")
        assert title(page) == "Atom 77"
        paint = page.evaluate("performance.getEntriesByType('paint').map((one) => one.startTime)")
        ready = page.evaluate("performance.getEntriesByType('navigation')[0].domComplete")
        page.fill("#search", "word123")
        assert "of 2,048 atoms" in page.locator("#found").text_content()
        assert page.locator("#rows tr").count() < 80 and paint and max(paint) < 20_000
    with capsys.disabled():
        print(f"\n2,048 atoms of 128 x 128: {size / 1e6:.1f} MB, first paint {max(paint):.0f} ms, drawn {ready:.0f} ms")
