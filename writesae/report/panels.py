"""The figures of a page: which ones its numbers allow, and the caption that says how to read each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

import writesae.report.figures as figures
import writesae.report.tables as tables
from writesae.report.svg import ATOM, DELETE, RANDOM
from writesae.report.text import plain

SCATTER = """Each dot is one firing. Across: how far the model's prediction moves when the write is deleted. Up: how far
it moves when one atom takes the write's place. Below the diagonal the atom is the better stand-in. A shaded band along
the axes, if there is one, is where putting back the write itself already lands."""
RATIOS = """For each firing, the change without the write (and with a random atom in its place) divided by the change
with the atom; the curve shows how common each ratio is. Mass to the right of 1× favours the atom; dashes mark the
medians."""
WINS = """Each dot is one atom: the share of its firings in which it beats deletion, best atom first, with a 95% Wilson
interval. Dashes mark a coin toss, the solid line all firings together. Short bars are atoms with many firings."""
SPREAD = """Each line is one thing put in place of the write: the dot is the median KL, the thick bar holds the middle
half of the firings, the thin one the middle 90%. Further left is closer to the untouched model."""
TRAINING = """Top: the share of the writes' variance that the dictionary leaves unexplained, so lower is better. Bottom,
where it was recorded: the number of atoms that have not fired for a while."""
HALF_LIVES = """Each dot is one head: the number of tokens after which its decay gate alone has halved what was written.
Bars hold the middle half of the tokens. High heads carry writes far, low heads forget within a few tokens."""


@dataclass(frozen=True)
class Panel:
    """One figure of the page."""

    title: str
    """The question it answers."""
    svg: Markup
    """The drawing."""
    caption: str
    """What it shows and how to read it."""


def short(condition: str) -> str:
    """A condition's name, short enough for a figure."""
    name = plain(tables.words(condition, tables.SHORT_CONDITIONS))
    return name if len(name) <= 30 else name[:29] + "…"


def result_panels(firings: pd.DataFrame, reading: str, condition: str, control: str | None) -> list[Panel]:
    """The four figures of a replacement test, all in one reading."""
    rows = tables.compared(firings, reading, condition, "delete")
    native = rows["kl_native"].dropna().to_numpy() if "kl_native" in rows else np.empty(0)
    floor = native if len(native) else None
    scatter = figures.kl_scatter(rows[f"kl_{condition}"].to_numpy(), rows["kl_delete"].to_numpy(), floor)
    thinned = len(figures.thinned(len(rows))) < len(rows)
    more = f" An even share of {figures.MOST_POINTS:,} firings is drawn." if thinned else ""
    panels = [_panel("Closer with the atom, or without the write?", scatter, SCATTER + more)]
    ratios = tables.kl_ratios(firings, reading, condition, ["delete", *([control] if control else [])])
    if ratios:
        curves = figures.ratio_density({short(name): values for name, values in ratios.items()})
        panels.append(_panel("How much closer?", curves, RATIOS))
    wins = figures.win_rates(tables.wins_by_atom(firings, reading, condition))
    panels.append(_panel("Atom by atom", wins, WINS))
    spread = {short(name): kls for name, kls in tables.kls_by_condition(firings, reading).items()}
    colours = {short(condition): ATOM, short("delete"): DELETE, short(control or ""): RANDOM}
    panels.append(_panel("Every stand-in at a glance", figures.condition_strip(spread, colours), SPREAD))
    return panels


def background_panels(
    training_log: pd.DataFrame | Sequence[Mapping[str, Any]] | None,
    half_lives: pd.DataFrame | Sequence[Mapping[str, Any]] | None,
    cell: tuple[int, int] | None,
) -> list[Panel]:
    """How the dictionary was trained and how long the heads remember, as far as either was recorded."""
    panels = []
    log, lives = (pd.DataFrame(rows if rows is not None else ()) for rows in (training_log, half_lives))
    if len(log):
        _require_columns("training_log", log, ("step", "fvu"))
        panels.append(_panel("Training the dictionary", figures.training_curves(log), TRAINING))
    if len(lives):
        _require_columns("half_lives", lives, ("layer", "head", "median"))
        caption = HALF_LIVES + (" The large dot is the head studied here." if cell else "")
        panels.append(_panel("How long each head remembers", figures.half_life_strip(lives, cell), caption))
    return panels


def _panel(title: str, svg: str, caption: str) -> Panel:
    return Panel(title, Markup(svg), caption.replace("\n", " "))


def _require_columns(name: str, table: pd.DataFrame, columns: Sequence[str]) -> None:
    for column in columns:
        if column not in table:
            have = ", ".join(str(other) for other in table.columns)
            raise ValueError(f"{name} has no column {column!r}; its columns are {have}")
