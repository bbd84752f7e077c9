"""The live page in a real Chromium, against a server in a thread; every number shown is computed again beside it."""

import json

import pytest

from tests.browser_for_tests import browser, serious_violations, shot, watched_page
from tests.writesae.view.pages import ATOMS, served, small
from writesae.view.changes import Change
from writesae.view.outcome import continuations, distributions
from writesae.view.session import firings, read

__all__ = ["browser"]
PROMPT = "import os\n\ndef read(path):\n    return os."
HOSTILE = (
    '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script></textarea></script>'
    "{{ 7*7 }} &lt; \u202egnp.exe\u202c \U0001f468\u200d\U0001f469 \u05e9\u05dc\u05d5\u05dd\x00\x1b[31m\t\u2028."
)
WIDE = {"viewport": {"width": 1360, "height": 1000}}


@pytest.fixture(scope="module")
def made():
    return small()


@pytest.fixture(scope="module")
def home(made):
    with served(made[0], made[1], PROMPT) as url:
        yield url


def settle(page):
    """Wait until every question was answered."""
    page.wait_for_selector("#live:not([aria-busy])")


def until(page, script, *, seconds=120):
    """Wait for an expression to be true; Playwright's own way evaluates text in the page, which its policy forbids."""
    for _ in range(seconds * 20):
        if page.evaluate(script):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"never came true: {script}", pytrace=False)


def opened(page, home, more=""):
    page.set_default_timeout(120_000)  # the machine may be busy; what is tested is what happens, not when
    page.goto(home + more)
    page.wait_for_selector("#live-outcome .next")
    settle(page)


def typed(page, text):
    page.get_by_label("Type a text").fill(text)
    page.keyboard.press("Control+Enter")
    until(page, f"AtomPage.live.text === {json.dumps(text)}")
    settle(page)


def shown(page):
    """Per card of the outcome its position, KL, and the probabilities of each token, as the page has them."""
    script = """(cards) => {
        const row = ({dataset: {id, before, after}}) => [id, before, after].map(Number);
        return cards.map((card) =>
            [Number(card.dataset.position), Number(card.dataset.kl), Array.from(card.querySelectorAll("tr[data-id]"), row)]);
    }"""
    return page.locator(".outcome").evaluate_all(script)


def expected(found):
    return [
        [at["position"], at["kl"], [[one["id"], one["before"], one["after"]] for one in at["top"][:10]]]
        for at in found["at"]
    ]


def test_type_a_prompt_replace_a_write_and_watch(browser, home, made):
    study = made[0]
    text = "class Reader:\n    def read(self):\n        return self."
    with watched_page(browser, own=(home,), **WIDE) as page:
        opened(page, home)
        typed(page, text)
        prompt = read(study, text)
        tokens = page.locator("#live-line .tok")
        assert tokens.count() == len(prompt.words) == page.evaluate("AtomPage.live.tokens.length")
        assert shown(page) == expected(distributions(study, prompt, [], top=8))
        assert page.locator("#live-changes").is_hidden() and page.locator(".outcome .kl").count() == 0

        at = 5
        tokens.nth(at).click()
        settle(page)
        rows = page.locator("#live-token tbody tr")
        active = firings(prompt, at)
        assert [int(row.get_attribute("data-atom")) for row in rows.all()] == [atom for atom, _ in active]
        assert f"{active[1][1]:.3g}" in rows.nth(1).inner_text()
        rows.nth(1).get_by_role("button", name=f"Replace the write of token {at} by atom {active[1][0]}").click()
        page.wait_for_selector(".outcome .kl")
        settle(page)
        found = distributions(study, prompt, [Change(at, "replace", active[1][0], active[1][1])], position=at, top=8)
        assert shown(page) == expected(found) and [one["position"] for one in found["at"]] == [at, at + 1]
        assert found["at"][0]["kl"] > 1e-6 and page.locator(".outcome .kl").first.inner_text().endswith("nats of KL")
        text_shown = page.locator(".outcome .kl").first.inner_text().split()[0].replace("−", "-")
        assert float(text_shown) == pytest.approx(found["at"][0]["kl"], rel=0.06)
        for row, one in zip(
            page.locator(".outcome").first.locator("tr[data-id]").all(), found["at"][0]["top"], strict=False
        ):
            percents = [float(cell.inner_text().strip("%<\u202f\n")) for cell in row.locator("td").all()]
            assert percents == pytest.approx([100 * one["before"], 100 * one["after"]], rel=0.06, abs=0.01)
        assert tokens.nth(at).evaluate("(node) => node.classList.contains('changed')")
        assert tokens.nth(0).evaluate("(node) => node.style.getPropertyValue('--k')") == "0.000"
        shot(page, "view-replaced")
        assert serious_violations(page) == []
        assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")  # its panes scroll, not the page

        tokens.nth(at + 3).click()  # look further on: the same changes, another place
        until(page, "AtomPage.live.outcome.at.length === 3")
        settle(page)
        assert (
            shown(page)[2]
            == expected(
                distributions(
                    study, prompt, [Change(at, "replace", active[1][0], active[1][1])], position=at + 3, top=8
                )
            )[2]
        )


