"""Heat maps of a sweep. Each gives a new matplotlib Figure and touches no global state of pyplot."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

# More labels than this along one axis cannot be read; then every second, third, ... has one.
MOST_LABELS = 48


def heat_map(
    values: Float[Tensor, "*axes"],
    axes: Mapping[str, Sequence[int]],
    title: str,
    labels: Sequence[str] | None = None,
) -> Figure:
    """The first of two axes down and the second across; of three one panel per entry of the first, of one a single line.

    Args:
        values: one number per place; zero is drawn white.
        axes: per axis its name and the numbers along it.
        title: what stands above.
        labels: per position of the text what it says.
    """
    shown = values.detach().double().cpu().numpy()
    names = list(axes)
    if not 1 <= len(names) <= 3:
        raise ValueError(f"a heat map shows one to three axes, got {len(names)}: {', '.join(names)}")
    bound = float(np.nanmax(np.abs(shown), initial=0.0)) or 1.0
    panels = shown if len(names) == 3 else shown[None] if len(names) == 2 else shown[None, None]
    down, across = (names[-2] if len(names) > 1 else None), names[-1]
    width, height = 2.2 + min(0.22 * panels.shape[2], 11), max(0.5 + min(0.22 * panels.shape[1], 7), 0.9)
    below = 0.9 + (0.06 * max(map(len, labels), default=0) if "position" in names and labels is not None else 0.3)
    figure = Figure(figsize=(max(width, 4.5), len(panels) * height + below), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for index, (plot, panel) in enumerate(zip(grid, panels, strict=True)):
        image = plot.imshow(panel, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto", interpolation="nearest")
        if len(names) == 3:
            plot.set_title(f"{names[0]} {axes[names[0]][index]}", fontsize=9)
        _ticks(plot.xaxis, across, axes[across], labels)
        if down is None:
            plot.set_yticks([])
        else:
            _ticks(plot.yaxis, down, axes[down], labels)
        plot.label_outer()  # what is across stands once, below the lowest panel
    figure.suptitle(title)
    figure.colorbar(image, ax=grid.tolist(), shrink=0.8)
    return figure


def _ticks(axis, name: str, along: Sequence[int], labels: Sequence[str] | None) -> None:
    """Numbers along an axis, and beside those of positions what they say."""
    step = -(-len(along) // MOST_LABELS)
    words = [str(number) for number in along]
    if name == "position" and labels is not None:
        if len(labels) <= max(along):
            raise ValueError(
                f"{len(labels)} labels do not reach position {max(along)}: give one per position of the text"
            )
        words = [f"{number} {labels[number]!r}" for number in along]
    upright = axis.axis_name == "x" and any(len(word) > 3 for word in words)
    axis.set_ticks(range(0, len(along), step), words[::step], fontsize=7, **({"rotation": 90} if upright else {}))
    for label in axis.get_ticklabels():
        label.set_parse_math(False)  # a dollar in a token would start a formula
    axis.set_label_text(name)
