"""What MkDocs does here besides its own: pages that lie outside docs/ join the site, and pictures of blocks stand in the page.

README is the start page, every notebook a tutorial, the card of every bundled model a page, the changelog and the contributing
guide pages if they are there. A picture of `diagrams/` is written into the page itself, so that it follows the page's light and
dark mode and its tooltips work.
"""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import CombinedEvent, event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.structure.toc import get_toc

ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT / "hooked_recurrent" / "zoo"
OPTIONAL = {"CHANGELOG.md": ("changelog.md", "Changelog"), "CONTRIBUTING.md": ("contributing.md", "Contributing")}
PICTURE = re.compile(r'<p><img alt="([^"]*)" src="[^"]*diagrams/(\w+)\.svg"\s*/?></p>')
HEADING = re.compile(r'<h([1-6])[^>]*\bid="([^"]+)"[^>]*>(.*?)</h\1>', re.DOTALL)
SCRIPT = re.compile(r"<script\b.*?</script>", re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(?=[)#])")


def notebooks() -> list[Path]:
    """Every notebook there is, by name."""
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def title(notebook: Path) -> str:
    """The first heading of a notebook."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for line in "".join(cell["source"]).splitlines() if cell["cell_type"] == "markdown" else []:
            if line.startswith("# "):
                return line.removeprefix("# ").strip()
    return notebook.stem


def outside() -> dict[str, str]:
    """Path in the repository -> path on the site, of everything that comes from outside docs/."""
    pages = {"README.md": "index.md"}
    pages |= {f"notebooks/{path.name}": f"tutorials/{path.name}" for path in notebooks()}
    for card in sorted(ZOO.glob("*/README.md")):
        name = card.parent.name
        pages[f"hooked_recurrent/zoo/{name}/README.md"] = f"models/{name}.md"
        for picture in card.parent.glob("*.svg"):
            pages[f"hooked_recurrent/zoo/{name}/{picture.name}"] = f"models/{name}_{picture.name}"
    return pages | {path: page for path, (page, _) in OPTIONAL.items() if (ROOT / path).is_file()}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name what was found in the navigation."""
    parts: dict[str, Any] = {name: part for entry in config.nav for name, part in entry.items()}
    pages = outside()
    parts["Tutorials"] += [{title(path): f"tutorials/{path.name}"} for path in notebooks()]
    cards = [page for page in pages.values() if page.startswith("models/") and page.endswith(".md")]
    parts["Results"].append({"Bundled models": [{Path(page).stem: page} for page in cards]})
    more = [{name: page} for page, name in OPTIONAL.values() if page in pages.values()]
    if more:
        config.nav.append({"Project": more})
    return config


@event_priority(100)  # before the plugin that turns notebooks into pages
def bring_in(files: Files, config: MkDocsConfig) -> Files:
    """Bring in what lies outside."""
    for path, page in outside().items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


@event_priority(-100)  # after it
def tell_where(files: Files, config: MkDocsConfig) -> Files:
    """A notebook's page asks itself, and not the file that it stands for, where it comes from."""
    for path, page in outside().items():
        if page.endswith(".ipynb"):
            files.get_file_from_path(page).abs_src_path = str(ROOT / path)
    return files


on_files = CombinedEvent(bring_in, tell_where)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that hold in the repository into links that hold on the site, on pages from outside docs/."""
    pages = outside()
    here = next((path for path, name in pages.items() if name == page.file.src_uri), None)
    if here is None:
        return markdown

    def moved(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link[1]))
        on_site = pages.get(target) or target.removeprefix("docs/")
        return posixpath.relpath(on_site, posixpath.dirname(page.file.src_uri))

    return LINK.sub(moved, markdown)


def headings(html: str) -> list[dict[str, Any]]:
    """The headings of a page as the table of contents wants them, nested by level.

    The notebook plugin reads them off another conversion of the notebook, whose anchors differ where a heading holds code.
    """
    roots: list[dict[str, Any]] = []
    open_ends: list[dict[str, Any]] = []
    for level, anchor, words in HEADING.findall(html):
        plain = re.sub(r"<[^>]+>", "", re.sub(r'<a class="anchor-link".*?</a>', "", words)).strip()
        entry = {"level": int(level), "id": anchor, "name": plain, "html": plain, "data-toc-label": "", "children": []}
        while open_ends and open_ends[-1]["level"] >= entry["level"]:
            open_ends.pop()
        (open_ends[-1]["children"] if open_ends else roots).append(entry)
        open_ends.append(entry)
    return roots


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write the pictures of blocks into the page; take out a notebook's script that would fetch a library for diagrams."""

    def inline(found: re.Match) -> str:
        svg = (ROOT / "docs" / "diagrams" / f"{found[2]}.svg").read_text(encoding="utf-8")
        return f'<figure class="block" tabindex="0" aria-label="{found[1]}">{svg}</figure>'

    if page.file.src_uri.endswith(".ipynb"):
        page.toc = get_toc(headings(html))
    return SCRIPT.sub(lambda found: "" if "cdnjs" in found[0] else found[0], PICTURE.sub(inline, html))
