"""The same recurrence in chunks: dense matrix products inside a chunk, one small recurrence across chunks (design: WY form).

Inside a chunk let c_t be the inclusive cumulative log-decay, D(t<-j) = exp(c_t - c_j), and y_t = probe_t^T S_{t-1}. Then

    M[t,j] = probe_t . D(t-1<-j) erase_j  (j < t)      y  = (I - M)^{-1} (B~ S_0 + N F)      B~_t = D(t-1<-0) probe_t
    N[t,m] = probe_t . D(t-1<-m) key_m    (m < t)      o  = Q~ S_0 + P y + R F               Q~_t = D(t<-0) query_t
    P[t,j] = query_t . D(t<-j) erase_j    (j <= t)     S' = D(C<-0) S_0 + sum_j D(C<-j) erase_j y_j^T
    R[t,m] = query_t . D(t<-m) key_m      (m <= t)                      + sum_m D(C<-m) key_m value_m^T

(F holds the write values.) Everything but S_0 is prepared for all chunks at once; then the chunks run in sequence, and a chunk
only meets its incoming state through the few rows of B~ and Q~: no [d_k, d_k] transition is ever formed.

When the erase is tied to the write (probe = key, erase = s * key), y only occurs in u_j = s_j y_j + value_j, which solves
(I - diag(s) N) u = F + diag(s) B~ S_0; two Gram matrices do instead of four. See Yang et al. 2024 (arXiv:2406.06484).
"""

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_recurrent.factors import Before, Factors, Read, State, state_dtype

# exp overflows float32 above 88; a vector decay that stays inside this bound over a chunk may be split into two factors.
SAFE_EXPONENT = 60.0


class Chunk(NamedTuple):
    """What a chunk does to its incoming state S, with y = solver @ (given + prober @ S) where the rule erases:

    o = reader @ S + local + asked @ y,   S' = decay * S + injection + carrier^T @ y.
    """

    decay: Float[Tensor, "*chunks channel one"]
    """D(C<-0), per key channel or one number."""
    reader: Float[Tensor, "*chunks pos d_k"]
    local: Float[Tensor, "*chunks pos d_v"] | None = None
    """What queries read of writes in the chunk; None where it is all in y (tied)."""
    injection: Float[Tensor, "*chunks d_k d_v"] | None = None
    solver: Float[Tensor, "*chunks pos pos"] | None = None
    """(I - M)^{-1}. This and the four below are None where nothing is erased."""
    given: Float[Tensor, "*chunks pos d_v"] | None = None
    prober: Float[Tensor, "*chunks pos d_k"] | None = None
    asked: Float[Tensor, "*chunks pos pos"] | None = None
    carrier: Float[Tensor, "*chunks pos d_k"] | None = None

    def unbind(self) -> Iterator["Chunk"]:
        """Chunk by chunk. Unbinding, not indexing: its backward is one stack instead of a zero-filled tensor per chunk."""
        count = self.reader.shape[2]
        parts = [[None] * count if tensor is None else tensor.unbind(2) for tensor in self]
        return (Chunk(*one) for one in zip(*parts, strict=True))


