"""What every token did to the memory: the erase and the write of a position as one sum of outer products, the NET write.

    S_t  =  diag(d_t) S_{t-1}  +  sum_m key_m value_m^T

The recurrence of factors.py erases a_t y_t^T with y_t = S_{t-1}^T b_t, what the probe finds. Where the erase lies along the
write key, a = c k (DeltaNet, Gated DeltaNet, Kimi Delta Attention), both are one product k (v + c y)^T; elsewhere (RWKV-7, a
write key that was edited) the erase is a term of its own; and a rule that never erases (Mamba-2, Gated Linear Attention) only
writes.

All y come from one scan: y_{t+1} is what a query equal to the NEXT position's probe reads from S_t. So no state is held.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_recurrent.display import OneLine
from hooked_recurrent.factors import Before, Factors, state_dtype
from hooked_recurrent.memory.source import Indices, Source, open_memory
from hooked_recurrent.memory.tables import long_table
from hooked_recurrent.scan.dispatch import scan

if TYPE_CHECKING:  # a look at numbers does not load matplotlib
    from matplotlib.figure import Figure

# An erase counts as lying along the write key where it leaves it by no more than so many roundings of its own dtype.
ROUNDINGS = 8
# A step's log-decay below this one is as good as none being left, also in float64; -inf would spoil differences of its sums.
NOTHING_LEFT = -800.0


@dataclass(frozen=True, repr=False)
class Changes(OneLine):
    """The net writes of some heads, in the state's dtype (never narrower than float32)."""

    heads: tuple[int, ...]
    """The layer's numbers of the heads along the head axis."""
    log_decay: Float[Tensor, "batch pos head *d_k"]
    """log d_t <= 0: what happens to the old state besides; with a channel axis where every key channel has its own rate."""
    key: Float[Tensor, "batch pos head term d_k"]
    """Key sides: those of the write; behind them that of the erase, where it is a term of its own."""
    value: Float[Tensor, "batch pos head term d_v"]
    """Value sides, likewise. They hold what the erase took away."""
    initial_state: Before | None
    """S_0, the state that the first position met; None for an empty one."""

    def factors(self) -> Factors:
        """The same memory as a recurrence that never erases; its query is zero."""
        return Factors(self.log_decay, self.key, self.value, torch.zeros_like(self.key[:, :, :, 0]))

    def squared_size(self) -> Float[Tensor, "batch pos head"]:
        """|sum_m key_m value_m^T|^2 (Frobenius), without the matrix."""
        grams = (self.key @ self.key.mT) * (self.value @ self.value.mT)
        return grams.sum((-1, -2)).clamp_min(0)

    def squared_norms(self) -> Float[Tensor, "batch pos head"]:
        """|S_t|^2 (Frobenius) of every state at the cost of its factors, in float64. For one decay per head only.

            |S_t|^2  =  d^2 |S_{t-1}|^2  +  2 d sum_m <S_{t-1}^T key_m, value_m>  +  |sum_m key_m value_m^T|^2

        The middle asks each state for the next position's keys, one scan per term, and the sum is a scan of numbers. In
        float64, because an erase makes the middle negative: norms are differences of what was written and taken away.

        Raises:
            ValueError: every key channel decays at its own rate; then only the states themselves tell their norms.
        """
        if self.log_decay.ndim == 4:
            raise ValueError(
                "squared norms at factor cost need one decay per head, and here every key channel decays at its own rate"
            )
        exact = replace(
            self,
            log_decay=self.log_decay.double().clamp_min(NOTHING_LEFT),
            key=self.key.double(),
            value=self.value.double(),
            initial_state=None if self.initial_state is None else self.initial_state.double(),
        )
        met = torch.zeros_like(exact.log_decay)
        for term in range(self.key.shape[3]):
            found = _found_before(exact.factors(), exact.key[:, :, :, term], exact.initial_state, "chunked")
            met = met + (found * exact.value[:, :, :, term]).sum(-1)
        added = 2 * exact.log_decay.exp() * met + exact.squared_size()
        ones = torch.ones_like(met)[..., None]
        start = None if exact.initial_state is None else exact.initial_state.square().sum((-1, -2), keepdim=True)
        # by name, because no kernel works in float64
        numbers = Factors(2 * exact.log_decay, ones, added[..., None], ones)
        norms, _ = scan(numbers, start, backend="chunked", want_state=False)
        return norms[..., 0].clamp_min(0)

    def figure(self, **options: Any) -> "Figure":
        """The size of every token's net write; options are those of `plots.write_sizes`."""
        from hooked_recurrent.memory.plots import write_sizes

        return write_sizes(self, **options)

    def to_dataframe(self) -> pd.DataFrame:
        """A row per batch row, pos and head: size, the Frobenius norm of what the token added."""
        batch, length = self.log_decay.shape[:2]
        axes = {"batch": range(batch), "pos": range(length), "head": self.heads}
        return long_table(axes, {"size": self.squared_size().sqrt()})


