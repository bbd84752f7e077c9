"""The pass over the chunks of a slab, and the pass back; formulas in chunked.py. No autograd here.

Backward, with g = dLoss/do, P = dLoss/dS' and V = [y; F] (or u, or F alone), the transposed chunk:

    dV      =  [P R]^T g  +  columns P                   d_found  =  [g; (I - M)^{-T} dV_y]  =  [g; x]
    dS_0    =  D(C<-0) P  +  rows^T d_found              dF       =  dV_F + N^T x   (u stands for F: x)
    d_rows  =  d_found S_0^T                             d_columns = V P^T            (through the state)
    d_gram  =  d_found V^T                               then through the product of rows and columns

x_t is the gradient of what the probe of t found: Lambda_t^T erase_t. Of a log-decay: every row holds exp(c_t), every column
exp(-c_j), and S' holds exp(c_C), so that dc_t collects rows * d_rows, minus columns * d_columns, and P * S' at the end.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_recurrent.factors import Before, Factors, State
from hooked_recurrent.scan.slab import Slab, unstack

Reads = Float[Tensor, "chunk batch_head pos d_v"]


@dataclass
class Kept:
    """What the pass back needs of the pass before it."""

    states: list[Float[Tensor, "batch_head d_k d_v"] | None]
    """Before each chunk; None where it is empty."""
    carried: Float[Tensor, "chunk batch_head column d_v"]
    """V of each chunk."""
    after: Float[Tensor, "batch_head d_k d_v"] | None
    """The state after the last chunk; None unless it is wanted."""


def forward_pass(
    slab: Slab, state: Before | None, batch: int, *, want_state: bool, keep: bool = False, owned: bool = False
) -> tuple[Reads, State | None, Kept]:
    """Run the chunks one after the other.

    Args:
        slab: the chunks.
        state: S before them, empty when None; one row may serve all.
        batch: how many rows there are.
        want_state: whether the state after them is needed.
        keep: keep the state before every chunk for `backward_pass`.
        owned: whether the memory of `state` may be written over.
    """
    size, carried, states = slab.size, _room_for_carried(slab), []
    reads = slab.values.new_empty(*slab.asked.shape[:3], slab.values.shape[-1])
    for index in range(slab.chunks):
        found, here = _found(slab, index, state, batch), carried[index]
        if slab.solver is not None and slab.given is not None:
            asked_for = slab.given[index] if found is None else found[:, size:].add_(slab.given[index])
            # Not `out=`: a product into a part of a tensor goes head by head.
            here[:, :size] = slab.solver[index] @ asked_for
        if found is None:
            torch.bmm(slab.asked[index], here, out=reads[index])
        else:
            torch.baddbmm(found[:, :size], slab.asked[index], here, out=reads[index])
        if keep:
            states.append(None if state is None else state.expand(batch, -1, -1, -1).flatten(0, 1))
        if want_state or index + 1 < slab.chunks:
            state = _moved_on(slab, index, state, here, batch, owned and not keep)
            owned = True
        else:
            state = None
    return reads, state, Kept(states, carried, None if state is None else state.flatten(0, 1))


def _room_for_carried(slab: Slab) -> Float[Tensor, "chunk batch_head column d_v"]:
    """V, in which F stands already where columns stand for it, and y is still to come."""
    if slab.solver is None:
        return slab.values
    if slab.tied:
        return torch.empty_like(slab.values)
    return torch.cat([torch.empty_like(slab.values[:, :, : slab.size]), slab.values], dim=2)


def _found(slab: Slab, index: int, state: Before | None, batch: int) -> Float[Tensor, "batch_head row d_v"] | None:
    """rows~ S_0; where one state serves every row of the batch it is not copied: their rows become one product."""
    if state is None:
        return None
    rows = slab.decay.rows[index]
    if len(state) < batch:
        found = torch.einsum("bhrk,hkv->bhrv", rows.unflatten(0, (batch, -1)), state[0]).flatten(0, 1)
    else:
        found = torch.bmm(rows, state.flatten(0, 1))
    return found if slab.decay.row_decay is None else found.mul_(slab.decay.row_decay[index])


def _moved_on(slab: Slab, index: int, state: Before | None, here: Tensor, batch: int, in_place: bool) -> State:
    """S' of a chunk, in the same memory where that may be."""
    decay = slab.decay
    columns, whole = decay.columns[index].mT, decay.whole[index]
    here = here if decay.column_decay is None else here * decay.column_decay[index]
    if state is None:
        moved = torch.bmm(columns, here)
        return (moved.mul_(whole) if decay.whole_last else moved).unflatten(0, (batch, -1))
    before = state.expand(batch, -1, -1, -1).flatten(0, 1)
    if decay.whole_last:
        moved = before.baddbmm_(columns, here) if in_place else torch.baddbmm(before, columns, here)
        return moved.mul_(whole).unflatten(0, (batch, -1))
    moved = before.mul_(whole) if in_place else before * whole
    return moved.baddbmm_(columns, here).unflatten(0, (batch, -1))


