"""The same recurrence in chunks: dense matrix products inside a chunk, one small recurrence across chunks (design: WY form).

Inside a chunk let c_t be the inclusive cumulative log-decay, D(t<-j) = exp(c_t - c_j), and y_t = probe_t^T S_{t-1}. Then

    M[t,j] = probe_t . D(t-1<-j) erase_j  (j < t)      y  = (I - M)^{-1} (B~ S_0 + N F)      B~_t = D(t-1<-0) probe_t
    N[t,m] = probe_t . D(t-1<-m) key_m    (m < t)      o  = Q~ S_0 + P y + R F               Q~_t = D(t<-0) query_t
    P[t,j] = query_t . D(t<-j) erase_j    (j <= t)     S' = D(C<-0) S_0 + sum_j D(C<-j) erase_j y_j^T
    R[t,m] = query_t . D(t<-m) key_m      (m <= t)                      + sum_m D(C<-m) key_m value_m^T

(F holds the write values.) Everything but S_0 is known for all chunks at once, so a chunk becomes an affine map of its
incoming state, S' = transition S_0 + injection and o = reader S_0 + local, and only that map runs in sequence.

When the erase is tied to the write (probe = key, erase = s * key), y only occurs in u_j = s_j y_j + value_j, which solves
(I - diag(s) N) u = F + diag(s) B~ S_0; two Gram matrices do instead of four. See Yang et al. 2024 (arXiv:2406.06484).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_recurrent.factors import Factors, Read, State, state_dtype

# exp overflows float32 above 88; a vector decay that stays inside this bound over a chunk may be split into two factors.
SAFE_EXPONENT = 60.0


class Chunk(NamedTuple):
    """A chunk as an affine map of its incoming state S: S' = transition @ S + injection, o = reader @ S + local."""

    transition: Float[Tensor, "batch head chunk d_k d_k"] | None
    """None where the transition is diagonal (no erase); then `decay` alone carries the state over."""
    decay: Float[Tensor, "batch head chunk channel"]
    injection: Float[Tensor, "batch head chunk d_k d_v"]
    reader: Float[Tensor, "batch head chunk pos d_k"]
    local: Float[Tensor, "batch head chunk pos d_v"]


def chunked_scan(
    factors: Factors, initial_state: State | None = None, *, chunk_size: int | None = None
) -> tuple[Read, State]:
    """Scan in chunks; equal to `step_scan` up to rounding, and differentiable.

    Args:
        factors: the six roles, tied or decoupled, with one or several writes per position.
        initial_state: S_0, zero by default.
        chunk_size: positions per chunk; `default_chunk_size` by default.

    Returns:
        read [batch, pos, head, d_v] and the final state, both in the state's dtype.
    """
    if chunk_size is None:
        chunk_size = default_chunk_size(factors)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    dtype = state_dtype(factors.query.dtype)
    state = factors.zero_state() if initial_state is None else initial_state.to(dtype)
    factors = factors.map(lambda tensor: tensor.to(dtype))
    reads = []
    whole = factors.length - factors.length % chunk_size
    for start, stop in ((0, whole), (whole, factors.length)):
        if stop > start:
            size = min(chunk_size, stop - start)
            read, state = _scan_equal_chunks(factors.at(slice(start, stop)), state, size)
            reads.append(read)
    if not reads:
        return factors.query.new_zeros(*factors.query.shape[:3], factors.d_v), state
    return (reads[0] if len(reads) == 1 else torch.cat(reads, dim=1)), state


def default_chunk_size(factors: Factors) -> int:
    """16 for vector decay, whose Gram factors must stay finite; else about d_k, which balances the Gram and state products."""
    return 16 if factors.vector_decay else (32 if factors.d_k <= 32 else 64)


def _scan_equal_chunks(factors: Factors, state: State, size: int) -> tuple[Read, State]:
    """Scan a length that is a multiple of the chunk size."""
    chunk = _tied_chunk(factors, size) if factors.erase_strength is not None else _decoupled_chunk(factors, size)
    incoming = []
    carries = chunk.decay[..., None] if chunk.transition is None else chunk.transition
    # unbind, not indexing: its backward is one stack instead of a zero-filled tensor per chunk
    for carry, injection in zip(carries.unbind(2), chunk.injection.unbind(2), strict=True):
        incoming.append(state)
        state = injection + (carry * state if chunk.transition is None else carry @ state)
    read = chunk.local + chunk.reader @ torch.stack(incoming, dim=2)
    return read.flatten(2, 3).transpose(1, 2), state


def _split(tensor: Tensor, size: int) -> Tensor:
    """[batch, pos, head, ...] -> [batch, head, chunk, pos in chunk, ...]."""
    return tensor.unflatten(1, (-1, size)).movedim(3, 1)


