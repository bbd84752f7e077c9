"""Result tables to figures: each function takes plain numbers and returns one inline SVG (see `svg.py`).

No tensor comes this far, and nothing here knows where the numbers were measured. KLs are in nats. A logarithmic axis
has no zero, so a KL below `SMALLEST_KL` (which a float32 model cannot tell from zero) is drawn at `SMALLEST_KL`.
"""

import base64
from collections.abc import Mapping
from html import escape
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter
from PIL import Image
from scipy.stats import gaussian_kde

from writesae.evaluation.statistics import wilson_interval
from writesae.report.svg import ATOM, DELETE, GRID, INK, MUTED, RANDOM, draw, power_of_ten

SMALLEST_KL = 1e-10
"""Where KLs of zero are drawn on a logarithmic axis, in nats."""
MOST_POINTS = 2500
"""A scatter with more points than this shows an even share of them; a page has to stay small."""
_SERIES = (DELETE, RANDOM, ATOM, MUTED)


def thinned(n: int) -> np.ndarray:
    """Indices of at most `MOST_POINTS` of n rows, evenly spread, the same on every run."""
    return np.unique(np.linspace(0, n - 1, min(n, MOST_POINTS)).astype(int))


def kl_scatter(kl_atom: np.ndarray, kl_delete: np.ndarray, floor: np.ndarray | None = None) -> str:
    """KL of each firing under deletion (across) against the atom (up), both logarithmic.

    Points below the diagonal are firings where the atom stays closer to the model. `floor` is the KL of the native
    write put back in place of itself; its 99th percentile is shaded, as nothing in there can be told from zero.
    """
    rows = thinned(len(kl_atom))
    up, across = (np.maximum(np.asarray(values, float)[rows], SMALLEST_KL) for values in (kl_atom, kl_delete))
    wins = up < across

    def paint(axes: Axes) -> None:
        both = np.concatenate([up, across])
        low, high = 10.0 ** np.floor(np.log10(both.min())), 10.0 ** np.ceil(np.log10(both.max()))
        high = max(high, 10 * low)
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        axes.plot([low, high], [low, high], color=MUTED, linewidth=0.9, zorder=2)
        if floor is not None:
            edge = float(np.quantile(floor, 0.99))
            if edge > low:
                axes.axvspan(low, edge, color=GRID, zorder=1)
                axes.axhspan(low, edge, color=GRID, zorder=1)
        style: dict[str, Any] = {
            "linestyle": "none",
            "marker": "o",
            "markersize": 2.6,
            "markeredgewidth": 0,
            "alpha": 0.5,
            "zorder": 3,
        }
        axes.plot(across[~wins], up[~wins], color=DELETE, label="deletion closer", **style)
        axes.plot(across[wins], up[wins], color=ATOM, label="atom closer", **style)
        axes.set_xlabel("KL after deleting the write (nats)")
        axes.set_ylabel("KL after replacing it by the atom (nats)")
        _decades(axes, low, high)
        handles, labels = axes.get_legend_handles_labels()
        legend = axes.legend(handles[::-1], labels[::-1], loc="upper left", markerscale=2, handletextpad=0.1)
        for handle in filter(None, legend.legend_handles):
            handle.set_alpha(1)

    return draw("Scatter of KL with the atom against KL with the write deleted", "scatter", paint)


