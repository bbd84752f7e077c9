"""The scan and its gradient as operators of torch: autograd, torch.compile and fake tensors see these two and nothing inside.

An operator takes and returns plain tensors, so the roles of Factors stand one after the other, those that are absent as None. For
the way back nothing is kept but the inputs.
"""

from typing import Any

import torch
from torch import Tensor

from hooked_recurrent.factors import Factors
from hooked_recurrent.scan.kernels.backward import backward_chunk_size, scan_backward
from hooked_recurrent.scan.kernels.forward import carry, read
from hooked_recurrent.scan.kernels.layout import Precision, Sequences
from hooked_recurrent.scan.kernels.prepare import prepare


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
    want_state: bool,
) -> tuple[Tensor, Tensor]:
    """The reads, and the final states (of no sequence where they are not wanted)."""
    factors = Factors(log_decay, write_key, write_value, query, erase, probe, erase_strength)
    sequences = sequences_of(factors, cu_lengths, chunk_size(factors))
    prepared = prepare(factors, sequences)
    y, states, final = carry(
        sequences,
        whole=prepared.whole,
        solved_prober=prepared.solved_prober,
        solved_given=prepared.solved_given,
        carrier=prepared.carrier,
        injector=prepared.injector,
        value=factors.write_value,
        initial_state=initial_state,
        d_k=factors.d_k,
        precision=Precision.of(factors.query.dtype),
        want_final=want_state,
    )
    return read(prepared, y, states, factors, sequences), states.new_empty(0, *states.shape[1:]) if final is None else final


@scan.register_fake
def _(log_decay, write_key, write_value, query, erase, probe, erase_strength, initial_state, cu_lengths, want_state):
    batch, length, heads, d_k = query.shape
    d_v = write_value.shape[-1]
    sequences = (batch if cu_lengths is None else cu_lengths.shape[0] - 1) if want_state else 0
    read = query.new_empty(batch, length, heads, d_v, dtype=torch.float32)
    return read, query.new_empty(sequences, heads, d_k, d_v, dtype=torch.float32)


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
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs[:8] if tensor is not None]


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.want_state = inputs[9]


def _backward(ctx: Any, read_gradient: Tensor, final_gradient: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    gradients = iter(scan_gradient(*inputs, read_gradient, final_gradient if ctx.want_state else None))
    return *(None if tensor is None else next(gradients) for tensor in inputs[:8]), None, None


def _no_second_derivative(ctx: Any, *gradients: Any) -> None:
    raise NotImplementedError(
        "the Triton scan has no second derivatives: take them through hooked_recurrent.scan.chunked.chunked_scan"
    )


scan.register_autograd(_backward, setup_context=_keep_inputs)
scan_gradient.register_autograd(_no_second_derivative)


def chunk_size(factors: Factors) -> int:
    """Positions per chunk: 16 with a decay per channel, which makes Gram matrices column by column, else 64 or 32."""
    return 16 if factors.vector_decay else (64 if factors.d_k <= 128 else 32)


def sequences_of(factors: Factors, cu_lengths: Tensor | None, size: int) -> Sequences:
    """One sequence per batch row, or those that are packed in the only row."""
    batch, length = factors.query.shape[:2]
    if cu_lengths is None:
        return Sequences.of_batch(batch, length, size, factors.query.device)
    return Sequences.packed(cu_lengths, size, factors.query.device)