def changes(
    source: Source, layer: int | None = None, heads: Indices = None, *, initial_state: Before | None = None
) -> Changes:
    """The net write of every position of some heads, at linear cost and without a state per position.

    Taking `key value^T` away from S_t leaves diag(d_t) S_{t-1}: what a WriteEdit "delete" with form "net" does. Where the
    erase lies along the (first) write key at every position, up to rounding, it joins that write; otherwise every position
    has one term more than it has writes. Differentiable in the factors.

    Args:
        source: the cache of a run, or factors.
        layer: which layer of the cache; None with factors.
        heads: one, a slice, several, or None for all; the axis stays.
        initial_state: with factors, S_0 [batch, head, d_k, d_v] of all their heads; a cache knows its own.

    Raises:
        ValueError, KeyError, IndexError: as `open_memory` says.
    """
    memory = open_memory(source, layer, heads, initial_state)
    narrowest = max(torch.finfo(tensor.dtype).eps for tensor in vars(memory.factors).values() if tensor is not None)
    dtype = state_dtype(memory.factors.query.dtype)
    factors = memory.factors.map(lambda tensor: tensor.to(dtype))
    state = None if memory.initial_state is None else memory.initial_state.to(dtype)
    key, value = factors.write_key, factors.write_value
    if key.ndim == 4:
        key, value = key[:, :, :, None], value[:, :, :, None]
    whole = factors.decoupled()
    erase, probe = whole.erase, whole.probe
    if erase is not None and probe is not None:
        found = _found_before(factors, probe, state)
        strength = factors.erase_strength
        if strength is None:
            strength = _along(erase, key[:, :, :, 0], narrowest)
        if strength is None:
            key = torch.cat([key, erase[:, :, :, None]], dim=3)
            value = torch.cat([value, found[:, :, :, None]], dim=3)
        else:
            joined = value[:, :, :, :1] + (strength[..., None] * found)[:, :, :, None]
            value = torch.cat([joined, value[:, :, :, 1:]], dim=3)
    return Changes(memory.heads, factors.log_decay, key, value, state)


def _found_before(
    factors: Factors, probe: Float[Tensor, "batch pos head d_k"], state: Before | None, backend: str = "auto"
) -> Float[Tensor, "batch pos head d_v"]:
    """S_{t-1}^T probe_t at every position, by one scan in which the query of t is the probe of t + 1."""
    batch, _, heads, _ = probe.shape
    if state is None:
        first = probe.new_zeros(batch, 1, heads, factors.d_v)
    else:
        first = torch.einsum("bhkv,bhk->bhv", state.expand(batch, -1, -1, -1), probe[:, 0])[:, None]
    before_last = replace(factors.at(slice(0, factors.length - 1)), query=probe[:, 1:])
    read, _ = scan(before_last, state, backend=backend, want_state=False)
    return torch.cat([first, read], dim=1)


def _along(
    erase: Float[Tensor, "batch pos head d_k"], key: Float[Tensor, "batch pos head d_k"], eps: float
) -> Float[Tensor, "batch pos head"] | None:
    """c with erase = c key, or None if the erase leaves the key by more than rounding anywhere."""
    squared = key.square().sum(-1)
    strength = (erase * key).sum(-1) / squared.where(squared > 0, 1.0)
    left = (erase - strength[..., None] * key).norm(dim=-1)
    return strength if (left <= ROUNDINGS * eps * erase.norm(dim=-1)).all() else None