def chunked_scan(
    factors: Factors,
    initial_state: Before | None = None,
    *,
    chunk_size: int | None = None,
    want_state: bool = True,
) -> tuple[Read, State | None]:
    """Scan in chunks; equal to `step_scan` up to rounding, and differentiable.

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
    dtype = state_dtype(factors.query.dtype)
    state = None if initial_state is None else initial_state.to(dtype)
    factors = factors.map(lambda tensor: tensor.to(dtype))
    reads = []
    whole = factors.length - factors.length % chunk_size
    for start, stop in ((0, whole), (whole, factors.length)):
        if stop > start:
            size, last = min(chunk_size, stop - start), stop == factors.length
            some = factors.at(slice(start, stop))
            read, state = _scan_equal_chunks(some, state, size, want_state or not last)
            reads.append(read)
    if not reads:
        read = factors.query.new_zeros(*factors.query.shape[:3], factors.d_v)
        return read, (factors.zero_state() if state is None else state) if want_state else None
    return (reads[0] if len(reads) == 1 else torch.cat(reads, dim=1)), state


def default_chunk_size(factors: Factors) -> int:
    """16 for vector decay, whose Gram factors must stay finite; else about d_k, which balances the Gram and state products."""
    return 16 if factors.vector_decay else (32 if factors.d_k <= 32 else 64)


def _scan_equal_chunks(
    factors: Factors, state: Before | None, size: int, want_state: bool
) -> tuple[Read, State | None]:
    """Scan a length that is a multiple of the chunk size."""
    chunk = _tied_chunk(factors, size) if factors.erase_strength is not None else _decoupled_chunk(factors, size)
    reads, count = [], factors.length // size
    for index, now in enumerate(chunk.unbind()):
        read, state = _one_chunk(now, state, want_state or index + 1 < count)
        reads.append(read)
    read = reads[0] if count == 1 else torch.cat(reads, dim=2)
    return read.transpose(1, 2), state


def _one_chunk(chunk: Chunk, state: Before | None, want_state: bool) -> tuple[Tensor, State | None]:
    """Reads [batch, head, pos, d_v] of one chunk, and the state that it leaves; a state of None is empty."""
    read = _plus(_times(chunk.reader, state), chunk.local)
    after = _plus(None if state is None else chunk.decay * state, chunk.injection) if want_state else None
    if chunk.solver is not None:
        y = chunk.solver @ _plus(_times(chunk.prober, state), chunk.given)
        read = _plus(chunk.asked @ y, read)
        after = _plus(chunk.carrier.mT @ y, after) if want_state else None  # type: ignore[union-attr]
    return read, after


def _plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of what is there."""
    return other if one is None else one if other is None else one + other


def _times(
    rows: Float[Tensor, "batch head pos d_k"], state: Before | None
) -> Float[Tensor, "batch head pos d_v"] | None:
    """rows @ state; where one state serves every row of the batch it is not copied: their rows become one product."""
    if state is None:
        return None
    if len(state) == 1 and len(rows) > 1:
        return torch.einsum("bhck,hkv->bhcv", rows, state[0])
    return rows @ state


def _split(tensor: Tensor, size: int) -> Tensor:
    """[batch, pos, head, ...] -> [batch, head, chunk, pos in chunk, ...], copied once here instead of in every product."""
    return tensor.unflatten(1, (-1, size)).movedim(3, 1).contiguous()


def _tied_chunk(factors: Factors, size: int) -> Chunk:
    """The chunk of a native delta rule: one triangular system in u_j = strength_j y_j + value_j, which stands for y."""
    key, value, query = (_split(t, size) for t in (factors.write_key, factors.write_value, factors.query))
    strength = _split(factors.erase_strength, size)[..., None]  # type: ignore[arg-type]
    decay = _Decay(_split(factors.log_decay, size))
    # 1. Gram matrices with the decay between their positions
    key_on_key = decay.gram(key, key, exclusive=True)
    key_on_query = decay.gram(query, key, exclusive=False)
    # 2. u = (I - diag(s) N)^{-1} (F + diag(s) B~ S_0), 3. what is read of S_0 and of u, 4. what of both goes on
    return Chunk(
        decay=decay.whole[..., None],
        reader=decay.from_start(query, exclusive=False),
        solver=_inverse(strength * key_on_key),
        given=value,
        prober=strength * decay.from_start(key, exclusive=True),
        asked=key_on_query,
        carrier=decay.to_end(key),
    )


def _decoupled_chunk(factors: Factors, size: int) -> Chunk:
    """The chunk of the general recurrence: the erase and any number of writes are independent of each other."""
    query = _split(factors.query, size)
    decay = _Decay(_split(factors.log_decay, size))
    key, value, terms = _split(factors.write_key, size), _split(factors.write_value, size), 1
    if factors.write_key.ndim == 5:  # several writes per position stand one after the other
        terms = factors.write_key.shape[3]
        key, value = (t.flatten(3, 4) for t in (key, value))
    chunk = Chunk(
        decay=decay.whole[..., None],
        reader=decay.from_start(query, exclusive=False),
        local=decay.gram(query, key, exclusive=False, terms=terms) @ value,
        injection=decay.to_end(key, terms=terms).mT @ value,
    )
    if factors.erase is None or factors.probe is None:
        return chunk
    erase, probe = _split(factors.erase, size), _split(factors.probe, size)
    return chunk._replace(
        solver=_inverse(decay.gram(probe, erase, exclusive=True)),
        given=decay.gram(probe, key, exclusive=True, terms=terms) @ value,
        prober=decay.from_start(probe, exclusive=True),
        asked=decay.gram(query, erase, exclusive=False),
        carrier=decay.to_end(erase),
    )


