"""A text whose tokens are shaded by numbers, in the way of circuitsvis: orange above zero, blue below, stronger for larger."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from hooked_recurrent.display.html import NEGATIVE, POSITIVE, STRONGEST, one_line, render
from hooked_recurrent.display.text import plain, visible

MOST_CHARACTERS = 200
"""A longer token is cut where it is shown."""
FAINTEST = 0.005
"""Shades below this opacity are left out: they cannot be seen."""

# The rows of a view are radio buttons that are drawn as their names, each in front of the text that it shows: CSS alone
# switches between them. The form keeps the buttons of one view apart from all others on the page without a name to invent.
STYLE = Markup("""
.hooked-tokens form { display: flex; flex-wrap: wrap; gap: 4px; margin: 2px 0; }
.hooked-tokens form > section { order: 1; flex: 0 0 100%; max-width: 100%; }
.hooked-tokens input { appearance: none; -webkit-appearance: none; margin: 0; width: auto; height: auto; padding: 0 8px;
  font: inherit; color: inherit; background: none; border: 1px solid rgb(128 128 128 / .5); border-radius: 10px;
  cursor: pointer; }
.hooked-tokens input::after { content: attr(data-name); unicode-bidi: isolate; white-space: pre; }
.hooked-tokens input:checked { background: rgb(128 128 128 / .3); font-weight: 600; }
.hooked-tokens input:focus-visible { outline: 2px solid currentColor; outline-offset: 1px; }
.hooked-tokens input:not(:checked) + section { display: none; }
.hooked-tokens .hv-text { font-family: var(--jp-code-font-family, ui-monospace, monospace); white-space: pre-wrap;
  overflow-wrap: anywhere; line-height: 1.9; direction: ltr; }
.hooked-tokens .hv-text bdi { border-radius: 3px; padding: 2px 0; box-decoration-break: clone;
  -webkit-box-decoration-break: clone; }
