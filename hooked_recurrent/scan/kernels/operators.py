"""The scan and its gradient as operators of torch: autograd, torch.compile and fake tensors see these two and nothing inside.

An operator takes and returns plain tensors, so the roles of Factors stand one after the other, those that are absent as None.
For the way back nothing is kept but the inputs.
"""

from typing import Any

import torch
from torch import Tensor

from hooked_recurrent.factors import Factors
from hooked_recurrent.scan.kernels.backward import backward_chunk_size, scan_backward
from hooked_recurrent.scan.kernels.forward import scan_chunks
from hooked_recurrent.scan.kernels.layout import Sequences, chunk_size


@torch.library.custom_op("hooked_recurrent::scan", mutates_args=())
def scan(
    log_decay: Tensor,
    write_key: Tensor,
    write_value: Tensor,
    query: Tensor,
    erase: Tensor | None,
    probe: Tensor | None,
    erase_strength: Tensor | None,
    initial_state: Tensor | None,
    cu_lengths: Tensor | None,
    snapshots: list[int],
    want_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The reads, the final states (of no sequence where they are not wanted), the snapshots; the last without a gradient."""
    factors = Factors(log_decay, write_key, write_value, query, erase, probe, erase_strength)
    sequences = sequences_of(factors, cu_lengths, chunk_size(factors))
    read, final, states = scan_chunks(factors, sequences, initial_state, snapshots=snapshots, want_state=want_state)
    state = (factors.query.shape[2], factors.d_k, factors.d_v)
    final = read.new_empty(0, *state) if final is None else final
    return read, final, read.new_empty(0, sequences.count, *state) if states is None else states


@scan.register_fake
def _(
    log_decay, write_key, write_value, query, erase, probe, erase_strength, initial_state, cu_lengths, snapshots, want_state
):  # fmt: skip
    batch, length, heads, d_k = query.shape
    sequences = batch if cu_lengths is None else cu_lengths.shape[0] - 1
    state, like = (heads, d_k, write_value.shape[-1]), query.new_empty(0, dtype=torch.float32)
    read = like.new_empty(batch, length, heads, write_value.shape[-1])
    return (
        read,
        like.new_empty(sequences if want_state else 0, *state),
        like.new_empty(len(snapshots), sequences, *state),
    )


@torch.library.custom_op("hooked_recurrent::scan_gradient", mutates_args=())
def scan_gradient(
    log_decay: Tensor,
    write_key: Tensor,
    write_value: Tensor,
    query: Tensor,
    erase: Tensor | None,
    probe: Tensor | None,
    erase_strength: Tensor | None,
    initial_state: Tensor | None,
    cu_lengths: Tensor | None,
    read_gradient: Tensor,
    final_gradient: Tensor | None,
) -> list[Tensor]:
    """The gradients of the roles that are there, in order, and then that of the initial state if there is one."""
    factors = Factors(log_decay, write_key, write_value, query, erase, probe, erase_strength)
    sequences = sequences_of(factors, cu_lengths, backward_chunk_size(factors))
    roles, initial_gradient = scan_backward(factors, initial_state, sequences, read_gradient, final_gradient)
    gradients = [gradient for gradient in vars(roles).values() if gradient is not None]
    if initial_state is not None:
        if len(initial_state) < sequences.count:  # one state for every sequence
            initial_gradient = initial_gradient.sum(dim=0, keepdim=True)
        gradients.append(initial_gradient.to(initial_state.dtype))
    return gradients


@scan_gradient.register_fake
def _(*inputs):
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs[:8] if tensor is not None
    ]


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.want_state = inputs[10]


def _backward(
    ctx: Any, read_gradient: Tensor, final_gradient: Tensor, snapshot_gradient: Tensor
) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    gradients = iter(scan_gradient(*inputs, read_gradient, final_gradient if ctx.want_state else None))
    return *(None if tensor is None else next(gradients) for tensor in inputs[:8]), None, None, None


def _no_second_derivative(ctx: Any, *gradients: Any) -> None:
    raise NotImplementedError(
        "the Triton scan has no second derivatives: take them through hooked_recurrent.scan.chunked.chunked_scan"
    )


scan.register_autograd(_backward, setup_context=_keep_inputs)
scan_gradient.register_autograd(_no_second_derivative)


def sequences_of(factors: Factors, cu_lengths: Tensor | None, size: int) -> Sequences:
    """One sequence per batch row, or those that are packed in the only row."""
    batch, length = factors.query.shape[:2]
    if cu_lengths is None:
        return Sequences.of_batch(batch, length, size, factors.query.device)
    cu_lengths = cu_lengths.cpu()
    stops = cu_lengths.tolist()
    if stops != sorted(stops) or stops[:1] != [0] or stops[-1:] != [length]:
        raise ValueError(f"cu_lengths must rise from 0 to the length of the row, {length}, got {stops}")
    return Sequences.packed(cu_lengths, size, factors.query.device)