def _decades(axes: Axes, low: float, high: float, which: tuple[str, ...] = ("x", "y")) -> None:
    """Ticks at powers of ten, no more than seven of them, the same ones on every axis named."""
    first, last = int(np.log10(low)), int(np.log10(high))
    ticks = FixedLocator([10.0**power for power in range(first, last + 1, max(1, -(-(last - first) // 6)))])
    for axis in (getattr(axes, f"{name}axis") for name in which):
        axis.set_major_locator(ticks)
        axis.set_major_formatter(FuncFormatter(power_of_ten))
        axis.set_minor_locator(NullLocator())


def ratio_density(ratios: Mapping[str, np.ndarray]) -> str:
    """Density over firings of how many times larger a KL is than the atom's; one curve per name, medians marked.

    Ratios are positive; the axis is logarithmic, and the densities are over log10 of the ratio.
    """
    logs = {name: np.log10(np.asarray(values, float)) for name, values in ratios.items()}
    pooled = np.concatenate(list(logs.values()))
    low, high = np.quantile(pooled, [0.005, 0.995])
    low, high = min(low, -0.5) - 0.15, max(high, 0.5) + 0.15
    grid = np.linspace(low, high, 160)

    def paint(axes: Axes) -> None:
        for (name, values), colour in zip(logs.items(), _SERIES, strict=False):
            density = _density(values, grid)
            axes.fill_between(grid, density, color=colour, alpha=0.16, linewidth=0)
            median = float(np.median(values))
            axes.plot(grid, density, color=colour, linewidth=1.5, label=f"{name} (median ×{10**median:.3g})")
            height = float(np.interp(median, grid, density))
            axes.plot([median, median], [0, height], color=colour, linewidth=1, linestyle=(0, (3, 2)))
        axes.axvline(0, color=INK, linewidth=0.9)
        axes.set(xlim=(low, high), ylim=(0, axes.get_ylim()[1] * 1.28), xlabel="times the atom's KL", ylabel="density")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(FixedLocator(_ratio_ticks(low, high)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{10**value:.3g}×"))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="x", visible=False)
        axes.legend(loc="upper right", handlelength=1.4)

    return draw("Density of the ratio of each KL to the atom's KL", "ratios", paint)


def _density(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Gaussian kernel density; values without any spread get a narrow bump instead of an error."""
    if len(values) < 3 or np.ptp(values) < 1e-9:
        return np.exp(-0.5 * ((grid - values.mean()) / 0.05) ** 2) / (0.05 * np.sqrt(2 * np.pi))
    return gaussian_kde(values)(grid)


def _ratio_ticks(low: float, high: float) -> list[float]:
    """Round ratios in log10, about six of them: halves and fifths of a decade only where the range is short."""
    steps = (1.0, 2.0, 5.0) if high - low < 2.5 else (1.0,)
    every = max(1, int(np.ceil((high - low) / 6)))
    powers = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    ticks = [power + np.log10(step) for power in powers if power % every == 0 for step in steps]
    return [tick for tick in ticks if low <= tick <= high]


def win_rates(table: pd.DataFrame) -> str:
    """One dot per atom, sorted: the share of its firings in which it beats deletion, with Wilson's 95% interval.

    `table` has the columns `atom`, `wins`, `total`.
    """
    rows = table.assign(rate=table["wins"] / table["total"]).sort_values(["rate", "total"], ascending=[False, False])
    intervals = [wilson_interval(wins, total) for wins, total in zip(rows["wins"], rows["total"], strict=True)]
    place = np.arange(len(rows))

    def paint(axes: Axes) -> None:
        axes.axhline(0.5, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        pooled = rows["wins"].sum() / rows["total"].sum()
        axes.axhline(pooled, color=ATOM, linewidth=0.9, alpha=0.6)
        lows, highs = [bound.low for bound in intervals], [bound.high for bound in intervals]
        axes.vlines(place, lows, highs, color=ATOM, linewidth=min(2.0, 90 / len(rows)), alpha=0.35)
        size = float(np.clip(240 / len(rows), 2, 5))
        axes.plot(place, rows["rate"], "o", color=ATOM, markersize=size, markeredgewidth=0)
        axes.set(ylim=(-0.03, 1.05), xlim=(-0.7, len(rows) - 0.3), ylabel="share of firings where the atom is closer")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(axis="x", visible=False)
        if len(rows) <= 24:
            axes.set_xticks(place, [str(atom) for atom in rows["atom"]], rotation=90 if len(rows) > 10 else 0)
            axes.set_xlabel("atom")
        else:
            axes.set_xlabel("atoms, best first")

    return draw("Win rate of each atom over deletion with its interval", "wins", paint)


def condition_strip(table: Mapping[str, np.ndarray], colours: Mapping[str, str]) -> str:
    """KLs of every condition, one line each: a dot at the median, thick the middle half, thin the middle 90%.

    `table` maps a condition's words to its KLs, top line first; `colours` gives some of them a role of their own.
    """
    names = list(table)
    columns = [np.maximum(np.asarray(table[name], float), SMALLEST_KL) for name in names]
    place = np.arange(len(names))[::-1]

    def paint(axes: Axes) -> None:
        for row, name, column in zip(place, names, columns, strict=True):
            colour = colours.get(name, MUTED)
            lowest, low, middle, high, highest = np.quantile(column, [0.05, 0.25, 0.5, 0.75, 0.95])
            axes.hlines(row, lowest, highest, color=colour, linewidth=1, alpha=0.55)
            axes.hlines(row, low, high, color=colour, linewidth=4, alpha=0.45)
            axes.plot([middle], [row], "o", color=colour, markersize=5.5, markeredgewidth=0)
        axes.set(xscale="log", ylim=(-0.6, len(names) - 0.4), xlabel="KL (nats)")
        axes.set_yticks(place, names)
        low, high = axes.get_xlim()
        _decades(axes, 10.0 ** np.floor(np.log10(low)), 10.0 ** np.ceil(np.log10(high)), ("x",))
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)

    return draw("KL of every condition: median, middle half and middle 90%", "conditions", paint)


def training_curves(log: pd.DataFrame) -> str:
    """Unexplained variance (top) and number of dead atoms (bottom) by training step.

    `log` has `step` and `fvu`, and `dead` where it was recorded.
    """
    with_dead = "dead" in log

    def paint(upper: Axes, lower: Axes | None = None) -> None:
        upper.plot(log["step"], log["fvu"], color=ATOM, linewidth=1.5)
        upper.set_yscale("log")
        upper.yaxis.set_major_locator(FixedLocator(_round_numbers(log["fvu"].min(), log["fvu"].max())))
        upper.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        upper.yaxis.set_minor_locator(NullLocator())
        upper.set_ylabel("unexplained variance")
        bottom = upper
        if lower is not None:
            lower.plot(log["step"], log["dead"], color=DELETE, linewidth=1.5)
            lower.set_ylim(0, max(4.0, 1.08 * float(log["dead"].max())))
            lower.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            lower.set_ylabel("dead atoms")
            bottom = lower
        bottom.set_xlabel("training step")
        bottom.set_xlim(0, max(1.0, float(log["step"].max())))
        bottom.xaxis.set_major_locator(MaxNLocator(6, integer=True))

    label = "Training of the dictionary: unexplained variance and dead atoms by step"
    return draw(label, "training", paint, rows=1 + with_dead)


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that cover a range."""
    powers = range(int(np.floor(np.log10(max(low, 1e-12)))), int(np.ceil(np.log10(max(high, 1e-12)))) + 1)
    steps = (1, 2, 5) if len(powers) <= 4 else (1,)
    return [step * 10.0**power for power in powers for step in steps]


def half_life_strip(half_lives: pd.DataFrame, cell: tuple[int, int] | None = None) -> str:
    """One dot per head: after how many tokens its decay alone has halved what was written, by layer.

    `half_lives` has the columns `layer`, `head` and `median` (tokens), and with `lower_quartile` and `upper_quartile`
    each dot gets a bar; `cell` is the (layer, head) that the report is about, drawn larger. A head that never forgets
    (infinity) is drawn at the top edge.
    """
    layers = sorted(half_lives["layer"].unique())
    bars = [name for name in ("lower_quartile", "upper_quartile") if name in half_lives]
    tokens = half_lives[["median", *bars]].to_numpy(float)
    tokens = tokens[np.isfinite(tokens) & (tokens > 0)]
    low, high = (max(float(tokens.min()), 0.05), float(tokens.max())) if len(tokens) else (1.0, 2.0)
    low, high = 2.0 ** np.floor(np.log2(low) - 0.5), 2.0 ** np.ceil(np.log2(max(high, 2 * low)) + 0.5)

    def paint(axes: Axes) -> None:
        for place, layer in enumerate(layers):
            heads = half_lives[half_lives["layer"] == layer].sort_values("head")[["head", "median", *bars]]
            spread = np.linspace(-0.28, 0.28, len(heads)) if len(heads) > 1 else np.zeros(1)
            here = [cell == (int(layer), int(head)) for head in heads.pop("head")]
            for chosen, colour, size in ((False, MUTED, 5), (True, ATOM, 9)):
                pick = np.array(here) == chosen
                across, shown = place + spread[pick], heads[pick].clip(low, high)
                if len(bars) == 2:
                    axes.vlines(across, shown[bars[0]], shown[bars[1]], color=colour, linewidth=1.2, alpha=0.4)
                axes.plot(across, shown["median"], "o", color=colour, markersize=size, markeredgewidth=0)
        axes.set(yscale="log", ylim=(low, high), xlim=(-0.6, len(layers) - 0.4), xlabel="layer")
        axes.set_ylabel("half-life of a write (tokens)")
        powers = np.arange(np.log2(low), np.log2(high) + 0.5)
        axes.yaxis.set_major_locator(FixedLocator(list(2.0 ** powers[:: max(1, len(powers) // 7)])))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
        axes.grid(axis="x", visible=False)

    return draw("Decay half-life of every head by layer", "halflives", paint)


def atom_heat_map(key_factor: np.ndarray, value_factor: np.ndarray, label: str) -> str:
    """An atom as a picture: the outer product, its key factor down the left side, its value factor along the foot.

    Args:
        key_factor: [d_k], or [rank, d_k].
        value_factor: [d_v], or [rank, d_v]. Above rank one there are several factors a side, and none is drawn.
        label: What the picture shows, for readers who cannot see it.

    Raises:
        ValueError: the two factors disagree in rank, or hold a value that is not finite.
    """
    keys, values = np.atleast_2d(np.asarray(key_factor, float)), np.atleast_2d(np.asarray(value_factor, float))
    if len(keys) != len(values):
        raise ValueError(f"key_factor has rank {len(keys)} but value_factor has rank {len(values)}")
    if not (np.isfinite(keys).all() and np.isfinite(values).all()):
        raise ValueError("an atom's factors hold values that are not finite")
    matrix = keys.T @ values
    tall, wide = 100 * matrix.shape[0] / max(matrix.shape), 100 * matrix.shape[1] / max(matrix.shape)
    pieces = [(matrix, 8.0, 0.0, wide, tall)]
    if len(keys) == 1:
        pieces += [(keys.T, 0.0, 0.0, 5.0, tall), (values, 8.0, tall + 3, wide, 5.0)]
    images = "".join(
        f'<image x="{x:g}" y="{y:g}" width="{w:.4g}" height="{h:.4g}" preserveAspectRatio="none" '
        f'style="image-rendering: pixelated" href="{_diverging_png(piece)}"/>'
        for piece, x, y, w, h in pieces
    )
    frame = f'<rect x="8" y="0" width="{wide:.4g}" height="{tall:.4g}" fill="none" stroke="var(--grid, #e3e7ec)"/>'
    view = f"0 0 {wide + 8:.4g} {tall + 8:.4g}"
    return f'<svg viewBox="{view}" role="img" aria-label="{escape(label)}">{images}{frame}</svg>'


def _diverging_png(values: np.ndarray, levels: int = 15) -> str:
    """A matrix as a data address: one hue for each sign, stronger for larger, clear at zero so any paper shows.

    Strength grows with the square root, or the few largest entries of a heavy-tailed atom would be all one sees.
    """
    largest = max(float(np.abs(values).max()), np.finfo(float).tiny)
    steps = np.rint(levels * np.sign(values) * np.sqrt(np.abs(values) / largest)).astype(int)
    image = Image.frombytes("P", values.shape[::-1], (steps + levels).astype(np.uint8).tobytes())
    image.putpalette([*(37, 116, 196) * levels, 128, 128, 128, *(211, 84, 24) * levels])
    alphas = bytes(int(255 * abs(step) / levels) for step in range(-levels, levels + 1))
    buffer = BytesIO()
    image.save(buffer, "PNG", transparency=alphas, optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
