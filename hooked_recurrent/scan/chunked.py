"""The same recurrence in chunks: dense matrix products inside a chunk, one small recurrence across chunks (design: WY form).

Inside a chunk let c_t be the inclusive cumulative log-decay, D(t<-j) = exp(c_t - c_j), and y_t = probe_t^T S_{t-1}. Stack what
reads into rows and what is carried on into columns; one product then gives all four matrices inside the chunk:

    rows = [query]    D(t  <-j) :  [ P  R ]      columns = [erase, key]      P, R keep j <= t
           [probe]    D(t-1<-j) :  [ M  N ]                                  M, N keep j <  t

    found  =  rows~ S_0                       what queries and probes find of the incoming state, decayed up to them
    y      =  (I - M)^{-1} (found_probe + N F)                                (F holds the write values)
    o      =  found_query + [P R] [y; F]
    S'     =  D(C<-0) S_0 + (columns decayed up to the end)^T [y; F]

When the erase is tied to the write (probe = key, erase = s * key), y only occurs in u_j = s_j y_j + value_j, which solves
(I - s N) u = F + s found_probe; rows are then [query, s key] and columns the key alone, half as much work. Where nothing is
erased, rows are the query and columns the keys, and F is all that is carried. See Yang et al. 2024 (arXiv:2406.06484).

A few chunks at a time, a slab, are prepared together: small enough to stay in the cache, and nothing of the size of a state is
ever made for more than the chunk at hand. Without a gradient to record, a slab's own buffers are written over.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_recurrent.factors import Before, Factors, Read, State, state_dtype
from hooked_recurrent.scan.chunk_passes import backward_pass, forward_pass
from hooked_recurrent.scan.slab import Slab
from hooked_recurrent.scan.step import step_scan

# Bytes that the stacks of a slab may take, so that they stay in the cache.
SLAB_BYTES = 4 << 20
# Bytes that the states of a group of rows may take; more rows than that are scanned group by group.
STATE_BYTES = 4 << 20


def chunked_scan(
    factors: Factors,
    initial_state: Before | None = None,
    *,
    chunk_size: int | None = None,
    want_state: bool = True,
) -> tuple[Read, State | None]:
    """Scan in chunks; equal to `step_scan` up to rounding, and differentiable.

    Its gradient is the transposed scan, with the chunks made again instead of kept. That gradient's own gradient is taken
    through `step_scan`: exact, but slow; and so is everything under a transform of torch.func.

    Args:
        factors: the six roles, tied or decoupled, with one or several writes per position.
        initial_state: S_0, zero by default.
        chunk_size: positions per chunk; `default_chunk_size` by default.
        want_state: whether the final state is needed; without it the last chunk's is not computed.

    Returns:
        read [batch, pos, head, d_v] and the final state (None unless wanted), both in the state's dtype.
    """
    if chunk_size is None:
        chunk_size = default_chunk_size(factors)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    batch, heads = factors.query.shape[0], factors.query.shape[2]
    rows = max(1, STATE_BYTES // (heads * factors.d_k * factors.d_v * 4))
    if batch <= rows or factors.length < chunk_size:
        return _scan_group(factors, initial_state, chunk_size, want_state)
    # Split, not sliced: the gradients of the groups are then put together once.
    cut = {name: tensor.split(rows) for name, tensor in vars(factors).items() if tensor is not None}
    shared = initial_state is None or len(initial_state) == 1
    done = []
    for index in range(-(-batch // rows)):
        some = Factors(**{name: groups[index] for name, groups in cut.items()})
        state = initial_state if shared else initial_state[index * rows : (index + 1) * rows]  # type: ignore[index]
        done.append(_scan_group(some, state, chunk_size, want_state))
    reads, states = zip(*done, strict=True)
    return torch.cat(reads), torch.cat(states) if want_state else None


def default_chunk_size(factors: Factors) -> int:
    """How many positions go into a chunk: few for wide heads, whose products are large by themselves."""
    return 16 if factors.d_k >= 64 else 32


def slabs(factors: Factors, chunk_size: int) -> list[tuple[int, int, int]]:
    """(start, stop, chunk size) of every slab: as many whole chunks as fit `SLAB_BYTES`, then the remainder as a short one."""
    batch, length, heads, d_k = factors.query.shape
    terms = factors.write_key.shape[3] if factors.write_key.ndim == 5 else 1
    per_position = batch * heads * ((3 + terms) * d_k + (1 + terms) * factors.d_v) * 4
    chunks = max(1, SLAB_BYTES // (per_position * chunk_size))
    whole = length - length % chunk_size
    starts = range(0, whole, chunks * chunk_size)
    cut = [(start, min(start + chunks * chunk_size, whole), chunk_size) for start in starts]
    return cut + ([(whole, length, length - whole)] if whole < length else [])


def _scan_group(factors: Factors, state: Before | None, chunk_size: int, want_state: bool) -> tuple[Read, State | None]:
    """Scan rows that fit into the cache together, with or without a gradient to record."""
    dtype = state_dtype(factors.query.dtype)
    batch, length, heads, _ = factors.query.shape
    if length and torch._C._are_functorch_transforms_active():  # they know torch's operations, not our gradient
        read, after = step_scan(factors, state)
        return read, after if want_state else None
    state = None if state is None else state.to(dtype)
    if length == 0:
        read = torch.zeros(batch, 0, heads, factors.d_v, dtype=dtype, device=factors.query.device)
        return read, (factors.zero_state() if state is None else state) if want_state else None
    factors = factors.map(lambda tensor: tensor.to(dtype))
    names = [name for name, tensor in vars(factors).items() if tensor is not None]
    tensors = [getattr(factors, name) for name in names]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*tensors, state) if tensor is not None):
        initial = None if state is None else state.expand(batch, -1, -1, -1)
        return _Differentiable.apply(names, chunk_size, want_state, initial, *tensors)
    read, after, _ = _forward(factors, state, chunk_size, want_state, keep=False)
    return read, after


def _forward(
    factors: Factors, state: Before | None, chunk_size: int, want_state: bool, *, keep: bool
) -> tuple[Read, State | None, list[State]]:
    """Slab by slab; with `keep`, also the state before each slab but the first, which else is written over."""
    batch, length, heads, _ = factors.query.shape
    read = factors.query.new_empty(batch, length, heads, factors.d_v)
    borders: list[State] = []
    for start, stop, size in slabs(factors, chunk_size):
        slab, owned = Slab(factors.at(slice(start, stop)), size), start > 0 and not keep
        if start and keep and state is not None:
            borders.append(state)
        some, state, _ = forward_pass(slab, state, batch, want_state=want_state or stop < length, owned=owned)
        _chunks_of(read[:, start:stop], size).copy_(some.unflatten(1, (batch, -1)))
    return read, state, borders


def _chunks_of(sequence: Read, size: int) -> Float[Tensor, "chunk batch head pos_in_chunk d_v"]:
    """A view of a sequence, chunk by chunk."""
    return sequence.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4)


class _Differentiable(torch.autograd.Function):
    """The scan with its gradient: states are kept at the borders of slabs, and all else is made again."""

    @staticmethod
    def forward(ctx, names: list[str], chunk_size: int, want_state: bool, state: State | None, *tensors: Tensor):
        """Scan; `tensors` are the factors called `names`."""
        ctx.names, ctx.chunk_size, ctx.want_state = names, chunk_size, want_state
        ctx.set_materialize_grads(False)
        factors = Factors(**dict(zip(names, tensors, strict=True)))
        read, after, ctx.borders = _forward(factors, state, chunk_size, want_state, keep=True)
        ctx.save_for_backward(*tensors, state)
        return read, after

    @staticmethod
    def backward(ctx, read_grad: Tensor | None, adjoint: Tensor | None) -> tuple[Tensor | None, ...]:
        """The transposed scan, from the last slab to the first."""
        *tensors, state = ctx.saved_tensors
        factors = Factors(**dict(zip(ctx.names, tensors, strict=True)))
        if torch.is_grad_enabled():  # someone wants to differentiate this gradient
            return None, None, None, *_differentiable_gradients(ctx.names, factors, state, read_grad, adjoint)
        batch, found = factors.query.shape[0], []
        if read_grad is None:
            read_grad = factors.query.new_zeros(*factors.query.shape[:3], factors.d_v)
        moved = None if adjoint is None else adjoint.flatten(0, 1)
        cuts = slabs(factors, ctx.chunk_size)
        for (start, stop, size), before in zip(reversed(cuts), [*ctx.borders[::-1], state], strict=True):
            some = factors.at(slice(start, stop))
            slab = Slab(some, size)
            _, _, kept = forward_pass(slab, before, batch, want_state=moved is not None, keep=True)
            grad = _chunks_of(read_grad[:, start:stop], size).flatten(1, 2)
            wanted = start > 0 or (state is not None and ctx.needs_input_grad[3])
            moved, of_factors = backward_pass(slab, kept, grad, moved, some, want_adjoint=wanted)
            found.append(of_factors)
        whole = [torch.cat([getattr(part, name) for part in found[::-1]], dim=1) for name in ctx.names]
        return None, None, None, None if moved is None else moved.unflatten(0, (batch, -1)), *whole


def _differentiable_gradients(
    names: list[str], factors: Factors, state: State | None, read_grad: Tensor | None, adjoint: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The same gradients with a graph of their own, by the step reference."""
    inputs = [getattr(factors, name) for name in names] + ([] if state is None else [state])
    pairs = zip(step_scan(factors, state), (read_grad, adjoint), strict=True)
    outputs, grads = zip(*((output, grad) for output, grad in pairs if grad is not None), strict=True)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    made = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    found = [next(made) if tensor.requires_grad else None for tensor in inputs]
    return None if state is None else found[-1], *found[: len(names)]
