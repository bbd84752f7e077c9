"""Heat maps of single matrices, and what all pictures share. Each gives a new matplotlib Figure; pyplot is left alone."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_recurrent.display.text import plain

if TYPE_CHECKING:  # importing hooked_recurrent does not load matplotlib
    from matplotlib.figure import Figure


def label(token: str) -> str:
    """A token as the label of a tick: line breaks and tabs as \\n and \\t, what else cannot be seen as its picture."""
    return plain(token.replace("\n", "\\n").replace("\t", "\\t"))


def matrix_map(
    matrix: Float[Tensor, "*row d_k d_v"] | Any,
    *,
    row: int = 0,
    key: Float[Tensor, " d_k"] | None = None,
    value: Float[Tensor, " d_v"] | None = None,
    title: str = "",
) -> "Figure":
    """One write, state or atom: the key side down, the value side across, zero in white, its two factors along the edges.

    Args:
        matrix: [d_k, d_v], or [batch, d_k, d_v]; a tensor, or a FactoredMatrix such as `cache.write(layer, head, pos)` and
            `sae.atom(index)`, whose factors are drawn by themselves where it is of rank one.
        row: which row of the batch.
        key: what to draw down the left side.
        value: what to draw along the foot.
        title: what stands above.

    Raises:
        ValueError: something else than one matrix or a batch of them, or sides that do not fit it.
        IndexError: a row that the batch does not have.
    """
    left, right = getattr(matrix, "A", None), getattr(matrix, "B", None)
    whole = matrix if left is None else left @ right
    if not isinstance(whole, Tensor) or whole.ndim not in (2, 3):
        came = tuple(whole.shape) if isinstance(whole, Tensor) else type(whole).__name__
        raise ValueError(f"expected a matrix [d_k, d_v] or a batch of them [batch, d_k, d_v], got {came}")
    batched = whole.ndim == 3
    if batched and not -len(whole) <= row < len(whole):
        raise IndexError(f"row {row} is out of range: there are {len(whole)} matrices")
    if left is not None and right is not None and left.shape[-1] == 1 and key is None and value is None:
        key, value = ((side[row] if batched else side).flatten() for side in (left, right))
    shown = _numbers(whole[row] if batched else whole)
    sides = [None if side is None else _numbers(side) for side in (key, value)]
    for name, side, width in zip(("key", "value"), sides, shown.shape, strict=True):
        if side is not None and side.shape != (width,):
            raise ValueError(
                f"the {name} beside a matrix of shape {shown.shape} must have {width} numbers, got {side.shape}"
            )
    return _draw(shown, sides[0], sides[1], title)


def _draw(matrix: np.ndarray, key: np.ndarray | None, value: np.ndarray | None, title: str) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(5.2, 1.2 + 4.0 * min(2.0, max(0.3, matrix.shape[0] / matrix.shape[1]))), layout="constrained"
    )
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 16), height_ratios=(16, 1), wspace=0, hspace=0)
    axes = figure.add_subplot(grid[0, 1])
    image = axes.imshow(matrix, **signed(matrix), aspect="auto")
    if key is not None:
        side = figure.add_subplot(grid[0, 0])
        side.imshow(key[:, None], **signed(key), aspect="auto")
        side.set(xticks=[], ylabel="key channel")
        axes.set_yticks([])
    else:
        axes.set_ylabel("key channel")
    if value is not None:
        foot = figure.add_subplot(grid[1, 1])
        foot.imshow(value[None], **signed(value), aspect="auto")
        foot.set(yticks=[], xlabel="value channel")
        axes.set_xticks([])
    else:
        axes.set_xlabel("value channel")
    axes.set_title(plain(title), fontsize=10, parse_math=False)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def signed(values: np.ndarray) -> dict[str, Any]:
    """How `imshow` draws signed numbers: red above zero, blue below, zero in white."""
    finite = np.abs(values[np.isfinite(values)])
    bound = float(finite.max(initial=0.0)) or 1.0
    return {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound, "interpolation": "nearest"}


def chosen_head(heads: Sequence[int], head: int | None) -> int:
    """The head asked for, or the first that is there; `IndexError` for one that is not."""
    if head is None:
        return heads[0]
    if head not in heads:
        raise IndexError(f"head {head} is not in this result, which holds {tuple(heads)}")
    return head


def _numbers(values: Tensor) -> np.ndarray:
    return values.detach().to("cpu", torch.float64).numpy()
