"""One HTML page with every atom of a dictionary. It loads nothing, from the network or from beside it.

The page is markup, styles and scripts of this package, and data: JSON in blocks that a browser does not run, unpacked by the
page's script when it is needed, and shown as text content alone. Its content security policy lets no other script run than
those whose hashes it names, lets no style in but the page's own, and lets nothing be fetched. So it can be mailed, kept and
opened anywhere, and a text from a corpus cannot act in it.
"""

import base64
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hooked_recurrent.files import write_text
from writesae.browser.data import COLUMNS, KINDS, AtomBrowserData, Listed
from writesae.browser.packing import Packed, embedded, pack, pack_quantised
from writesae.report.text import plain

HERE = Path(__file__).parent
SCRIPTS = ("base", "data", "text", "state", "charts", "table", "atom", "overview", "main")
"""The page's scripts, in the order in which they need each other."""


def render(
    data: AtomBrowserData,
    *,
    live: bool = False,
    markup: str = "",
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
) -> str:
    """The page as one string.

    Args:
        data: what `collect` made.
        live: whether the page may talk to the server that it came from (its policy then has connect-src 'self').
        markup: trusted HTML that stands between the header and the two panes, such as a box for prompts.
        styles: further style sheets, after the page's own.
        scripts: further scripts, after the page's own; they find its tools as the global `AtomPage`.

    Raises:
        ValueError: where a script or style would end the element that it is put into.
    """
    sheets = [*_static("css", ("page", "atom")), *styles]
    programs = [*_static("js", SCRIPTS), *scripts]
    for text in (*sheets, *programs):
        if "</script" in text.lower() or "</style" in text.lower():
            raise ValueError("a script or style holds the tag that ends it: write it in two pieces")
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=lambda value: plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters["count"] = "{:,}".format
    return environment.get_template("browser.html.j2").render(
        about=data.about,
        n_atoms=len(data),
        settings=_settings(data.about),
        policy=Markup(_policy(sheets, programs, live)),
        styles=[Markup(text) for text in sheets],
        scripts=[Markup(text) for text in programs],
        blocks={name: Markup(embedded(value)) for name, value in packed(data).items()},
        markup=Markup(markup),
        live=live,
    )


def write_page(path: str | os.PathLike, data: AtomBrowserData) -> Path:
    """Write the page, whole or not at all, into a file whose folder is made where it is missing; returns its path."""
    path = Path(path)
    write_text(path, render(data))
    return path


def packed(data: AtomBrowserData) -> dict[str, Any]:
    """The page's blocks of data by name, as JSON values."""
    kinds = {kind: number for number, kind in enumerate(KINDS)}
    columns = {name: data.atoms[name] for name in COLUMNS}
    columns["kind"] = columns["kind"].map(kinds)
    contexts = data.contexts
    return {
        "about": {**data.about, "kinds": list(KINDS), "files": data.files},
        "table": {name: pack(column.to_numpy()) for name, column in columns.items()},
        "words": {"text": data.words, "id": pack(data.word_ids)},
        "lists": {name: _list(getattr(data, name)) for name in ("fires_on", "promoted", "suppressed", "neighbours")},
        "contexts": {
            **{
                name: pack(getattr(contexts, name)) for name in ("first", "random", "passage", "position", "at", "word")
            },
            "activation": pack_quantised(contexts.activation),
        },
        "shapes": {
            "key": pack_quantised(data.key),
            "value": pack_quantised(data.value),
            "leading": pack(data.leading),
            "histogram": pack(data.histogram),
        },
    }


def _list(listed: Listed) -> dict[str, Packed]:
    return {"index": pack(listed.index), "number": pack(listed.number)}


def _static(ending: str, names: Iterable[str]) -> list[str]:
    return [(HERE / "static" / f"{name}.{ending}").read_text(encoding="utf-8") for name in names]


def _policy(styles: Sequence[str], scripts: Sequence[str], live: bool) -> str:
    """What the browser may do with the page: run and apply exactly what is in it."""
    parts = [
        "default-src 'none'",
        f"script-src {_hashes(scripts)}",
        f"style-src {_hashes(styles)}",
        "connect-src 'self'" if live else "",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    return "; ".join(part for part in parts if part)


def _hashes(texts: Sequence[str]) -> str:
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode('ascii')}'" for digest in digests)


def _settings(about: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Everything that was chosen, as lines: nested names are joined by a dot."""
    lines: list[tuple[str, str]] = []
    for name, value in about.items():
        if isinstance(value, dict):
            lines += _settings(value, f"{prefix}{name}.")
        else:
            lines.append((f"{prefix}{name}", "–" if value is None else str(value)))
    return lines
