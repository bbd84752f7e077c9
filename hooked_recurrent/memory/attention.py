"""The attention that a recurrence is: how much of every write is in every read.

Unrolled, the recurrence of factors.py reads a weighted sum of what was written,

    o_t  =  sum_{s <= t} A[t, s] v_s  +  S_0^T T(t<-0)^T q_t         A[t, s] = q_t^T T(t<-s) k_s

where T(t<-s) is the product of the transitions diag(d_j) + a_j b_j^T for s < j <= t. A is exact for every rule, the erase
included. It is no distribution: entries may be negative and rows sum to anything. For decay alone it is the masked
attention matrix of Dao and Gu 2024 (arXiv:2405.21060); Ali et al. 2024 (arXiv:2403.01590) read Mamba's that way.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_recurrent.display import OneLine
from hooked_recurrent.display.figures import chosen_head
from hooked_recurrent.factors import Factors, Read, State
from hooked_recurrent.memory.source import Indices, Source, one_hot_writes, open_memory
from hooked_recurrent.memory.tables import long_table
from hooked_recurrent.scan.dispatch import scan

if TYPE_CHECKING:  # a look at numbers does not load matplotlib
    from matplotlib.figure import Figure

# Writes that are followed at once. Earlier reads see nothing of a block, so blocks save up to half of the work.
BLOCK = 256


@dataclass(frozen=True, repr=False)
class EffectiveAttention(OneLine):
    """What every read is made of. Positions are counted from the first one of the run or factors that it came from."""

    heads: tuple[int, ...]
    """The layer's numbers of the heads along the head axis."""
    coefficient: Float[Tensor, "batch head query_pos write_pos *term"]
    """A[t, s], zero for s > t; with a term axis where the writes have one."""
    write_value: Float[Tensor, "batch write_pos head *term d_v"]
    """v_s, what the coefficients weigh."""
    from_initial_state: Float[Tensor, "batch query_pos head d_v"] | None
    """What the reads have from the state before the first position; None if there was none."""

    def read(self) -> Read:
        """The reads [batch, pos, head, d_v] put together again: equal to hook_read up to rounding."""
        coefficient, value = self._by_term()
        read = torch.einsum("bhtsm,bshmv->bthv", coefficient, value.to(coefficient.dtype))
        return read if self.from_initial_state is None else read + self.from_initial_state

    def contribution_norm(self) -> Float[Tensor, "batch head query_pos write_pos *term"]:
        """|A[t, s]| |v_s|, the length of what a write adds to a read.

        It puts writes of unlike size on one scale, and so heads whose gate stands in the value (beta_t v_t, dt_t x_t).
        After Kobayashi et al. 2020 (arXiv:2004.10102), who do so for softmax attention.
        """
        coefficient, value = self._by_term()
        length = value.to(coefficient.dtype).norm(dim=-1).transpose(1, 2)[:, :, None]
        return (coefficient.abs() * length).view(self.coefficient.shape)

    def figure(self, head: int | None = None, **options: Any) -> "Figure":
        """A heat map of one head, the first by default; options are those of `plots.attention_map`."""
        from hooked_recurrent.memory.plots import attention_map

        return attention_map(self, chosen_head(self.heads, head), **options)

    def to_dataframe(self) -> pd.DataFrame:
        """A row per batch row, head, query_pos and write_pos <= query_pos (and term): coefficient, contribution_norm."""
        batch, _, length, _, *terms = self.coefficient.shape
        axes = {"batch": range(batch), "head": self.heads, "query_pos": range(length), "write_pos": range(length)}
        seen = np.tri(length, dtype=bool)
        if terms:
            axes["term"], seen = range(terms[0]), seen[:, :, None]
        columns = {"coefficient": self.coefficient, "contribution_norm": self.contribution_norm()}
        return long_table(axes, columns, seen)

    def _by_term(self) -> tuple[Tensor, Tensor]:
        """Coefficient [batch, head, query_pos, write_pos, term] and value [batch, write_pos, head, term, d_v]."""
        if self.coefficient.ndim == 5:
            return self.coefficient, self.write_value
        return self.coefficient[..., None], self.write_value[..., None, :]


def effective_attention(
    source: Source, layer: int | None = None, heads: Indices = None, *, initial_state: State | None = None
) -> EffectiveAttention:
    """The exact coefficient of every write in every read, of some heads of a layer.

    Nothing in the recurrence depends on the values that are written, so it is run with one-hot values instead: column s
    of its reads is A[:, s]. Per head that costs O(pos^2 d_k) time and O(pos^2) memory, in the state's dtype (float32, or
    float64 for factors in float64: `cache.factors(layer).map(torch.Tensor.double)`). Differentiable in the factors.

    Args:
        source: the cache of a run, or factors.
        layer: which layer of the cache; None with factors.
        heads: one, a slice, several, or None for all; the axis stays.
        initial_state: with factors, S_0 [batch, head, d_k, d_v] of all their heads; a cache knows its own.

    Raises:
        ValueError, KeyError, IndexError: as `open_memory` says.
    """
    memory = open_memory(source, layer, heads, initial_state)
    factors = memory.factors
    columns = torch.cat(list(_columns(factors)), dim=3)
    from_initial = None
    if memory.initial_state is not None:
        silent = replace(factors, write_value=torch.zeros_like(factors.write_value))
        from_initial, _ = scan(silent, memory.initial_state)
    return EffectiveAttention(memory.heads, columns, factors.write_value, from_initial)


def _columns(factors: Factors) -> Iterator[Tensor]:
    """Blocks of A's columns, [batch, head, query_pos, write_pos in the block, (term)]."""
    terms = tuple(factors.write_key.shape[3:-1])
    for start in range(0, factors.length, BLOCK):
        size = min(BLOCK, factors.length - start)
        reads, _ = scan(one_hot_writes(factors.at(slice(start, None)), list(range(size))))
        block = reads.transpose(1, 2).unflatten(-1, (size, *terms))
        yield torch.cat([block.new_zeros(*block.shape[:2], start, *block.shape[3:]), block], dim=2)
