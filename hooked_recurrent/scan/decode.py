"""One position, for generation: one product finds what query and probe ask of the old state, one more pass makes the new one.

y  =  S^T probe                  S'  =  d S  +  erase y^T  +  sum_m key_m value_m^T
o  =  S'^T query  =  (d query)^T S  +  (query . erase) y  +  sum_m (query . key_m) value_m
"""

import torch

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
    now = factors if factors.query.dtype == dtype else factors.map(lambda tensor: tensor.to(dtype))
    query, decay = now.query[:, 0], now.log_decay[:, 0].exp()
    decay = decay if factors.vector_decay else decay[..., None]
    key, value, strength = now.write_key[:, 0], now.write_value[:, 0], now.erase_strength
    probe = key if strength is not None else None if now.probe is None else now.probe[:, 0]
    asking = (query * decay)[:, :, None] if probe is None else torch.stack([query * decay, probe], dim=2)
    found = asking @ state
    pairs = list(zip(key.unbind(2), value.unbind(2), strict=True)) if key.ndim == 4 else [(key, value)]
    if strength is not None:  # one column for the erase and the write
        pairs = [(key, torch.addcmul(value, strength[:, 0, :, None], found[:, :, 1]))]
    if now.erase is not None:
        pairs.append((now.erase[:, 0], found[:, :, 1]))
    read, after = found[:, :, 0], decay[..., None] * state
    for column, carried in pairs:
        read = torch.addcmul(read, (query * column).sum(-1, keepdim=True), carried)
        after = after.addcmul_(column[..., None], carried[:, :, None])
    return read[:, None], after
