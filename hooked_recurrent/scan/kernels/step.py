"""One step of the recurrence in one kernel, for decoding token by token: the state is read once and written once.

    asked = probe^T S      S <- diag(decay) S + erase asked^T + sum_m write_key_m write_value_m^T      read = S^T query

A program holds a block of value columns of one head's state [d_k, block] in registers; columns do not depend on each other.
"""

from collections.abc import Iterator
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from hooked_recurrent.factors import Before, Factors, Read, State, state_dtype
from hooked_recurrent.scan.kernels.device import WIDEST, launching_on, rows_contiguous
from hooked_recurrent.scan.kernels.variants import Case, Variant, register, variants_of

NAMES = ("log_decay", "write_key", "write_value", "query", "erase", "probe", "erase_strength")
NUM_WARPS = 4
FEW_PROGRAMS = 512
"""Below this many programs a GPU of some hundred processors is not busy; narrower blocks make twice as many."""


@triton.jit
@no_type_check  # the tests' type checks would wrap it, and Triton reads the bare function
def _row(base, batch, head, batch_stride, head_stride, columns, WIDTH: tl.constexpr):
    """One factor's row of a head, as float32, zero beyond its width."""
    place = base + batch * batch_stride + head * head_stride + columns
    return tl.load(place, mask=columns < WIDTH, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def step_kernel(
    state, state_batch, state_head, state_row,
    new_state, new_batch, new_head, new_row,
    log_decay, decay_batch, decay_head,
    write_key, key_batch, key_head, key_term,
    write_value, value_batch, value_head, value_term,
    query, query_batch, query_head,
    erase, erase_batch, erase_head,
    probe, probe_batch, probe_head,
    erase_strength, strength_batch, strength_head,
    read, heads,
    TERMS: tl.constexpr, VECTOR_DECAY: tl.constexpr,
    D_K: tl.constexpr, D_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row and head, and block of value columns. Each tensor is followed by its strides."""
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // heads, program % heads
    k = tl.arange(0, BLOCK_K)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (k < D_K)[:, None] & (v < D_V)[None, :]
    before = state + batch * state_batch + head * state_head + k[:, None] * state_row + v[None, :]
    tile = tl.load(before, mask=inside, other=0.0).to(tl.float32)
    key = _row(write_key, batch, head, key_batch, key_head, k, D_K)
    value = _row(write_value, batch, head, value_batch, value_head, v, D_V)
    if VECTOR_DECAY:
        kept = tl.exp(_row(log_decay, batch, head, decay_batch, decay_head, k, D_K))[:, None] * tile
    else:
        kept = tl.exp(tl.load(log_decay + batch * decay_batch + head * decay_head).to(tl.float32)) * tile
    if erase_strength is not None:  # tied: probe = key and erase = strength * key, so both rows land on the key
        strength = tl.load(erase_strength + batch * strength_batch + head * strength_head).to(tl.float32)
        value += strength * tl.sum(key[:, None] * tile, axis=0)
    if erase is not None:
        asked = tl.sum(_row(probe, batch, head, probe_batch, probe_head, k, D_K)[:, None] * tile, axis=0)
        kept += _row(erase, batch, head, erase_batch, erase_head, k, D_K)[:, None] * asked[None, :]
    tile = kept + key[:, None] * value[None, :]
    for term in tl.static_range(1, TERMS):
        key = _row(write_key + term * key_term, batch, head, key_batch, key_head, k, D_K)
        value = _row(write_value + term * value_term, batch, head, value_batch, value_head, v, D_V)
        tile += key[:, None] * value[None, :]
    asking = _row(query, batch, head, query_batch, query_head, k, D_K)
    tl.store(read + program * D_V + v, tl.sum(asking[:, None] * tile, axis=0), mask=v < D_V)
    tl.store(new_state + batch * new_batch + head * new_head + k[:, None] * new_row + v[None, :], tile, mask=inside)


def _arguments(factors: Factors, state: Tensor, new_state: Tensor, read: Tensor) -> dict[str, Any]:
    """Every argument of the kernel but its blocks."""
    strided = {
        "decay": factors.log_decay,
        "key": factors.write_key,
        "value": factors.write_value,
        "query": factors.query,
        "erase": factors.erase,
        "probe": factors.probe,
        "strength": factors.erase_strength,
    }
    strides = {}
    for name, tensor in strided.items():  # of the batch and head axes; what is absent has none
        strides[f"{name}_batch"], strides[f"{name}_head"] = (
            (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(2))
        )
    for name, tensor in (("state", state), ("new", new_state)):
        strides[f"{name}_batch"], strides[f"{name}_head"], strides[f"{name}_row"] = tensor.stride()[:3]
    several = factors.write_key.ndim == 5
    return {
        **{name: getattr(factors, name) for name in NAMES},
        **strides,
        "state": state,
        "new_state": new_state,
        "read": read,
        "heads": factors.query.shape[2],
        "key_term": factors.write_key.stride(3) if several else 0,
        "value_term": factors.write_value.stride(3) if several else 0,
        "TERMS": factors.write_key.shape[3] if several else 1,
        "VECTOR_DECAY": factors.vector_decay,
        "D_K": factors.d_k,
        "D_V": factors.d_v,
    }


def _blocks(factors: Factors) -> dict[str, int]:
    """Blocks of the state: all keys, and 32 values (whole memory sectors) where that leaves enough programs, else 16."""
    rows = factors.query.shape[0] * factors.query.shape[2]
    wide = rows * triton.cdiv(factors.d_v, 32) >= FEW_PROGRAMS
    return {"BLOCK_K": max(16, triton.next_power_of_2(factors.d_k)), "BLOCK_V": 32 if wide else 16}


def _launch(factors: Factors, state: Tensor, new_state: Tensor, read: Tensor) -> None:
    """Run the kernel: it writes `new_state`, which may be `state` itself, and `read`."""
    factors = factors.map(rows_contiguous)
    blocks = _blocks(factors)
    grid = (factors.query.shape[0] * factors.query.shape[2], triton.cdiv(factors.d_v, blocks["BLOCK_V"]))
    with launching_on(state):
        step_kernel[grid](**_arguments(factors, state, new_state, read), **blocks, num_warps=NUM_WARPS)


def _empty_read(query: Tensor, write_value: Tensor) -> Tensor:
    """Memory for the read [batch, 1, head, d_v]."""
    return query.new_empty(*query.shape[:3], write_value.shape[-1], dtype=torch.float32)


@torch.library.custom_op("hooked_recurrent::step", mutates_args=())
def _step(
    state: Tensor,
    log_decay: Tensor,
    write_key: Tensor,
    write_value: Tensor,
    query: Tensor,
    erase: Tensor | None,
    probe: Tensor | None,
    erase_strength: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The read and a new state."""
    factors = Factors(log_decay, write_key, write_value, query, erase, probe, erase_strength)
    read, new_state = _step_shapes(state, *(getattr(factors, name) for name in NAMES))
    _launch(factors, rows_contiguous(state), new_state, read)
    return read, new_state


@_step.register_fake
def _step_shapes(state, log_decay, write_key, write_value, query, erase, probe, erase_strength):
    new_state = query.new_empty(query.shape[0], *state.shape[1:], dtype=torch.float32)
    return _empty_read(query, write_value), new_state


@torch.library.custom_op("hooked_recurrent::step_in_place", mutates_args=("state",))
def _step_in_place(
    state: Tensor,
    log_decay: Tensor,
    write_key: Tensor,
    write_value: Tensor,
    query: Tensor,
    erase: Tensor | None,
    probe: Tensor | None,
    erase_strength: Tensor | None,
) -> Tensor:
    """The read; `state` holds the new state afterwards."""
    factors = Factors(log_decay, write_key, write_value, query, erase, probe, erase_strength)
    read = _empty_read(query, write_value)
    _launch(factors, state, state, read)
    return read


@_step_in_place.register_fake
def _read_shape(state, log_decay, write_key, write_value, query, erase, probe, erase_strength):
    return _empty_read(query, write_value)


def triton_step(factors: Factors, state: Before, *, in_place: bool = False) -> tuple[Read, State]:
    """One position: what `step_scan` computes for factors of length 1, without gradients.

    Args:
        factors: the six roles at a single position, float32 or narrower.
        state: the state before it; one state may serve every row. Converted to float32 when it is narrower.
        in_place: write the new state over the given one, which must be float32, contiguous along d_v, and have a row for each
            row of the factors.

    Returns:
        read [batch, 1, head, d_v] and the new state, float32.

    Raises:
        ValueError: for more than one position, a wider dtype, shapes that do not fit, or a state that cannot be overwritten.
    """
    batch, length, heads, d_k = factors.query.shape
    expected = (heads, d_k, factors.d_v)
    if length != 1:
        raise ValueError(f"a step takes one position, these factors have {length}")
    if max(factors.d_k, factors.d_v) > WIDEST:
        raise ValueError(f"the step kernel serves widths up to {WIDEST}, got d_k = {d_k} and d_v = {factors.d_v}")
    if state_dtype(torch.promote_types(factors.query.dtype, state.dtype)) != torch.float32:
        raise ValueError("the step kernel computes in float32: use step_scan for wider factors or states")
    if tuple(state.shape[1:]) != expected or state.shape[0] not in (1, batch):
        raise ValueError(f"expected a state {(batch, *expected)} or one row of it, got {tuple(state.shape)}")
    tensors = [getattr(factors, name) for name in NAMES]
    if not in_place:
        state = state.float().expand(batch, *expected)
        return _step(state, *tensors)
    own_rows = state.shape[0] == batch and (batch == 1 or state.stride(0) != 0)
    if not own_rows or state.dtype != torch.float32 or state.stride(-1) != 1:
        raise ValueError(
            "a state is overwritten only when it is float32, contiguous along d_v, and has a row for every row"
        )
    return _step_in_place(state, *tensors), state


@register
def variants(case: Case) -> Iterator[Variant]:
    """Both blocks of value columns: a few programs, and many."""
    for batch, label in ((1, "few rows"), (64, "many rows")):
        factors = case.factors(1, batch=batch)
        state = torch.empty(batch, factors.query.shape[2], case.d_k, case.d_v, device="meta")
        read = _empty_read(factors.query, factors.write_value)
        arguments = {**_arguments(factors, state, state, read), **_blocks(factors)}
        yield from variants_of(f"step, {label}", step_kernel, arguments, case, num_warps=NUM_WARPS)