def _tied_chunk(factors: Factors, size: int) -> Chunk:
    """The chunk of a native delta rule: one triangular system in u_j = strength_j y_j + value_j."""
    key, value, query = (_split(t, size) for t in (factors.write_key, factors.write_value, factors.query))
    strength = _split(factors.erase_strength, size)[..., None]  # type: ignore[arg-type]
    decay = _Decay(_split(factors.log_decay, size))
    # 1. Gram matrices with the decay between their positions
    key_on_key = decay.gram(key, key, exclusive=True)
    key_on_query = decay.gram(query, key, exclusive=False)
    # 2. u as an affine map of the incoming state: u = solved_value + solved_probe S_0
    right = torch.cat([value, strength * decay.from_start(key, exclusive=True)], dim=-1)
    solved = _solve_unit_lower(strength * key_on_key, right)
    solved_value, solved_probe = solved.split([factors.d_v, factors.d_k], dim=-1)
    # 3. what the queries read, 4. what goes on to the next chunk
    carried_key = decay.to_end(key).mT
    return Chunk(
        transition=carried_key @ solved_probe + _diagonal(decay.whole, factors.d_k),
        decay=decay.whole,
        injection=carried_key @ solved_value,
        reader=decay.from_start(query, exclusive=False) + key_on_query @ solved_probe,
        local=key_on_query @ solved_value,
    )


def _decoupled_chunk(factors: Factors, size: int) -> Chunk:
    """The chunk of the general recurrence: the erase and any number of writes are independent of each other."""
    query = _split(factors.query, size)
    decay = _Decay(_split(factors.log_decay, size))
    key, value, terms = _split(factors.write_key, size), _split(factors.write_value, size), 1
    if factors.write_key.ndim == 5:  # several writes per position stand one after the other
        terms = factors.write_key.shape[3]
        key, value = (t.flatten(3, 4) for t in (key, value))
    reader = decay.from_start(query, exclusive=False)
    local = decay.gram(query, key, exclusive=False, terms=terms) @ value
    injection = decay.to_end(key, terms=terms).mT @ value
    if factors.erase is None or factors.probe is None:
        return Chunk(None, decay.whole, injection, reader, local)
    erase, probe = _split(factors.erase, size), _split(factors.probe, size)
    # y as an affine map of the incoming state: y = solved_value + solved_probe S_0
    right = torch.cat(
        [decay.gram(probe, key, exclusive=True, terms=terms) @ value, decay.from_start(probe, exclusive=True)], dim=-1
    )
    solved = _solve_unit_lower(decay.gram(probe, erase, exclusive=True), right)
    solved_value, solved_probe = solved.split([factors.d_v, factors.d_k], dim=-1)
    erase_on_query, carried_erase = decay.gram(query, erase, exclusive=False), decay.to_end(erase).mT
    return Chunk(
        transition=carried_erase @ solved_probe + _diagonal(decay.whole, factors.d_k),
        decay=decay.whole,
        injection=injection + carried_erase @ solved_value,
        reader=reader + erase_on_query @ solved_probe,
        local=local + erase_on_query @ solved_value,
    )


def _diagonal(whole: Tensor, d_k: int) -> Tensor:
    """The decay of a whole chunk as a [d_k, d_k] matrix; a scalar decay holds for every channel."""
    return torch.diag_embed(whole.expand(*whole.shape[:-1], d_k))


def _solve_unit_lower(strictly_lower: Tensor, right: Tensor) -> Tensor:
    """(I - strictly_lower)^{-1} right, by forward substitution."""
    return torch.linalg.solve_triangular(-strictly_lower, right, upper=False, unitriangular=True)


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

    def from_start(self, rows: Tensor, *, exclusive: bool) -> Tensor:
        """rows_t scaled by the decay from the chunk's start to t (to t - 1 when exclusive)."""
        return rows * (self.exclusive if exclusive else self.inclusive).exp()

    def to_end(self, rows: Tensor, terms: int = 1) -> Tensor:
        """rows_j scaled by the decay from j to the chunk's end."""
        return rows * _repeat((self.last - self.inclusive).exp(), terms)

    def gram(self, left: Tensor, right: Tensor, *, exclusive: bool, terms: int = 1) -> Tensor:
        """left_t . D(t<-j) right_j for j <= t; with exclusive, left_t . D(t-1<-j) right_j for j < t. Zero elsewhere.

        Shape [batch, head, chunk, pos, pos * terms].
        """
        upto = self.exclusive if exclusive else self.inclusive
        seen = torch.ones(self.size, self.size, dtype=torch.bool, device=left.device).tril(-1 if exclusive else 0)
        if not self.per_channel:
            between = (upto - self.inclusive.mT).masked_fill(~seen, -torch.inf).exp()
            return (left @ right.mT) * between.repeat_interleave(terms, dim=-1)
        seen = seen.repeat_interleave(terms, dim=-1)
        if self.last.min() > -SAFE_EXPONENT:  # both factors stay finite: two products instead of a tensor of exponents
            # Taken apart at the chunk's start: at its middle, the decays of later positions would enter the rounding of
            # earlier ones, which no edit of a later position may change.
            scaled = (left * upto.exp()) @ (right * _repeat((-self.inclusive).exp(), terms)).mT
            return scaled.masked_fill(~seen, 0.0)
        between = upto[:, :, :, :, None] - _repeat(self.inclusive, terms)[:, :, :, None]
        between = between.masked_fill(~seen[..., None], -torch.inf).exp()
        return torch.einsum("bhntd,bhnmd,bhntmd->bhntm", left, right, between)


def _repeat(per_position: Tensor, terms: int) -> Tensor:
    """Repeat every position's row once per write term."""
    return per_position if terms == 1 else per_position.repeat_interleave(terms, dim=3)
