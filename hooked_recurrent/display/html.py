"""Pieces of HTML for a notebook's output cell: a card with a title, facts and tables. Everything given is escaped.

No ids and no scripts, so that any number of cards may stand on one page, in JupyterLab, VS Code or a converted notebook.
Text takes the page's own colour, lines and shades are translucent: nothing has to know whether the paper is dark.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from hooked_recurrent.display.text import plain, visible

POSITIVE, NEGATIVE = "211 84 24", "37 116 196"
"""The two hues of signed numbers, as CSS writes red, green and blue."""
STRONGEST = 0.7
"""Opacity of the strongest shade; text on it still reads on white and on black."""
MOST_ROWS = 40
"""A table shows as many rows, and says how many more there are."""

STYLE = """
.hooked-view { color: inherit; font-size: 13px; line-height: 1.5; max-width: 72em; margin: 2px 0 6px; text-align: left; }
.hooked-view .hv-title { font-weight: 600; }
.hooked-view .hv-title small { font-weight: 400; opacity: .75; }
.hooked-view dl.hv-facts { display: grid; grid-template-columns: max-content 1fr; gap: 0 1em; margin: 4px 0; }
.hooked-view dl.hv-facts dt { font-weight: 400; opacity: .75; }
.hooked-view dl.hv-facts dd { margin: 0; overflow-wrap: anywhere; }
.hooked-view .hv-wide { overflow-x: auto; }
.hooked-view table { border-collapse: collapse; margin: 4px 0; font-size: 12px; }
.hooked-view th, .hooked-view td { padding: 2px 9px; text-align: left; vertical-align: top; border: 0;
  border-bottom: 1px solid rgb(128 128 128 / .3); white-space: pre; }
.hooked-view th { font-weight: 600; }
.hooked-view .hv-number { text-align: right; font-variant-numeric: tabular-nums; }
.hooked-view summary { cursor: pointer; opacity: .85; }
.hooked-view .hv-more { opacity: .75; }
.hooked-view .ctl { font-style: normal; font-size: .85em; border: 1px solid currentColor; border-radius: 3px; padding: 0 2px;
  opacity: .8; }
.hooked-view .nl, .hooked-view .tab { font-style: normal; opacity: .5; }
.hooked-view .hv-token .sp { font-style: normal; background: radial-gradient(circle closest-side, rgb(128 128 128 / .9) 0 .06em,
  transparent .08em) center / 100% 100% no-repeat; }
"""

TEMPLATES = {
    "card": """<div class="hooked-view"><style>{{ style }}</style>
<div class="hv-title">{{ title }}{% if note %} <small>{{ note }}</small>{% endif %}</div>
{%- if facts %}<dl class="hv-facts">{% for name, value in facts.items() %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>{% endif %}
{% for part in parts %}{{ part }}
{% endfor %}</div>""",
    "table": """<div class="hv-wide"><table><thead><tr>{% for column in columns %}
<th{% if column in numeric %} class="hv-number"{% endif %}>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr>{% for column in columns %}
<td{% if column in numeric %} class="hv-number"{% endif %}>{{ row.get(column, "") }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% if more %}<div class="hv-more">and {{ more }} more rows</div>{% endif %}""",
    "details": """<details><summary>{{ summary }}</summary>{% for part in parts %}{{ part }}{% endfor %}</details>""",
}


@cache
def environment() -> Environment:
    """Jinja with every value escaped and no value missing in silence."""
    return Environment(autoescape=True, loader=DictLoader(TEMPLATES), undefined=StrictUndefined)


def render(source: str, **values: Any) -> Markup:
    """A template of `TEMPLATES` by its name, or one given as text, filled in."""
    made = environment().get_template(source) if source in TEMPLATES else environment().from_string(source)
    return Markup(made.render(style=Markup(STYLE), **values))


def cell(value: Any) -> Any:
    """What a table shows of a value: floats in four digits, whole numbers with commas, text with what is unseen shown."""
    if isinstance(value, Markup):
        return value
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return Markup(", ").join(cell(one) for one in value)
    if isinstance(value, dict):
        return Markup(", ").join(Markup("{} {}").format(one_line(str(name)), cell(one)) for name, one in value.items())
    return one_line(value) if isinstance(value, str) else plain(str(value))


def one_line(text: str) -> Markup:
    """Text as markup with line ends shown, and not made."""
    return visible(text).replace("\n", "")


def table(rows: Sequence[Mapping[str, Any]], most: int = MOST_ROWS) -> Markup:
    """Rows as a table whose columns are the names that occur, in order; a column that holds numbers alone stands right."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    numeric = [
        name
        for name in columns
        if all(isinstance(row.get(name), int | float | None) and not isinstance(row.get(name), bool) for row in rows)
    ]
    shown = [{name: cell(value) for name, value in row.items()} for row in rows[:most]]
    more = f"{len(rows) - most:,}" if len(rows) > most else ""
    return render("table", columns=columns, numeric=numeric, rows=shown, more=more)


def details(summary: str, *parts: Markup) -> Markup:
    """Parts that a click opens."""
    return render("details", summary=summary, parts=parts)


def card(title: str, facts: Mapping[str, Any] | None = None, parts: Iterable[Markup] = (), note: str = "") -> str:
    """A whole output: a title with a note, facts by name (None left out), and tables or details below."""
    told = {name: cell(value) for name, value in (facts or {}).items() if value is not None}
    return str(render("card", title=one_line(title), note=one_line(note), facts=told, parts=tuple(parts)))
