"""The definition: one step of the recurrence, and the loop over positions. Run in float64 it is the reference of every scan.

    S  <-  diag(decay) S  +  erase (probe^T S)  +  write           read = S^T query

The state hook lives inside the loop, so a state that it replaces reaches every later step.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_recurrent.factors import Before, Factors, Read, State, outer, state_dtype

StateHook = Callable[[Float[Tensor, "batch one head d_k d_v"], int], Tensor]
"""Given S_t as [batch, 1, head, d_k, d_v] and the index of its position, returns the state to go on with."""


def step(state: Before, factors: Factors, index: int, write: Tensor | None = None) -> State:
    """One transition. `factors` must be decoupled and of the state's dtype; `write` [batch, head, d_k, d_v] overrides k v^T."""
    decay = factors.log_decay[:, index].exp()
    decay = decay[..., None] if factors.vector_decay else decay[..., None, None]
    after = decay * state
    if factors.erase is not None and factors.probe is not None:
        asked = torch.einsum("bhk,bhkv->bhv", factors.probe[:, index], state)
        after = after + factors.erase[:, index][..., None] * asked[..., None, :]
    if write is None:
        write = outer(factors.write_key[:, index], factors.write_value[:, index], several=factors.write_key.ndim == 5)
    return after + write.to(state.dtype)


def step_scan(
    factors: Factors,
    initial_state: Before | None = None,
    *,
    writes: Float[Tensor, "batch pos head d_k d_v"] | None = None,
    on_state: StateHook | None = None,
) -> tuple[Read, State]:
    """Scan position by position.

    Args:
        factors: the six roles.
        initial_state: S_0, zero by default.
        writes: arbitrary matrices to write instead of k v^T (a function hook on hook_write makes these).
        on_state: called with every S_t; what it returns is read and carried on.

    Returns:
        read [batch, pos, head, d_v] and the final state, both in the state's dtype.
    """
    dtype = state_dtype(factors.query.dtype)
    state = factors.zero_state() if initial_state is None else initial_state.to(dtype)
    factors = factors.map(lambda tensor: tensor.to(dtype)).decoupled()
    reads = []
    for index in range(factors.length):
        state = step(state, factors, index, None if writes is None else writes[:, index])
        if on_state is not None:
            state = on_state(state[:, None], index)[:, 0]
        reads.append(torch.einsum("bhkv,bhk->bhv", state, factors.query[:, index]))
    return torch.stack(reads, dim=1), state
