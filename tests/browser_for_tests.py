"""A real Chromium for the tests of the pages: where it is found, a browser per module, and what a page must never do."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

ARTEFACTS = Path(__file__).resolve().parents[1] / "artefacts"
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


def chromium_path(playwright):
    """The system's Chromium or the one that Playwright brought; a test run without any fails, and says what to do."""
    found = next(filter(None, map(shutil.which, NAMES)), None) or playwright.chromium.executable_path
    if not Path(found).exists():
        pytest.fail(
            f"no browser: none of {', '.join(NAMES)} and none of Playwright's own; run `make chromium`", pytrace=False
        )
    return found


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium_path(playwright), args=list(FLAGS))
        yield launched
        launched.close()


@contextmanager
def watched_page(browser, *, own=(), **options):
    """A page in a context of its own that fails the test for an error in its console or a request that is not its own.

    own: beginnings of addresses that the page may ask for. options: of the context (viewport, color_scheme, ...).
    """
    context = browser.new_context(**options)
    context.set_default_timeout(120_000)  # a loaded machine is slow, not wrong
    page = context.new_page()
    complaints = []
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith(tuple(own)) else complaints.append(asked.url))
    try:
        yield page
        assert complaints == []
    finally:
        context.close()


def shot(page, name):
    """Keep a picture of what the page shows."""
    ARTEFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTEFACTS / f"{name}.png")


def serious_violations(page):
    """What axe finds that would keep somebody from using the page."""
    found = Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {one['nodes'][0]['target']} {one['nodes'][0]['html'][:200]}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
