"""The public scan on Triton kernels: like the other backends, and able to take packed sequences and snapshots."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent.factors import Factors, Read
from hooked_recurrent.scan.kernels.device import WIDEST, runs_on
from hooked_recurrent.scan.kernels.operators import scan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ScanResult(NamedTuple):
    """What a scan leaves, in float32."""

    read: Read
    """[batch, pos, head, d_v]."""
    state: Float[Tensor, "sequences head d_k d_v"] | None
    """The state of every sequence after its last position; None unless wanted."""
    snapshots: list[Float[Tensor, "sequences head d_k d_v"]]
    """The states after the counts of positions asked for."""


def triton_scan(
    factors: Factors,
    initial_state: Float[Tensor, "sequences_or_1 head d_k d_v"] | None = None,
    *,
    cu_lengths: Int[Tensor, "sequences_plus_1"] | None = None,
    snapshots: Sequence[int] = (),
    want_state: bool = True,
) -> ScanResult:
    """Scan in chunks with kernels; equal to `step_scan` up to the rounding of float32, and differentiable once.

    Args:
        factors: the six roles in float32, bfloat16 or float16, tied or decoupled, with one or several writes per position.
        initial_state: S_0, zero by default; a single one serves every sequence.
        cu_lengths: where packed sequences stop, from 0: sequence i has the positions cu_lengths[i] .. cu_lengths[i + 1] - 1
            of the only batch row. None for one sequence per row.
        snapshots: after how many positions states are wanted too; not with cu_lengths.
        want_state: whether the final state is needed.
    """
    check(factors, initial_state, cu_lengths, snapshots)
    tensors = (*vars(factors).values(), initial_state)
    if snapshots and torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _in_stretches(factors, initial_state, snapshots, want_state)
    read, state, states = scan(*tensors, cu_lengths, list(snapshots), want_state)
    return ScanResult(read, state if want_state else None, list(states.unbind()))


def _in_stretches(
    factors: Factors,
    initial_state: Float[Tensor, "sequences_or_1 head d_k d_v"] | None,
    snapshots: Sequence[int],
    want_state: bool,
) -> ScanResult:
    """One scan up to every snapshot and one from the last, so that gradients pass through all of them."""
    batch, heads = factors.query.shape[0], factors.query.shape[2]
    state = initial_state
    if state is None:
        state = factors.query.new_zeros(1, heads, factors.d_k, factors.d_v, dtype=torch.float32)
    states = {0: state.expand(batch, -1, -1, -1)}
    reads, edges = [], sorted({0, *snapshots, factors.length})
    for start, stop in zip(edges, edges[1:], strict=False):
        part, wanted = factors.at(slice(start, stop)), want_state or stop < edges[-1] or stop in snapshots
        read, state, _ = scan(*vars(part).values(), state, None, [], wanted)
        reads.append(read)
        states[stop] = state
    final = states[factors.length] if want_state else None
    return ScanResult(torch.cat(reads, dim=1), final, [states[count] for count in snapshots])


def check(factors: Factors, initial_state: Tensor | None, cu_lengths: Tensor | None, snapshots: Sequence[int]) -> None:
    """Refuse what the kernels would not compute, or not as precisely as was asked.

    Raises:
        ValueError: for what is wrong in the inputs, with what it is.
    """
    query = factors.query
    if not runs_on(query.device):
        raise ValueError(
            f"the Triton scan needs its inputs on a GPU, got {query.device}; on a CPU use backend 'chunked'"
        )
    present = {**vars(factors), "initial_state": initial_state}
    for name, tensor in present.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            raise ValueError(f"the Triton scan computes in float32: it cannot serve {name} of dtype {tensor.dtype}")
    if factors.length < 1 or not 1 <= factors.d_k <= WIDEST or not 1 <= factors.d_v <= WIDEST:
        sizes = f"{factors.length} positions, d_k = {factors.d_k}, d_v = {factors.d_v}"
        raise ValueError(f"the Triton scan needs a position or more and widths of at most {WIDEST}, got {sizes}")
    if cu_lengths is not None and (query.shape[0] != 1 or snapshots):
        raise ValueError("packed sequences (cu_lengths) stand in one batch row, and no snapshots are taken of them")
    if any(not 0 <= count <= factors.length for count in snapshots):
        raise ValueError(f"snapshots count positions from 0 to {factors.length}, got {list(snapshots)}")
    if initial_state is not None:
        sequences = query.shape[0] if cu_lengths is None else len(cu_lengths) - 1
        shape = (query.shape[2], factors.d_k, factors.d_v)
        if initial_state.shape[1:] != shape or len(initial_state) not in (1, sequences):
            expected = f"[{sequences} or 1, {', '.join(map(str, shape))}]"
            raise ValueError(f"initial_state has shape {list(initial_state.shape)}, expected {expected}")
