"""One self-contained HTML page about one dictionary: the result, how it was reached, and its atoms in their contexts.

The page loads nothing, from the network or from beside it, and runs nothing: styles, figures and pictures are inside
it, there is no script, and its content security policy forbids both. So it can be mailed, kept and opened anywhere, and
text from a corpus cannot act in it (see `text.py`).
"""

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import writesae.report.tables as tables
from writesae.report.figures import atom_heat_map
from writesae.report.panels import background_panels, result_panels, short
from writesae.report.text import context_markup, plain

ATOM_KEYS = ("id", "key_factor", "value_factor", "firing_rate", "median_coefficient", "win_rate", "contexts")
"""What each entry of `atoms` holds."""


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    settings: Mapping[str, Any],
    firings: pd.DataFrame,
    summary: Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Any]],
    atoms: Sequence[Mapping[str, Any]],
    training_log: pd.DataFrame | Sequence[Mapping[str, Any]] | None = None,
    half_lives: pd.DataFrame | Sequence[Mapping[str, Any]] | None = None,
    notes: Sequence[str] = (),
    condition: str = "atom_listed_coef",
    control: str = "random_listed_coef",
    reading: str = "in_recurrence",
    cell: tuple[int, int] | None = None,
) -> Path:
    """Write the report of one replacement test as one HTML file, whole or not at all, and return its path.

    Args:
        path: The file to write; its folder is made where it is missing.
        title: What the page is about.
        settings: Names and values of everything that was chosen, so that the run can be repeated.
        firings: One row per firing and reading, with KLs in nats; `tables.py` says which columns.
        summary: What `ReplacementResult.summary()` returns; or rows of results by name, each a mapping from column to
            a number, text, `Interval` or `Spread`.
        atoms: The atoms to show, in this order, each with the keys of `ATOM_KEYS`: an integer `id`, `key_factor`
            [d_k] and `value_factor` [d_v] as numpy arrays, `firing_rate` (share of tokens), `median_coefficient`,
            `win_rate` (or None), and `contexts`, each with `tokens`, `weights`, `firing_index`, `file`, `coefficient`
            and where it helps `position`.
        training_log: Rows with `step`, `fvu` and `dead` (number of atoms), or None.
        half_lives: Rows with `layer`, `head`, `median` and, where known, `lower_quartile` and `upper_quartile`
            (tokens), or None.
        notes: Remarks, a paragraph each.
        condition: The condition that the headline compares with deletion.
        control: The condition that stands for chance; ignored where `firings` has no such column.
        reading: The reading of the headline and the figures; the first one there is where it was not taken.
        cell: (layer, head) that the report is about.

    Raises:
        ValueError: a table is empty or lacks a column, an atom lacks a key or comes twice, a context does not fit.
    """
    tables.check_firings(firings, condition)
    available = tables.readings_of(firings)
    reading = reading if reading in available else available[0]
    control_name = control if f"kl_{control}" in firings else None
    head = tables.headline(firings, reading, condition, control_name)
    wins = tables.wins_by_atom(firings, reading, condition)
    background = background_panels(training_log, half_lives, cell)
    page = _environment().get_template("report.html.j2")
    html = page.render(
        title=title,
        style=Markup((_templates() / "style.css").read_text(encoding="utf-8")),
        head=head,
        condition=condition,
        control=control_name,
        readings=available,
        reading_words=tables.words(reading, tables.READINGS),
        summary=_summary_table(summary),
        conditions=tables.conditions_table(firings),
        figures=[*result_panels(firings, reading, condition, control_name), *background],
        atoms=_atom_cards(atoms, wins),
        settings={str(name): tables.cell_text("", value) for name, value in settings.items()},
        notes=list(notes),
    )
    return _write_whole(Path(path), html)


def _templates() -> Path:
    return Path(__file__).parent / "templates"


def _environment() -> Environment:
    """Templates that escape everything and show unseen characters, whatever string they are given."""
    environment = Environment(
        loader=FileSystemLoader(_templates()),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=lambda value: plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters["percent"] = tables.percent
    environment.filters["number"] = tables.number
    environment.filters["short"] = short
    environment.filters["reading"] = lambda name: tables.words(name, tables.READINGS)
    return environment


def _summary_table(summary: Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Columns in the order they first appear, and each row's cells as text."""
    if not isinstance(summary, Mapping):
        summary = tables.replacement_rows(summary)
    columns = list(dict.fromkeys(column for row in summary.values() for column in row))
    rows = {
        str(name): [tables.cell_text(str(column), row[column]) if column in row else "" for column in columns]
        for name, row in summary.items()
    }
    return {"columns": [re.sub(r"\bkl\b", "KL", str(column).replace("_", " ")) for column in columns], "rows": rows}


def _atom_cards(atoms: Sequence[Mapping[str, Any]], wins: pd.DataFrame) -> list[dict[str, Any]]:
    """What the template needs of each atom, checked."""
    totals = {int(row.atom): (int(row.wins), int(row.total)) for row in wins.itertuples()}
    cards: list[dict[str, Any]] = []
    for atom in atoms:
        for key in ATOM_KEYS:
            if key not in atom:
                near = get_close_matches(key, [str(name) for name in atom], n=1)
                hint = f"; the nearest is {near[0]!r}" if near else ""
                raise ValueError(f"an entry of atoms has no {key!r}{hint}")
        number = int(atom["id"])
        if any(card["id"] == number for card in cards):
            raise ValueError(f"atom {number} comes twice in atoms; each atom has one section")
        largest = max((float(np.max(one["weights"])) for one in atom["contexts"] if len(one["weights"])), default=0.0)
        shape = (np.shape(atom["key_factor"])[-1], np.shape(atom["value_factor"])[-1])
        label = f"Atom {number}: outer product of its {shape[0]} key and {shape[1]} value entries"
        svg = atom_heat_map(atom["key_factor"], atom["value_factor"], label)
        cards.append(
            {
                **atom,
                "id": number,
                "contexts": [{**one, "markup": context_markup(one, largest)} for one in atom["contexts"]],
                "shape": shape,
                "svg": Markup(svg.replace("<svg ", f'<svg id="heat-{number}" ', 1)),
                "view": Markup(svg.split('"', 2)[1]),
                "tested": totals.get(number),
            }
        )
    return cards


def _write_whole(path: Path, html: str) -> Path:
    """Put the page in place in one step, so that a reader or a crash never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(html)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path