def _inverse(strictly_lower: Tensor) -> Tensor:
    """(I - strictly_lower)^{-1}, unit lower triangular, by forward substitution."""
    identity = torch.eye(strictly_lower.shape[-1], dtype=strictly_lower.dtype, device=strictly_lower.device)
    return torch.linalg.solve_triangular(-strictly_lower, identity, upper=False, unitriangular=True)


class _Decay:
    """Cumulative log-decay of every chunk, and the four ways in which a chunk uses it.

    A difference c_t - c_j with j <= t is never positive, so its exponential is safe; exp(-c_j) alone would overflow.
    """

    def __init__(self, log_decay: Float[Tensor, "batch head chunk pos *d_k"]):
        self.per_channel = log_decay.ndim == 5
        log_decay = log_decay if self.per_channel else log_decay[..., None]
        self.inclusive = log_decay.cumsum(dim=3)
        self.exclusive = self.inclusive - log_decay
        self.last = self.inclusive[:, :, :, -1:]
        self.whole = self.last[:, :, :, 0].exp()
        self.size = log_decay.shape[3]

    @cached_property
    def since_start(self) -> tuple[Tensor, Tensor]:
        """The decay from the chunk's start to t, and to t - 1."""
        return self.inclusive.exp(), self.exclusive.exp()

    @cached_property
    def growth(self) -> Tensor:
        """exp(-c_j), which only a bounded decay leaves finite."""
        return (-self.inclusive).exp()

    @cached_property
    def bounded(self) -> bool:
        """Whether exp(-c_j) is finite and may be split off."""
        return bool(self.last.min() > -SAFE_EXPONENT)

    def from_start(self, rows: Tensor, *, exclusive: bool) -> Tensor:
        """rows_t scaled by the decay from the chunk's start to t (to t - 1 when exclusive)."""
        return rows * self.since_start[exclusive]

    def to_end(self, rows: Tensor, terms: int = 1) -> Tensor:
        """rows_j scaled by the decay from j to the chunk's end."""
        return rows * _repeat((self.last - self.inclusive).exp(), terms)

    def gram(self, left: Tensor, right: Tensor, *, exclusive: bool, terms: int = 1) -> Tensor:
        """left_t . D(t<-j) right_j for j <= t; with exclusive, left_t . D(t-1<-j) right_j for j < t. Zero elsewhere.

        Shape [batch, head, chunk, pos, pos * terms].
        """
        seen = torch.ones(self.size, self.size, dtype=torch.bool, device=left.device).tril(-1 if exclusive else 0)
        if not self.per_channel:
            upto = self.exclusive if exclusive else self.inclusive
            between = (upto - self.inclusive.mT).masked_fill(~seen, -torch.inf).exp()
            return (left @ right.mT) * _repeat(between, terms, dim=-1)
        seen = _repeat(seen, terms, dim=-1)
        if self.bounded:  # both factors stay finite: two products instead of a tensor of exponents
            # Taken apart at the chunk's start: at its middle, the decays of later positions would enter the rounding of
            # earlier ones, which no edit of a later position may change.
            scaled = self.from_start(left, exclusive=exclusive) @ (right * _repeat(self.growth, terms)).mT
            return scaled.masked_fill(~seen, 0.0)
        upto = self.exclusive if exclusive else self.inclusive
        between = upto[:, :, :, :, None] - _repeat(self.inclusive, terms)[:, :, :, None]
        between = between.masked_fill(~seen[..., None], -torch.inf).exp()
        return torch.einsum("bhntd,bhnmd,bhntmd->bhntm", left, right, between)


def _repeat(per_position: Tensor, terms: int, dim: int = 3) -> Tensor:
    """Repeat the entry of every position once per write term."""
    return per_position if terms == 1 else per_position.repeat_interleave(terms, dim=dim)
