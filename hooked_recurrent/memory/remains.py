"""What remains of a write: T(t<-s) k_s beside k_s.

The transitions act on the key side alone, so what is left at t of the write k_s v_s^T is (T(t<-s) k_s) v_s^T. Decay makes the
key shorter; an erase, or a decay of every channel at its own rate, turns it too.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_recurrent.display import OneLine
from hooked_recurrent.display.figures import chosen_head
from hooked_recurrent.memory.source import Indices, Source, indices, one_hot_writes, open_memory
from hooked_recurrent.memory.tables import long_table
from hooked_recurrent.scan.step import step_scan

if TYPE_CHECKING:  # a look at numbers does not load matplotlib
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Retention(OneLine):
    """How much of some writes is left, and whether it still is where it was written."""

    heads: tuple[int, ...]
    """The layer's numbers of the heads along the head axis."""
    positions: tuple[int, ...]
    """Positions of the writes along the write_pos axis, counted from the first one of the run or factors."""
    remaining: Float[Tensor, "batch head pos write_pos *term"]
    """|T(t<-s) k_s| / |k_s|: 1 at the write itself, 0 before it (and for a write without a key)."""
    cosine: Float[Tensor, "batch head pos write_pos *term"]
    """Cosine between T(t<-s) k_s and k_s; 0 before the write, and where nothing is left of it."""

    def figure(self, head: int | None = None, **options: Any) -> "Figure":
        """Curves of one head, the first by default; options are those of `plots.retention_curves`."""
        from hooked_recurrent.memory.plots import retention_curves

        return retention_curves(self, chosen_head(self.heads, head), **options)

    def to_dataframe(self) -> pd.DataFrame:
        """A row per batch row, head, pos and write_pos <= pos (and term): remaining, cosine."""
        batch, _, length, _, *terms = self.remaining.shape
        axes = {"batch": range(batch), "head": self.heads, "pos": range(length), "write_pos": self.positions}
        since = np.arange(length)[:, None] >= np.array(self.positions)
        if terms:
            axes["term"], since = range(terms[0]), since[:, :, None]
        return long_table(axes, {"remaining": self.remaining, "cosine": self.cosine}, since)


def retention(
    source: Source, layer: int | None = None, heads: Indices = None, *, positions: Indices = None
) -> Retention:
    """How much of the writes at `positions` is left in the state after every position.

    The recurrence is stepped with one-hot values, whose states have T(t<-s) k_s as columns; no state is kept. Per head that
    costs O(pos writes d_k) time and O(pos writes) memory. Exact in the state's dtype, for every rule.

    Args:
        source: the cache of a run, or factors.
        layer: which layer of the cache; None with factors.
        heads: one, a slice, several, or None for all; the axis stays.
        positions: the writes to follow, counted from the first position of the run: one, a slice, several, or None for all.

    Raises:
        ValueError, KeyError, IndexError: as `open_memory` says; IndexError also for a position that is not there.
    """
    memory = open_memory(source, layer, heads)
    factors = memory.factors
    chosen = indices("position", positions, factors.length)
    terms = tuple(factors.write_key.shape[3:-1])
    key = factors.write_key[:, chosen].movedim(1, 2)  # [batch, head, write_pos, (term), d_k]
    lengths, cosines = [], []

    def compare(state: Tensor, index: int) -> Tensor:
        now = state[:, 0].mT.unflatten(2, (len(chosen), *terms))
        # What is left may be so small that its square is lost: lengths are taken at the scale of the largest entry.
        size = now.abs().amax(dim=-1, keepdim=True)
        scaled = _quotient(now, size)
        lengths.append(size[..., 0] * scaled.norm(dim=-1))
        cosines.append(_quotient((scaled * key).sum(dim=-1), scaled.norm(dim=-1) * key_length))
        return state

    hot = one_hot_writes(factors, chosen)
    key = key.to(hot.zero_state().dtype)
    key_length = key.norm(dim=-1)
    step_scan(hot, on_state=compare)
    remaining = _quotient(torch.stack(lengths, dim=2), key_length[:, :, None])
    return Retention(memory.heads, tuple(chosen), remaining, torch.stack(cosines, dim=2))


def _quotient(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 where the whole is nothing."""
    return torch.where(whole == 0, 0.0, part / torch.where(whole == 0, 1.0, whole))