def backward_pass(
    slab: Slab,
    kept: Kept,
    read_grad: Reads,
    adjoint: Float[Tensor, "batch_head d_k d_v"] | None,
    factors: Factors,
    *,
    want_adjoint: bool,
) -> tuple[Float[Tensor, "batch_head d_k d_v"] | None, Factors]:
    """dLoss/dS before the slab, and the gradients of its factors, in the places of the factors.

    Args:
        slab: the chunks.
        kept: what `forward_pass` kept.
        read_grad: dLoss/do.
        adjoint: dLoss/dS after the slab; zero when None.
        factors: what the slab was made of.
        want_adjoint: whether dLoss/dS before the slab is needed.
    """
    decay, size = slab.decay, slab.size
    end = None if adjoint is None or kept.after is None else (adjoint * kept.after).sum(-1)
    found_grad = read_grad.new_empty(*decay.rows.shape[:3], read_grad.shape[-1])
    found_grad[:, :, :size] = read_grad
    value_grad = torch.empty_like(slab.values)
    rows, columns = torch.empty_like(decay.rows), torch.empty_like(decay.columns)
    for index in reversed(range(slab.chunks)):
        carried_grad = _to_carried(slab, index, kept, read_grad, adjoint, columns)
        value_grad[index] = carried_grad[:, -slab.values.shape[2] :]
        grad = found_grad[index]
        if slab.solver is not None:
            x = torch.bmm(slab.solver[index].mT, carried_grad[:, :size])
            grad[:, size:] = x
            if slab.tied:
                value_grad[index] = x
            else:
                value_grad[index].baddbmm_(decay.gram[index, :, size:, size:].mT, x)
        weighted = grad if decay.row_decay is None else grad * decay.row_decay[index]
        state = kept.states[index]
        if state is None:
            rows[index] = 0
        else:
            torch.bmm(weighted, state.mT, out=rows[index])
        if index or want_adjoint:
            if adjoint is None:
                adjoint = torch.bmm(decay.rows[index].mT, weighted)
            else:
                adjoint = (adjoint * decay.whole[index]).baddbmm_(decay.rows[index].mT, weighted)
    row_grad, column_grad = decay.back(found_grad @ kept.carried.mT, rows, columns)
    return adjoint if want_adjoint else None, _to_factors(slab, factors, row_grad, column_grad, value_grad, end)


def _to_carried(
    slab: Slab, index: int, kept: Kept, read_grad: Reads, adjoint: Tensor | None, columns: Tensor
) -> Float[Tensor, "batch_head column d_v"]:
    """dV of a chunk; what the state gives to the gradient of its columns is left in `columns`."""
    decay, asked, here = slab.decay, slab.asked[index].mT, kept.carried[index]
    if adjoint is None:
        columns[index] = 0
        return torch.bmm(asked, read_grad[index])
    after = adjoint * decay.whole[index] if decay.whole_last else adjoint
    through_state = torch.bmm(decay.columns[index], after)
    if decay.column_decay is not None:
        through_state.mul_(decay.column_decay[index])
        here = here * decay.column_decay[index]
    torch.bmm(here, after.mT, out=columns[index])
    return through_state.baddbmm_(asked, read_grad[index])


def _to_factors(
    slab: Slab, factors: Factors, rows: Tensor, columns: Tensor, values: Tensor, end: Tensor | None
) -> Factors:
    """Gradients of the stacks to gradients of the factors, that of the log-decay among them."""
    batch = factors.query.shape[0]
    (query, *probes), stacked = unstack(rows, batch), unstack(columns, batch)
    (value, *more_values) = unstack(values.unflatten(2, (-1, slab.size)), batch)
    held, held_before = factors.query * query, None
    grads: dict[str, Tensor | None] = {"erase": None, "probe": None, "erase_strength": None}
    if factors.erase_strength is not None:
        held_before = factors.write_key * probes[0]
        grads["erase_strength"] = held_before.sum(-1)
        held_before *= factors.erase_strength[..., None]
        held -= factors.write_key * stacked[0]
        key = stacked[0].addcmul_(factors.erase_strength[..., None], probes[0])
    else:
        if factors.erase is not None and factors.probe is not None:
            grads["erase"], grads["probe"], *stacked = *stacked[:1], *probes, *stacked[1:]
            held_before = factors.probe * probes[0]
            held -= factors.erase * grads["erase"]
        several = factors.write_key.ndim == 5
        key = torch.stack(stacked, dim=3) if several else stacked[0]
        value = torch.stack([value, *more_values], dim=3) if several else value
        held -= (factors.write_key * key).sum(3) if several else factors.write_key * key
    end = None if end is None else end.unflatten(0, (batch, -1))
    log_decay = _of_log_decay(held, held_before, end, factors.vector_decay)
    return Factors(log_decay=log_decay, write_key=key, write_value=value, query=query, **grads)  # type: ignore[arg-type]


def _of_log_decay(
    held: Float[Tensor, "batch pos head d_k"],
    held_before: Float[Tensor, "batch pos head d_k"] | None,
    end: Float[Tensor, "batch head d_k"] | None,
    vector: bool,
) -> Float[Tensor, "batch pos head *d_k"]:
    """The gradient of each log-decay: c_t is the sum of those up to t, and what probes find has decayed up to t - 1 alone."""
    if not vector:
        held, end = held.sum(-1), None if end is None else end.sum(-1)
        held_before = None if held_before is None else held_before.sum(-1)
    of_c = held if held_before is None else held + held_before
    if end is not None:
        of_c[:, -1] += end
    back = of_c.flip(1).cumsum(1).flip(1)
    return back if held_before is None else back - held_before