def test_amounts_readings_and_undoing(browser, home, made):
    study, prompt = made[0], read(made[0], PROMPT)
    with watched_page(browser, own=(home,), **WIDE) as page:
        opened(page, home)
        last = len(prompt.words) - 1
        page.get_by_role("button", name="Scale the write of token").click()
        field = page.get_by_role("spinbutton", name=f"Factor at token {last}")
        field.fill("-1.5")
        field.press("Tab")
        settle(page)
        change = Change(last, "scale", None, -1.5)
        assert shown(page) == expected(distributions(study, prompt, [change], position=last, top=8))
        page.get_by_label("Factor at token").first.fill("3")  # the slider
        settle(page)
        assert float(field.input_value()) == 3.0
        assert shown(page) == expected(
            distributions(study, prompt, [Change(last, "scale", None, 3.0)], position=last, top=8)
        )
        page.locator("#live-other").fill("7")
        page.locator("#live-amount").fill("0.25")
        page.get_by_role("button", name="Write this atom as well").click()
        settle(page)
        page.locator("#live-reading").select_option("cache")
        settle(page)
        both = [Change(last, "scale", None, 3.0), Change(last, "add", 7, 0.25)]
        found = distributions(study, prompt, both, position=last, top=8, reading="cache")
        assert shown(page) == expected(found) and found["kl"][last] == pytest.approx(0, abs=1e-9)
        page.locator("#live-new").fill("6")
        page.get_by_role("button", name="Continue").click()
        page.wait_for_selector("#live-continued .texts")
        settle(page)
        texts = page.locator("#live-continued .tokens")
        told = continuations(study, prompt, both, new_tokens=6, reading="cache")
        for place, name in enumerate(("plain", "edited")):
            written = "".join(one["text"] for one in told[name])
            assert texts.nth(place).inner_text().replace("↵", "").replace(" ", "") == written.replace(" ", "").strip(
                " "
            )
        page.get_by_role("button", name="Undo the change of token").first.click()
        settle(page)
        assert page.locator(".changes li").count() == 1
        page.get_by_role("button", name="Undo all").click()
        page.wait_for_selector("#live-changes", state="hidden")
        settle(page)
        assert page.locator(".outcome .kl").count() == 0 and page.locator("#live-continued .tokens").count() == 0


def test_what_is_typed_is_text_whatever_it_holds(browser, made):
    study = made[0]
    with served(study, made[1], HOSTILE) as url, watched_page(browser, own=(url,), **WIDE) as page:
        opened(page, url)
        assert page.get_by_label("Type a text").input_value() == HOSTILE.replace("\x00", "\ufffd")  # as HTML has it
        typed(page, HOSTILE)
        page.get_by_role("button", name="Delete the write of token").click()
        page.wait_for_selector(".outcome .kl")
        page.get_by_role("button", name="Continue").click()
        page.wait_for_selector("#live-continued .tokens")
        settle(page)
        line = page.locator("#live-line .tokens").inner_text().replace("⋯", "")  # bytes of characters that end later
        for piece in (
            "<img",
            "onerror",
            "<script>",
            "</textarea>",
            "{{",
            "U+202E",
            "␀",
            "␛[31m",
            "⇥",
            "U+2028",
            "שלום",
        ):
            assert piece in line, piece
        assert "\U0001f468\u200d\U0001f469" in line or "\U0001f468" in line
        assert page.locator("#live img, #live script:not(#live-about), #live iframe").count() == 0
        assert (
            page.evaluate("window.pwned") is None and page.evaluate("document.querySelectorAll('textarea').length") == 1
        )
        isolated = page.locator("#live-line .tok").evaluate_all(
            "(nodes) => nodes.every((one) => one.tagName === 'BDI')"
        )
        assert isolated
        shot(page, "view-hostile")
        assert serious_violations(page) == []