.hooked-tokens .hv-text bdi:hover { outline: 1px solid currentColor; }
.hooked-tokens .hv-text mark { background: none; color: inherit; font-weight: 700; unicode-bidi: isolate; }
.hooked-tokens .hv-text mark bdi { outline: 2px solid currentColor; }
.hooked-tokens .hv-legend { display: flex; align-items: center; gap: 6px; font-size: 11px; }
.hooked-tokens .hv-legend span { opacity: .85; font-variant-numeric: tabular-nums; }
.hooked-tokens .hv-legend i { width: 120px; height: 9px; border: 1px solid rgb(128 128 128 / .5); border-radius: 2px; }
""")
TEMPLATE = """<div class="hooked-view hooked-tokens"><style>{{ style }}{{ own }}</style>
{% if title %}<div class="hv-title">{{ title }}</div>{% endif %}
<form method="dialog">{% for row in rows %}
{% if rows | length > 1 %}<input type="radio" name="row" data-name="{{ row.name }}" aria-label="{{ row.name }}"
{%- if loop.first %} checked{% endif %}>{% endif -%}
<section><div class="hv-text hv-token" dir="ltr">{{ row.text }}</div>
<div class="hv-legend"><b>{{ row.name }}</b><span>{{ row.low }}</span><i style="background: {{ row.ramp }}"></i>
<span>{{ row.high }}</span></div></section>{% endfor %}
</form></div>"""


class Row(NamedTuple):
    """One row of numbers of a view."""

    name: str
    values: np.ndarray
    """[pos], float64."""
    scale: float
    """The size that is drawn at full strength."""


class TokenView:
    """A text and the numbers that shade it. A notebook shows it as the last value of a cell; `str(view)` is its HTML."""

    def __init__(self, tokens: Sequence[str], rows: Sequence[Row], title: str, first: int, mark: int | None):
        self.tokens, self.rows, self.title, self.first, self.mark = list(tokens), list(rows), title, first, mark

    def __repr__(self) -> str:
        """One line: how many tokens, and the names of the rows."""
        names = [plain(row.name) for row in self.rows]
        shown = ", ".join(names if len(names) <= 4 else [*names[:3], f"... {len(names)} in all"])
        return f"TokenView({len(self.tokens)} tokens shaded by {shown})"

    def __str__(self) -> str:
        return self._repr_html_()

    def _repr_html_(self) -> str:
        """The shaded text with a legend, and buttons where there are several rows."""
        rows = [{**_legend(row), "name": plain(row.name), "text": self._text(row)} for row in self.rows]
        return str(render(TEMPLATE, own=STYLE, title=one_line(self.title), rows=rows))

    def _text(self, row: Row) -> Markup:
        parts = []
        for index, (token, value) in enumerate(zip(self.tokens, row.values.tolist(), strict=True)):
            cut = token if len(token) <= MOST_CHARACTERS else f"{token[:MOST_CHARACTERS]}…"
            shown = visible(cut) if cut else Markup('<i class="ctl" title="an empty token">∅</i>')
            # A frame around a token that ends a line would reach into the next one, so the break itself stands outside.
            line_break = Markup("\n") if shown.endswith("\n") else Markup("")
            shade = _shade(value, row.scale)
            style = Markup(' style="background:{}"').format(shade) if shade else ""
            about = f"position {self.first + index}: {_number(value)}"
            framed = Markup('<bdi{} title="{}">{}</bdi>').format(style, about, shown.removesuffix("\n"))
            parts.append((Markup("<mark>{}</mark>").format(framed) if index == self.mark else framed) + line_break)
        return Markup("").join(parts)


def tokens_html(
    tokens: Sequence[str],
    values: Any,
    *,
    names: Sequence[str] | None = None,
    title: str = "",
    scale: float | None = None,
    first: int = 0,
    mark: int | None = None,
) -> TokenView:
    """Shade every token of a text by a number; of several rows of numbers a button each, one shown at a time.

    Args:
        tokens: what each position says, such as `model.to_str_tokens(text)`.
        values: a number per token [pos], several rows of them [row, pos] (a tensor, an array, lists), or rows by name
            {name: [pos]}. What is NaN stays without a shade.
        names: what to call the rows; their numbers by default.
        title: what stands above.
        scale: the size that is drawn at full strength, for every row; by default each row's largest size.
        first: the absolute position of the first token, for the hover text.
        mark: the index of a token to frame.

    Raises:
        ValueError: rows that have not a number for every token, names that do not fit, or a scale that is not above 0.
        IndexError: a mark outside the tokens.
    """
    tokens = [tokens] if isinstance(tokens, str) else list(tokens)
    if isinstance(values, Mapping):
        if names is not None:
            raise ValueError("values by name have their names already: give names with a tensor of rows only")
        named = {str(name): _numbers(row) for name, row in values.items()}
    else:
        rows = _numbers(values)
        rows = rows[None] if rows.ndim == 1 else rows
        names = [f"row {index}" for index in range(len(rows))] if names is None else list(names)
        if len(rows) == 1 and names == ["row 0"]:
            names = ["value"]
        if len(names) != len(rows) or len(set(names)) != len(names):
            raise ValueError(f"there are {len(rows)} rows of values, but {len(set(names))} different names")
        named = dict(zip(names, rows, strict=True))
    if not named:
        raise ValueError("there is no row of values to shade the tokens by")
    for name, row in named.items():
        if row.shape != (len(tokens),):
            raise ValueError(
                f"{name!r} has values of shape {row.shape}, expected one number for each of {len(tokens)} tokens"
            )
    if scale is not None and not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale is the size drawn at full strength and must be above 0, got {scale}")
    if mark is not None and not 0 <= mark < len(tokens):
        raise IndexError(f"mark is token {mark}, but the text has {len(tokens)}")
    made = [Row(name, row, scale or _largest(row)) for name, row in named.items()]
    return TokenView(tokens, made, title, first, mark)


def _numbers(values: Any) -> np.ndarray:
    """A tensor (on any device, with a graph or without), an array or lists, as float64."""
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _largest(row: np.ndarray) -> float:
    finite = np.abs(row[np.isfinite(row)])
    return float(finite.max(initial=0.0)) or 1.0


def _shade(value: float, scale: float) -> str:
    """A translucent colour; nothing where it could not be seen."""
    strength = 0.0 if math.isnan(value) else STRONGEST * min(1.0, abs(value) / scale)
    return "" if strength < FAINTEST else _colour(value, strength)


def _colour(sign: float, opacity: float) -> str:
    return f"rgb({POSITIVE if sign > 0 else NEGATIVE} / {opacity:.3g})"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _legend(row: Row) -> dict[str, str]:
    """The ends of the scale and the ramp between: from 0 where no number is below it, or to 0 where none is above."""
    below, above = bool((row.values < 0).any()), bool((row.values > 0).any())
    ends = (-row.scale if below else 0.0, row.scale if above or not below else 0.0)
    stops = [_colour(end, STRONGEST * (end != 0)) for end in ends]
    if below and above:
        stops.insert(1, "transparent")
    return {"low": _number(ends[0]), "high": _number(ends[1]), "ramp": f"linear-gradient(to right, {', '.join(stops)})"}
