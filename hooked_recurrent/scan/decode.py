"""One position, for generation: one product finds what query and probe ask of the old state, one more pass makes the new one.

y  =  S^T probe                  S'  =  d S  +  erase y^T  +  sum_m key_m value_m^T
o  =  S'^T query  =  (d query)^T S  +  (query . erase) y  +  sum_m (query . key_m) value_m
"""

import torch
from torch import Tensor

from hooked_recurrent.factors import Before, Factors, Read, State, state_dtype


def decode_step(factors: Factors, state: Before | None = None) -> tuple[Read, State]:
    """The step of a single position; equal to `step_scan` up to rounding, and differentiable.

    Args:
        factors: the six roles of one position.
        state: the state before it, zero by default; one row may serve all.

    Returns:
        read [batch, 1, head, d_v] and the state after it, both in the state's dtype.

    Raises:
        ValueError: for more than one position.
    """
    if factors.length != 1:
        raise ValueError(f"a decode step takes one position, got {factors.length}")
    dtype = state_dtype(factors.query.dtype)
    state = factors.zero_state() if state is None else state.to(dtype)
    role = {name: tensor[:, 0].to(dtype) for name, tensor in vars(factors).items() if tensor is not None}
    query, key, value, decay = role["query"], role["write_key"], role["write_value"], role["log_decay"].exp()
    per_channel = decay if factors.vector_decay else decay[..., None]
    probe = key if factors.erase_strength is not None else role.get("probe")
    asking = [query * per_channel] if probe is None else [query * per_channel, probe]
    found = torch.stack(asking, dim=2) @ state
    pairs: list[tuple[Tensor, Tensor]] = list(zip(key.unbind(2), value.unbind(2), strict=True)) if key.ndim == 4 else []
    if factors.erase_strength is not None:  # one column for the erase and the write
        pairs = [(key, torch.addcmul(value, role["erase_strength"][..., None], found[:, :, 1]))]
    elif key.ndim == 3:
        pairs = [(key, value)]
    if factors.erase is not None:
        pairs.append((role["erase"], found[:, :, 1]))
    read, after = found[:, :, 0], per_channel[..., None] * state
    for column, carried in pairs:
        read = torch.addcmul(read, (query * column).sum(-1, keepdim=True), carried)
        after = after.addcmul_(column[..., None], carried[:, :, None])
    return read[:, None], after