def test_from_a_token_to_its_atom_and_back(browser, home, made):
    prompt = read(made[0], PROMPT)
    with watched_page(browser, own=(home,), **WIDE) as page:
        opened(page, home)
        tokens = page.locator("#live-line .tok")
        tokens.nth(len(prompt.words) - 1).focus()
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Enter")
        settle(page)
        at = len(prompt.words) - 3
        assert page.locator("#live-line [aria-selected=true]").count() == 1
        assert page.locator("#live-token-title").inner_text().startswith(f"Token {at} ")
        atom = firings(prompt, at)[0][0]
        page.locator("#live-token").get_by_role("link", name=str(atom), exact=True).click()
        assert f"atom={atom}" in page.evaluate("location.hash")
        assert page.locator("#atom-title").inner_text() == f"Atom {atom}"
        assert page.locator("#live-token tr.chosen").get_attribute("data-atom") == str(atom)
        assert page.locator("#live-other").input_value() == str(atom)
        page.get_by_role("button", name="Atoms", exact=True).click()
        assert page.locator("#search").is_visible() and page.locator("#live").is_hidden()
        page.get_by_role("button", name="Try in the prompt").click()
        settle(page)
        assert page.locator("#live").is_visible() and page.locator("#live-shade").input_value() == "atom"
        assert page.locator("#live-shade-number").input_value() == str(atom)
        strengths = [dict(firings(prompt, place)).get(atom, 0.0) for place in range(len(prompt.words))]
        assert page.evaluate("AtomPage.live.selected") == strengths.index(max(strengths))
        shades = tokens.evaluate_all("(nodes) => nodes.map((one) => Number(one.style.getPropertyValue('--a') || 0))")
        assert shades == pytest.approx([one / max(strengths) for one in strengths], abs=2e-3)
    with watched_page(browser, own=(home,), **WIDE) as page:
        opened(page, home, "#atom=3")  # a deep link opens beside the prompt
        assert page.locator("#atom-title").inner_text() == "Atom 3" and page.locator("#live").is_visible()
        assert page.get_by_role("button", name="Try in the prompt").is_visible()


def test_on_a_phone_in_the_dark(browser, home, made):
    with watched_page(browser, own=(home,), viewport={"width": 390, "height": 844}, color_scheme="dark") as page:
        opened(page, home)
        page.get_by_role("button", name="Delete the write of token").click()
        page.wait_for_selector(".outcome .kl")
        settle(page)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        shot(page, "view-narrow-dark")
        assert serious_violations(page) == []
        page.locator("#live-token a.live-atom").first.click()
        assert page.locator("#atom-title").is_visible() and page.locator("#live").is_hidden()
        page.get_by_role("button", name="Try in the prompt").click()
        assert page.locator("#live").is_visible() and page.locator("#atom-title").is_hidden()


def test_refusals_are_told_and_a_busy_server_is_asked_again(browser, home):
    context = browser.new_context(**WIDE)  # not watched: a browser notes every refused request in its console
    page = context.new_page()
    opened(page, home)
    page.get_by_label("Type a text").fill("x y " * 600)
    page.get_by_role("button", name="Read", exact=True).click()
    until(page, "document.getElementById('live-wrong').textContent !== ''")
    words = page.get_by_role("alert").inner_text()
    assert words.startswith("The prompt has 1,") and words.endswith("tokens: give at most 512.")
    assert page.evaluate("AtomPage.live.text") == PROMPT  # what was read before is still there
    refusals = []

    def busy_once(route):
        refusals.append(route.request.url)
        if len(refusals) == 1:
            route.fulfill(status=429, json={"error": "another request is being worked on: try again in a moment"})
        else:
            route.continue_()

    page.route("**/api/read", busy_once)
    typed(page, "def f():")
    assert len(refusals) == 2 and page.get_by_role("alert").inner_text() == ""
    page.route("**/api/distributions", lambda route: route.abort())
    page.locator("#live-line .tok").first.click()
    until(page, "document.getElementById('live-wrong').textContent.includes('still running')")
    context.close()


def test_other_pages_cannot_use_it(browser, home):
    """What a page from elsewhere can do in the same browser: look at an answer, send a form, put it into a frame."""
    with served_elsewhere() as (url, _):
        context = browser.new_context()
        page = context.new_page()
        page.goto(url)
        asked = """async (home) => {
            const tries = [
                fetch(home + "api/about"),
                fetch(home + "api/read", {method: "POST", body: '{"text": "a"}'}),
                fetch(home + "api/read", {method: "POST", headers: {"content-type": "application/json"}, body: "{}"}),
            ];
            return Promise.all(tries.map((one) => one.then((answer) => answer.status, () => "refused")));
        }"""
        assert page.evaluate(asked, home) == ["refused"] * 3
        page.evaluate(
            "(home) => { const f = document.createElement('iframe'); f.src = home; document.body.append(f); }", home
        )
        page.wait_for_timeout(300)
        inner = [frame for frame in page.frames if frame != page.main_frame]
        assert all(frame.url.startswith("chrome-error:") or not frame.evaluate("window.AtomPage") for frame in inner)
        context.close()


def served_elsewhere():
    """A server of an empty page at another port, which is another origin."""
    import contextlib
    import http.server
    import threading

    class Empty(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><body>")

        def log_message(self, *args):
            pass

    @contextlib.contextmanager
    def running():
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}/", server
            server.shutdown()

    return running()


def test_the_page_shows_the_whole_dictionary(browser, home):
    with watched_page(browser, own=(home,), **WIDE) as page:
        opened(page, home)
        assert page.evaluate("AtomPage.count()") == ATOMS == page.evaluate("AtomPage.live.about.n_atoms")
