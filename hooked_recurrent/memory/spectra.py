"""How full a memory is: the singular values of the state over time, and the ranks that they amount to."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_recurrent.display import OneLine
from hooked_recurrent.display.figures import chosen_head
from hooked_recurrent.factors import State
from hooked_recurrent.memory.source import Indices, Source, indices, open_memory
from hooked_recurrent.memory.tables import long_table
from hooked_recurrent.scan.dispatch import scan

if TYPE_CHECKING:  # a look at numbers does not load matplotlib
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Spectrum(OneLine):
    """Singular values of the states after some positions; every rank of an empty state is 0."""

    heads: tuple[int, ...]
    """The layer's numbers of the heads along the head axis."""
    positions: tuple[int, ...]
    """The positions along the pos axis, counted from the first one of the run or factors."""
    singular_values: Float[Tensor, "batch head pos rank"]
    """From the largest down; there are min(d_k, d_v). Below the dtype's precision times the largest they are rounding."""

    def norm(self) -> Float[Tensor, "batch head pos"]:
        """Frobenius norm of the state."""
        return self.singular_values.norm(dim=-1)

    def effective_rank(self, power: float = 2.0) -> Float[Tensor, "batch head pos"]:
        """exp of the entropy of the shares p_i = sigma_i^power / sum_j sigma_j^power, from 1 to min(d_k, d_v).

        With power 2, the default, p_i is the share of the squared Frobenius norm that direction i holds. Roy and Vetterli
        2007, "The effective rank: a measure of effective dimensionality", who brought this in, take the singular values
        themselves: power 1, which gives weak directions more weight, and never a smaller number.
        """
        if power <= 0:
            raise ValueError(f"the power of the singular values must be above 0, got {power}")
        largest = self.singular_values[..., :1]
        weight = (self.singular_values / largest.where(largest > 0, 1.0)) ** power
        share = weight / weight.sum(dim=-1, keepdim=True).where(largest > 0, 1.0)
        entropy = -torch.special.xlogy(share, share).sum(dim=-1)
        return entropy.exp().where(largest[..., 0] > 0, 0.0)

    def stable_rank(self) -> Float[Tensor, "batch head pos"]:
        """Squared Frobenius norm over the squared largest singular value (Rudelson and Vershynin 2007): 1 to the rank."""
        largest = self.singular_values[..., :1]
        return ((self.singular_values / largest.where(largest > 0, 1.0)) ** 2).sum(dim=-1)

    def figure(self, head: int | None = None, **options: Any) -> "Figure":
        """Spectrum and ranks of one head, the first by default; options are those of `plots.spectrum_over_time`."""
        from hooked_recurrent.memory.plots import spectrum_over_time

        return spectrum_over_time(self, chosen_head(self.heads, head), **options)

    def to_dataframe(self) -> pd.DataFrame:
        """A row per batch row, head and pos: norm, effective_rank (power 2), roy_vetterli_rank (power 1), stable_rank."""
        axes = {"batch": range(self.singular_values.shape[0]), "head": self.heads, "pos": self.positions}
        columns = {
            "norm": self.norm(),
            "effective_rank": self.effective_rank(),
            "roy_vetterli_rank": self.effective_rank(power=1.0),
            "stable_rank": self.stable_rank(),
        }
        return long_table(axes, columns)


def spectrum(
    source: Source,
    layer: int | None = None,
    heads: Indices = None,
    *,
    positions: Indices = None,
    initial_state: State | None = None,
) -> Spectrum:
    """Singular values of S_t, the state after the write at t.

    The states are recomputed from the factors, on from one asked position to the next, and only one is held at a time.

    Args:
        source: the cache of a run, or factors.
        layer: which layer of the cache; None with factors.
        heads: one, a slice, several, or None for all; the axis stays.
        positions: counted from the first position of the run: one, a slice, several, or None for all.
        initial_state: with factors, S_0 [batch, head, d_k, d_v] of all their heads; a cache knows its own.

    Raises:
        ValueError, KeyError, IndexError: as `open_memory` says; IndexError also for a position that is not there.
    """
    factors, state, numbers = open_memory(source, layer, heads, initial_state)
    chosen = indices("position", positions, factors.length)
    found: dict[int, Tensor] = {}
    start = 0
    for position in sorted(set(chosen)):
        _, state = scan(factors.at(slice(start, position + 1)), state)
        found[position] = torch.linalg.svdvals(state)
        start = position + 1
    return Spectrum(numbers, tuple(chosen), torch.stack([found[position] for position in chosen], dim=2))
