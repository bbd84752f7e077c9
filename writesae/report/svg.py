"""From a matplotlib figure to a piece of SVG that lives inside a page.

matplotlib draws with fixed colours, a page has a light and a dark face. So figures are drawn in colour ROLES: each role
is a hex value that nothing else uses, and `to_svg` writes a CSS variable in its place, with the light colour as the
fallback where no style sheet defines it. Text stays text, so it takes the page's font and can be selected and searched.
The same figure gives the same bytes on every run.
"""

import re
from collections.abc import Callable
from html import escape
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, GRID, SURFACE = "#010101", "#010102", "#010103", "#010104"
ATOM, DELETE, RANDOM = "#010105", "#010106", "#010107"
ROLES = {
    INK: "var(--ink, #1d2530)",
    MUTED: "var(--muted, #5b6675)",
    GRID: "var(--grid, #e3e7ec)",
    SURFACE: "var(--surface, #ffffff)",
    ATOM: "var(--atom, #0f6fb8)",
    DELETE: "var(--delete, #c2541b)",
    RANDOM: "var(--random, #7a5aa8)",
}
"""What each colour role becomes in the page."""

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "writesae",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib, so label sizes are the same on every machine
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.minor.visible": False,
    "ytick.minor.visible": False,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def draw(
    label: str, name: str, paint: Callable[..., None], width: float = 4.6, height: float = 3.6, rows: int = 1
) -> str:
    """Let `paint` fill `rows` stacked axes that share their x axis, and return the figure as inline SVG.

    Args:
        label: What the figure is, for readers who cannot see it.
        name: Prefix of the ids inside the SVG; two figures of one page need two names.
        paint: Called with one `Axes` per row.
        width: Width in inches. The default reads well at half a desktop page and at the full width of a phone.
        height: Height in inches.
        rows: Number of stacked axes.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes: list[Axes] = [figure.add_subplot(rows, 1, 1)]
        axes += [figure.add_subplot(rows, 1, row, sharex=axes[0]) for row in range(2, rows + 1)]
        for upper in axes[:-1]:
            upper.tick_params(labelbottom=False)
        paint(*axes)
        return to_svg(figure, label, name)


def to_svg(figure: Figure, label: str, name: str) -> str:
    """The figure as one `<svg>` element: colours as roles, ids prefixed by `name`, nothing loaded from anywhere."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    markup = buffer.getvalue()
    markup = markup[markup.index("<svg") :]
    # matplotlib's own style element would reach every element of the page; the page states that rule for figures.
    markup = re.sub(r"<style.*?</style>|<metadata.*?</metadata>|<!--.*?-->", "", markup, flags=re.DOTALL)
    view = re.search(r'viewBox="([^"]+)"', markup)
    body = markup[markup.index(">") + 1 :]
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'xlink:href="#', f'href="#{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub("|".join(ROLES), lambda role: ROLES[role.group()], body)
    return f'<svg viewBox="{view.group(1) if view else ""}" role="img" aria-label="{escape(label)}">{body}'


def power_of_ten(value: float, _position: object = None) -> str:
    """Tick label of a log axis: 10⁻³; nothing between the powers."""
    exponent = f"{value:e}"
    mantissa, power = exponent.split("e")
    return f"10{str(int(power)).translate(_SUPERSCRIPT)}" if float(mantissa) == 1 else ""
