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
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT / "hooked_recurrent" / "zoo"
OPTIONAL = {"CHANGELOG.md": ("changelog.md", "Changelog"), "CONTRIBUTING.md": ("contributing.md", "Contributing")}
PICTURE = re.compile(r'<p><img alt="([^"]*)" src="[^"]*diagrams/(\w+)\.svg"\s*/?></p>')
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
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Bring in what lies outside."""
    for path, page in outside().items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


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


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write the pictures of blocks into the page."""

    def inline(found: re.Match) -> str:
        svg = (ROOT / "docs" / "diagrams" / f"{found[2]}.svg").read_text(encoding="utf-8")
        return f'<figure class="block" tabindex="0" aria-label="{found[1]}">{svg}</figure>'

    return PICTURE.sub(inline, html)
