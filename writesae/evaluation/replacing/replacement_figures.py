"""Pictures of replacement tests, of one cell and of many, from the rows of their summaries."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

ATOM, DELETE, RANDOM, MUTED = "#2f6db5", "#444444", "#c8553d", "#999999"
_STYLES = {"atom": (ATOM, "o"), "delete": (DELETE, "s"), "random": (RANDOM, "^")}
Row = Mapping[str, Any]


def replacement_figure(rows: Sequence[Row]) -> Figure:
    """Left: median KL of atom, deletion and random per reading, the floor as a line. Right: win rates over passages.

    Args:
        rows: `ReplacementResult.summary()`. The left half shows the strongest atom at its coefficient.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    readings = list(dict.fromkeys(row["reading"] for row in rows))
    headline = [row for row in rows if (row["pool"], row["scale"]) == ("dominant", "coef")]
    for number, (name, (colour, marker)) in enumerate(_STYLES.items()):
        places = np.arange(len(headline)) + 0.18 * (number - 1)
        medians, errors = ([row[f"{what}_kl_{name}"] for row in headline] for what in ("median", "error"))
        left.errorbar(places, medians, errors, fmt=marker, color=colour, label=name, capsize=2)
    for x, row in enumerate(headline):
        if row["floor_max"] > 0:
            left.hlines(row["floor_max"], x - 0.35, x + 0.35, color=MUTED, linestyle=":", label="" if x else "floor")
    left.set_xticks(range(len(headline)), [row["reading"].replace("_", " ") for row in headline])
    left.set(yscale="log", ylabel="median KL (nats), ± MAD / √n", title="strongest atom at its coefficient")
    left.legend(frameon=False, loc="center")  # between the effects and the floor, which are far apart
    shown = list(dict.fromkeys((row["pool"], row["scale"]) for row in rows))
    for number, reading in enumerate(readings):
        here = [row for row in rows if row["reading"] == reading]
        y = [shown.index((row["pool"], row["scale"])) + 0.2 * (number - (len(readings) - 1) / 2) for row in here]
        rates_with_bars(right, y, [row["win_rate"] for row in here], [row["by_passage"] for row in here], f"C{number}")
        right.plot([], [], "o", color=f"C{number}", label=reading.replace("_", " "))
    right.axvline(0.5, color=MUTED, linewidth=0.8)
    right.set_yticks(range(len(shown)), [f"{pool}, {scale}" for pool, scale in shown])
    right.invert_yaxis()
    right.xaxis.set_major_formatter(PercentFormatter(1.0))
    right.set(xlim=(-0.02, 1.02), xlabel="atom closer than deletion", title="win rates, 95% over passages")
    right.legend(frameon=False)
    return figure


def cells_figure(rows: Sequence[Row], title: str) -> Figure:
    """Win rate of every cell with its interval over passages; the mean over cells as a line, ± one standard deviation.

    Args:
        rows: one per cell: layer, head, n, win_rate, low, high; cells where nothing fired (n = 0) are left empty.
        title: what was compared.
    """
    figure = Figure(figsize=(max(4.0, 1.5 + 0.35 * len(rows)), 4.0), layout="constrained")
    axes = figure.subplots()
    found = [(x, row) for x, row in enumerate(rows) if row["n"] > 0]
    if found:
        rates = np.array([row["win_rate"] for _, row in found])
        spread = float(rates.std(ddof=1)) if len(rates) > 1 else 0.0
        axes.axhline(rates.mean(), color=ATOM, linewidth=1, label=f"mean {rates.mean():.1%} ± {spread:.1%}")
        axes.axhspan(rates.mean() - spread, rates.mean() + spread, color=ATOM, alpha=0.12)
        for x, row in found:
            low, high = (row[side] if np.isfinite(row[side]) else row["win_rate"] for side in ("low", "high"))
            axes.plot([x, x], [low, high], color=DELETE, linewidth=1.2)
            axes.plot([x], [row["win_rate"]], "o", color=DELETE, markersize=4)
        axes.legend(frameon=False)
    axes.axhline(0.5, color=MUTED, linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(rows)), [f"{row['layer']}.{row['head']}" for row in rows], rotation=90)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(ylim=(-0.02, 1.02), xlabel="layer.head", ylabel="atom closer than deletion", title=title)
    return figure


def rates_with_bars(axes: Any, y: Sequence[float], rates: Sequence[float], bars: Sequence[Any], colour: str) -> None:
    """Dots with their intervals along x; an interval that is not known is left out."""
    axes.plot(rates, y, "o", color=colour, markersize=4)
    for height, (low, high) in zip(y, bars, strict=True):
        if low is not None and np.isfinite(low):
            axes.plot([low, high], [height, height], color=colour, linewidth=1.2)
