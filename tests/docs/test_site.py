"""The site builds without a warning, fetches nothing, and every link in it leads somewhere."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

import hooked_recurrent
import hooked_recurrent.memory
import hooked_recurrent.patching
import writesae
import writesae.evaluate

ROOT = Path(__file__).resolve().parents[2]
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "use": "href"}


@dataclass
class Found(HTMLParser):
    """The anchors, links and fetched things of a page."""

    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.in_script = False

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        self.in_script = tag == "script" and "src" not in given
        if tag == "a" and given.get("href") is not None:
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next", "alternate"):
            self.fetched.append(given["href"])
        if given.get(FETCHED.get(tag, "")):
            self.fetched.append(given[FETCHED[tag]])

    def handle_data(self, data):
        if self.in_script:
            self.scripts.append(data)

    def handle_endtag(self, tag):
        self.in_script = False


def read(text: str) -> Found:
    found = Found()
    found.feed(text)
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built once."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    log = built.stdout + built.stderr
    assert built.returncode == 0 and "WARNING" not in log and "ERROR" not in log, log
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Found]:
    return {path: read(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


def broken(site: Path, pages: dict[Path, Found]) -> list[str]:
    """Internal links that lead nowhere, files and anchors alike."""
    complaints = []
    for path, page in pages.items():
        for link in [*page.links, *page.fetched]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            address, anchor = map(unquote, urldefrag(link))
            absolute = site if address.startswith("/") else path.parent
            target = (absolute / address.lstrip("/").split("?")[0]).resolve() if address else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                complaints.append(f"{path.relative_to(site)}: {link}")
            elif anchor and target in pages and anchor not in pages[target].ids:
                complaints.append(f"{path.relative_to(site)}: no such anchor {link}")
    return complaints


def test_every_link_leads_somewhere(site, pages):
    assert len(pages) > 30
    assert broken(site, pages) == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text("<a href='b.html'>x</a> <a href='#no'>x</a> <a href='a.html#yes' id='yes'>x</a>")
    page = {tmp_path / "a.html": read((tmp_path / "a.html").read_text())}
    assert [complaint.split(": ")[1] for complaint in broken(tmp_path, page)] == ["b.html", "no such anchor #no"]


def test_nothing_is_fetched_from_elsewhere(site, pages):
    for path, page in pages.items():
        assert [link for link in page.fetched if urlsplit(link).netloc] == [], path
        assert not re.search(r"(cdnjs|unpkg|jsdelivr|googleapis)\.", " ".join(page.scripts)), path
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_pages_from_outside_are_there(site):
    start = (site / "index.html").read_text(encoding="utf-8")
    assert "Five tasks" in start and 'href="howto/load.html"' in start
    for name in ("tiny-gated-deltanet", "tiny-mamba2", "tiny-rwkv7"):
        assert "loss_curve.svg" in (site / "models" / f"{name}.html").read_text(encoding="utf-8")
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        page = (site / "tutorials" / f"{notebook.stem}.html").read_text(encoding="utf-8")
        assert "<h1" in page and ("data:image/png" in page or "<svg" in page), f"{notebook.name} shows no figure"
    assert (site / "changelog.html").is_file() == (ROOT / "CHANGELOG.md").is_file()


def test_pictures_stand_in_the_page(site):
    page = (site / "concepts" / "hooks.html").read_text(encoding="utf-8")
    assert page.count('<svg xmlns="http://www.w3.org/2000/svg" class="hookmap"') == 6


def test_everything_public_is_in_the_reference(pages):
    ids = set().union(*(page.ids for path, page in pages.items() if path.parent.name == "api"))
    modules = (hooked_recurrent, hooked_recurrent.patching, hooked_recurrent.memory, writesae, writesae.evaluate)
    for module in modules:
        for name in module.__all__:
            value = getattr(module, name)
            where = {f"{module.__name__}.{name}", f"{getattr(value, '__module__', '')}.{name}"}
            assert where & ids or name in ("SITES",), f"{module.__name__}.{name} is on no page of the reference"


def test_links_of_the_readme_hold_in_the_repository_too():
    links = re.findall(r"\]\(([^)#]+)[)#]", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 15
    assert [link for link in links if "//" not in link and not (ROOT / link).exists()] == []
