"""Pictures of a memory, one per kind of result. Each gives a new matplotlib Figure and touches no global state of pyplot.

`figure.savefig(path)` writes one; a notebook shows it once matplotlib's inline backend is on. `tokens` are labels of the
positions, for instance `model.to_str_tokens(text)`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from hooked_recurrent.cache import RecurrentCache
from hooked_recurrent.display.figures import label, matrix_map
from hooked_recurrent.memory.attention import EffectiveAttention
from hooked_recurrent.memory.changes import Changes
from hooked_recurrent.memory.decay import HalfLives
from hooked_recurrent.memory.remains import Retention
from hooked_recurrent.memory.spectra import Spectrum

# More labels than this along one axis cannot be read; then every second, third, ... position has one.
MOST_LABELS = 48


def attention_map(
    attention: EffectiveAttention,
    head: int,
    *,
    row: int = 0,
    term: int = 0,
    tokens: Sequence[str] | None = None,
    contributions: bool = False,
) -> Figure:
    """Heat map of one head's effective attention: reads down, writes across, zero in white.

    Args:
        attention: what `effective_attention` gave.
        head: the layer's number of the head.
        row: which row of the batch.
        term: which write term, where there are several.
        tokens: a label for every position.
        contributions: draw the lengths |A| |v| of what the writes add instead of the coefficients A.
    """
    values = attention.contribution_norm() if contributions else attention.coefficient
    shown = _pick(values, attention.heads, head, row, term)
    bound = float(np.abs(shown).max()) or 1.0
    figure, (axes,) = _figure(1, 6.4, 5.6)
    colours, lowest = ("Reds", 0.0) if contributions else ("RdBu_r", -bound)
    image = axes.imshow(shown, cmap=colours, vmin=lowest, vmax=bound, interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.8, label="length of the contribution" if contributions else "coefficient")
    axes.set(xlabel="write", ylabel="read", title=f"head {head}: what every read is made of")
    for side in ("x", "y"):
        _label(axes, side, range(len(shown)), tokens, len(shown))
    return figure


def retention_curves(
    kept: Retention, head: int, *, row: int = 0, term: int = 0, tokens: Sequence[str] | None = None
) -> Figure:
    """What is left of each write over the tokens after it: its length, and below it the cosine to its original key.

    Args:
        kept: what `retention` gave, best for a few positions.
        head: the layer's number of the head.
        row: which row of the batch.
        term: which write term, where there are several.
        tokens: a label for every position.
    """
    pair = [_pick(values, kept.heads, head, row, term) for values in (kept.remaining, kept.cosine)]
    length = len(pair[0])
    names = _names(kept.positions, tokens, length)
    figure, panels = _figure(2, 6.4, 5.6)
    for column, (position, name) in enumerate(zip(kept.positions, names, strict=True)):
        since = np.arange(length - position)
        colour = _colour(column, len(names))
        for axes, values in zip(panels, pair, strict=True):
            (line,) = axes.plot(since, values[position:, column], color=colour, marker="." if len(since) == 1 else "")
            line.set_label(f"{position} {name}".rstrip() if tokens is not None else name)
    panels[0].set(ylabel="length left, of 1", title=f"head {head}: what is left of a write", ylim=(0, None))
    panels[1].set(ylabel="cosine to its key", xlabel="tokens since the write")
    if len(names) <= 12:
        _legend(panels[0], "write at")
    return figure


def spectrum_over_time(found: Spectrum, head: int, *, row: int = 0, tokens: Sequence[str] | None = None) -> Figure:
    """Singular values of one head's state over positions (log scale), and below them its effective and stable rank.

    Args:
        found: what `spectrum` gave; its positions are drawn in order.
        head: the layer's number of the head.
        row: which row of the batch.
        tokens: a label for every position of the run, not only for those in `found`.
    """
    order = np.argsort(found.positions)
    places = np.array(found.positions)[order]
    values = _pick(found.singular_values, found.heads, head, row)[order]
    figure, (above, below) = _figure(2, 6.4, 5.6)
    marker = "." if len(places) == 1 else ""
    for rank, line in enumerate(values.T):
        # A state of low rank has values at rounding level; a log axis has no place for an exact zero.
        above.plot(places, np.where(line > 0, line, np.nan), color=_colour(rank, values.shape[1]), lw=1, marker=marker)
    above.set(yscale="log", ylabel="singular values", title=f"head {head}: how full the memory is")
    ranks = {
        "effective rank": found.effective_rank(),
        "Roy and Vetterli's": found.effective_rank(power=1.0),
        "stable rank": found.stable_rank(),
    }
    for index, (name, numbers) in enumerate(ranks.items()):
        drawn = _pick(numbers, found.heads, head, row)[order]
        below.plot(places, drawn, color=_colour(index, len(ranks)), label=name, marker=marker)
    below.set(ylabel=f"rank, at most {values.shape[1]}", ylim=(0, None), xlabel="position")
    _legend(below)
    _label(below, "x", places.tolist(), tokens)
    return figure


def half_life_strip(*lives: HalfLives) -> Figure:
    """A line per head, from the lower to the upper quartile of its half-lives in tokens (log scale), a mark at the median.

    Where every channel decays at its own rate there is one such line per channel, on top of each other. Small ticks show
    the half-life of the mean log-decay. What is infinite is not drawn; a head that never decays is named so.

    Args:
        lives: what `half_life` gave for one or more layers.
    """
    if not lives:
        raise ValueError("half_life_strip needs at least one result of half_life, got none")
    rows = [(life.layer, head, numbers) for life in lives for head, numbers in _by_head(life)]
    figure, (axes,) = _figure(1, 6.4, 1.2 + 0.28 * len(rows))
    names = []
    for place, (layer, head, numbers) in enumerate(rows):
        lower, median, upper, of_mean = np.where(np.isfinite(numbers), numbers, np.nan)
        jitter = np.full(len(median), float(place)) if len(median) == 1 else place + np.linspace(-0.3, 0.3, len(median))
        axes.hlines(jitter, lower, upper, color="0.7", lw=3 if len(median) == 1 else 0.8)
        axes.plot(median, jitter, "o", color="C0", ms=5 if len(median) == 1 else 2.5)
        axes.plot(of_mean, jitter, "|", color="C3", ms=8 if len(median) == 1 else 4)
        never = "" if np.isfinite(numbers[1]).any() else ", no decay"
        names.append(f"{'' if layer is None else f'layer {layer}, '}head {head}{never}")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="half-life in tokens", title="median (dot), quartiles (line), mean log-decay (tick)")
    return figure


def decay_over_time(lives: HalfLives, *, row: int = 0, tokens: Sequence[str] | None = None) -> Figure:
    """How much of the memory each token's decay leaves, a line per head, from 0 (nothing) to 1 (all); channels as their mean.

    Args:
        lives: what `half_life` gave.
        row: which row of the batch.
        tokens: a label for every position.
    """
    left = lives.log_decay.exp() if lives.log_decay.ndim == 3 else lives.log_decay.exp().mean(-1)
    return _per_head(
        left,
        lives.heads,
        row,
        tokens,
        ylabel="left of the memory",
        ylim=(0, 1.02),
        title=_of(lives.layer, "what decay leaves"),
    )


def write_sizes(found: Changes, *, row: int = 0, tokens: Sequence[str] | None = None) -> Figure:
    """The size (Frobenius norm) of every token's net write, a line per head.

    Args:
        found: what `changes` gave.
        row: which row of the batch.
        tokens: a label for every position.
    """
    sizes = found.squared_size().sqrt()
    return _per_head(
        sizes, found.heads, row, tokens, ylabel="size of the net write", title="what every token adds to the memory"
    )


def write_map(cache: RecurrentCache, layer: int, head: int, position: int, *, row: int = 0) -> Figure:
    """One write as a heat map, its key down the left side and its value along the foot; position is one of `cache.write`."""
    title = f"layer {layer}, head {head}: the write at {cache.positions[position]}"
    return matrix_map(cache.write(layer, head, position), row=row, title=title)


def state_map(cache: RecurrentCache, layer: int, head: int, position: int, *, row: int = 0) -> Figure:
    """The state after one write as a heat map; position is one of `cache.state`."""
    title = f"layer {layer}, head {head}: the state after {cache.positions[position]}"
    return matrix_map(cache.state(layer, head, position), row=row, title=title)


def _of(layer: int | None, words: str) -> str:
    return words if layer is None else f"layer {layer}: {words}"


def _per_head(values: Tensor, heads: tuple[int, ...], row: int, tokens: Sequence[str] | None, **words: Any) -> Figure:
    """A line per head over positions; values are [batch, pos, head]."""
    by_head = values.movedim(2, 1)
    figure, (axes,) = _figure(1, 6.4, 3.2)
    for index, head in enumerate(heads):
        shown = _pick(by_head, heads, head, row)
        axes.plot(shown, color=_colour(index, len(heads)), label=f"head {head}", marker="." if len(shown) == 1 else "")
    axes.set(xlabel="position", **words)
    if len(heads) <= 12:
        _legend(axes)
    _label(axes, "x", range(by_head.shape[2]), tokens, by_head.shape[2])
    return figure


def _by_head(life: HalfLives) -> list[tuple[int, np.ndarray]]:
    """Per head its four numbers, [4, channel] (one channel where the head decays as a whole)."""
    numbers = life.quartiles()
    return [(head, numbers[:, index].reshape(len(numbers), -1)) for index, head in enumerate(life.heads)]


def _figure(panels: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(panels, sharex=True, squeeze=False)[:, 0])


def _pick(values: Tensor, heads: tuple[int, ...], head: int, row: int, term: int = 0) -> np.ndarray:
    """One batch row, head and (where there is a fifth axis) term, as numpy."""
    if head not in heads:
        raise IndexError(f"head {head} is not in this result, which holds {heads}")
    if not -len(values) <= row < len(values):
        raise IndexError(f"batch row {row} is out of range: there are {len(values)}")
    of_head = values[row, heads.index(head)]
    if of_head.ndim == 3:
        terms = of_head.shape[2]
        if not -terms <= term < terms:
            raise IndexError(f"write term {term} is out of range: there are {terms}")
        of_head = of_head[:, :, term]
    return of_head.detach().to("cpu", torch.float64).numpy()


def _names(positions: Sequence[int], tokens: Sequence[str] | None, length: int | None) -> list[str]:
    """What to call these positions: their tokens with line breaks and tabs made visible, or their numbers."""
    if tokens is None:
        return [str(position) for position in positions]
    if len(tokens) <= max(positions) or (length is not None and len(tokens) != length):
        expected = f"more than {max(positions)}" if length is None else length
        raise ValueError(f"tokens must label every position: got {len(tokens)} labels, expected {expected}")
    return [label(tokens[position]) for position in positions]


def _label(
    axes: Axes, side: str, positions: Sequence[int], tokens: Sequence[str] | None, length: int | None = None
) -> None:
    """Ticks with the tokens of the positions, if there are any; none is ever read as mathematical notation."""
    if tokens is None:
        return
    names = _names(positions, tokens, length)
    stride = -(-len(names) // MOST_LABELS)
    axis = axes.xaxis if side == "x" else axes.yaxis
    axis.set_ticks(list(positions)[::stride], names[::stride], rotation=90 if side == "x" else 0, fontsize=7)
    for tick in axis.get_ticklabels():
        tick.set_parse_math(False)


def _legend(axes: Axes, title: str | None = None) -> None:
    for text in axes.legend(title=title, fontsize=8, frameon=False).get_texts():
        text.set_parse_math(False)


def _colour(index: int, count: int) -> tuple[float, float, float, float]:
    """Evenly spaced from dark to light, leaving out the yellow that white paper swallows."""
    return colormaps["viridis"](0.9 * index / max(count - 1, 1))
