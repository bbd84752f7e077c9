"""What every chunk does to its incoming state, as kernels: `prepare` makes it for all chunks at once.

The steps are those of chunked.py, with the same names:

    grams       1. Gram matrices with the decay between their positions                     (a program per chunk and head)
    solver         and (I - M)^{-1}
    key rows    2. what meets the state on the key side: reader, solver @ prober, carrier   (... and block of key channels)
    value rows  3. solver @ given                                                           (... and block of value channels)
"""

from dataclasses import dataclass
from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from hooked_recurrent.factors import Factors
from hooked_recurrent.scan.kernels.layout import (
    Launch,
    Precision,
    Sequences,
    block_of,
    rows_of,
    scratch,
    terms_of,
)
from hooked_recurrent.scan.kernels.tiles import (
    chunk_place,
    first_row,
    gram,
    grams_per_channel,
    inverse,
    load_square,
    load_tile,
    over_chunk,
    scratch_block,
    since_start,
    store_square,
    store_tile,
    until_end,
)


@dataclass(frozen=True)
class Prepared:
    """Of every chunk and head, what chunked.py calls a `Chunk`, the solver already applied to what it can be.

    All in float32, with one row per place of a chunk; rows of places without a position are zero.
    """

    whole: Tensor
    """exp(c_C): the decay over the chunk, [chunk, head, d_k], or [chunk, head, 1] where a head decays as one."""
    reader: Float[Tensor, "chunk head place d_k"]
    """q_t exp(c_t)."""
    injector: Float[Tensor, "chunk head term place d_k"] | None = None
    """e_mj exp(c_C - c_j); None in the tied form, where the writes are in u."""
    queried: Float[Tensor, "chunk head term place place"] | None = None
    """R_m, what queries read of the chunk's writes; None in the tied form."""
    solver: Float[Tensor, "chunk head place place"] | None = None
    """(I - M)^{-1}. This and all below are None where nothing is erased."""
    asked: Float[Tensor, "chunk head place place"] | None = None
    """P, what queries read of y (of u in the tied form: R)."""
    carrier: Float[Tensor, "chunk head place d_k"] | None = None
    """a_j exp(c_C - c_j), the key's in the tied form."""
    solved_prober: Float[Tensor, "chunk head place d_k"] | None = None
    """solver @ prober: w."""
    solved_given: Float[Tensor, "chunk head place d_v"] | None = None
    """solver @ given, where given = sum_m N_m F_m, or F in the tied form."""
    probed: Float[Tensor, "chunk head term place place"] | None = None
    """N_m, what probes find of the chunk's writes; None in the tied form."""
    prober: Float[Tensor, "chunk head place d_k"] | None = None
    """b_t exp(c_{t-1}), times the strength in the tied form; only with keep_prober."""


@triton.jit
@no_type_check
def scalar_grams_kernel(
    log_decay, write_key, query, erase, probe, erase_strength,
    chunks, solver, asked, probed, queried,
    heads, d_k: tl.constexpr,
    TERMS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The [C, C] matrices of a chunk where a head decays as one: M (in solver), asked, per write term probed and queried."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    row, start, count = chunk_place(chunks, chunk)
    decay, step = first_row(log_decay, row, start, head), log_decay[2]
    asks = first_row(query, row, start, head)
    square = scratch_block(0, chunk, head, heads, C * C)
    squares = scratch_block(0, chunk, head, heads, TERMS * C * C)
    if erase is not None:
        probes, erases = first_row(probe, row, start, head), first_row(erase, row, start, head)
        matrix = gram(probes, probe[2], erases, erase[2], decay, step, count, True, d_k, C, BK, FAST)
        store_square(solver + square, matrix, C)
        matrix = gram(asks, query[2], erases, erase[2], decay, step, count, False, d_k, C, BK, FAST)
        store_square(asked + square, matrix, C)
    for term in range(TERMS):
        key = first_row(write_key, row, start, head) + term * write_key[4]
        on_query = gram(asks, query[2], key, write_key[2], decay, step, count, False, d_k, C, BK, FAST)
        if erase_strength is not None:  # the key is the probe too, and strength times it the erase
            store_square(asked + square, on_query, C)
            matrix = gram(key, write_key[2], key, write_key[2], decay, step, count, True, d_k, C, BK, FAST)
            here = first_row(erase_strength, row, start, head)
            strength = load_tile(here, erase_strength[2], tl.arange(0, C), count, tl.arange(0, 1), 1)
            store_square(solver + square, strength * matrix, C)
        else:
            store_square(queried + squares + term * C * C, on_query, C)
            if erase is not None:
                matrix = gram(probes, probe[2], key, write_key[2], decay, step, count, True, d_k, C, BK, FAST)
                store_square(probed + squares + term * C * C, matrix, C)


@triton.jit
@no_type_check
def channel_grams_kernel(
    log_decay, write_key, query, erase, probe, erase_strength,
    chunks, solver, asked, probed, queried,
    heads, d_k: tl.constexpr,
    TERMS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The same matrices where every key channel decays at its own rate."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    row, start, count = chunk_place(chunks, chunk)
    decay = first_row(log_decay, row, start, head)
    asks = first_row(query, row, start, head)
    square = scratch_block(0, chunk, head, heads, C * C)
    squares = scratch_block(0, chunk, head, heads, TERMS * C * C)
    probes, probe_stride = asks, query[2]  # where nothing is erased its place is filled, and what it gives not used
    if erase_strength is not None:
        probes, probe_stride = first_row(write_key, row, start, head), write_key[2]
    if erase is not None:
        probes, probe_stride = first_row(probe, row, start, head), probe[2]
    for term in range(TERMS):
        key = first_row(write_key, row, start, head) + term * write_key[4]
        on_probe, on_query = grams_per_channel(
            probes, probe_stride, asks, query[2], key, write_key[2], decay, log_decay[2], count, d_k, C, BK
        )
        if erase_strength is not None:
            places = tl.arange(0, C)
            strength = first_row(erase_strength, row, start, head)
            strength = load_tile(strength, erase_strength[2], places, count, tl.arange(0, 1), 1)
            store_square(solver + square, strength * on_probe, C)
            store_square(asked + square, on_query, C)
        else:
            if erase is not None:
                store_square(probed + squares + term * C * C, on_probe, C)
            store_square(queried + squares + term * C * C, on_query, C)
    if erase is not None:
        erases = first_row(erase, row, start, head)
        on_probe, on_query = grams_per_channel(
            probes, probe_stride, asks, query[2], erases, erase[2], decay, log_decay[2], count, d_k, C, BK
        )
        store_square(solver + square, on_probe, C)
        store_square(asked + square, on_query, C)


@triton.jit
@no_type_check
def solver_kernel(solver, heads, C: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    """(I - M)^{-1} in the place of M, in one block or in two on the diagonal and what couples them."""
    here = scratch_block(solver, tl.program_id(0), tl.program_id(1), heads, C * C)
    places = tl.arange(0, BLOCK)
    here += places[:, None] * C + places[None, :]
    early = inverse(tl.load(here), EXACT)
    tl.store(here, early)
    if BLOCK < C:
        late = inverse(tl.load(here + BLOCK * (C + 1)), EXACT)
        tl.store(here + BLOCK * (C + 1), late)
        coupled = tl.dot(late, tl.load(here + BLOCK * C), input_precision=EXACT)
        tl.store(here + BLOCK * C, tl.dot(coupled, early, input_precision=EXACT))


@triton.jit
@no_type_check
def key_rows_kernel(
    log_decay, write_key, query, erase, probe, erase_strength,
    chunks, solver, whole, reader, carrier, injector, prober, solved_prober,
    heads, d_k: tl.constexpr,
    PER_CHANNEL: tl.constexpr, TERMS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """What meets the state on the key side, for a block of key channels. Rows of places without a position are zero."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    row, start, count = chunk_place(chunks, chunk)
    places = tl.arange(0, C)
    columns = tl.program_id(2) * BK + tl.arange(0, BK)
    rows = scratch_block(0, chunk, head, heads, C * d_k)
    decay = first_row(log_decay, row, start, head)
    # A head that decays as one has a single column, which broadcasts over the key channels.
    if PER_CHANNEL:
        channels, n_channels = columns, d_k
    else:
        channels, n_channels = tl.arange(0, 1), 1
    total = over_chunk(decay, log_decay[2], places, count, channels, n_channels)
    tl.store(whole + scratch_block(0, chunk, head, heads, n_channels) + channels, total, mask=channels < n_channels)

    inclusive = since_start(decay, log_decay[2], places, count, channels, n_channels, False)
    asks = load_tile(first_row(query, row, start, head), query[2], places, count, columns, d_k)
    store_tile(reader + rows, d_k, places, C, columns, d_k, inclusive * asks)
    onward = until_end(decay, log_decay[2], places, count, channels, n_channels)
    if erase_strength is None:
        for term in range(TERMS):
            here = first_row(write_key, row, start, head) + term * write_key[4]
            key = load_tile(here, write_key[2], places, count, columns, d_k)
            here = injector + scratch_block(0, chunk, head, heads, TERMS * C * d_k) + term * C * d_k
            store_tile(here, d_k, places, C, columns, d_k, onward * key)
    if solver is not None:
        exclusive = since_start(decay, log_decay[2], places, count, channels, n_channels, True)
        if erase_strength is not None:
            key = load_tile(first_row(write_key, row, start, head), write_key[2], places, count, columns, d_k)
            here = first_row(erase_strength, row, start, head)
            strength = load_tile(here, erase_strength[2], places, count, tl.arange(0, 1), 1)
            carried, probes = onward * key, strength * exclusive * key
        else:
            erases = load_tile(first_row(erase, row, start, head), erase[2], places, count, columns, d_k)
            probes = load_tile(first_row(probe, row, start, head), probe[2], places, count, columns, d_k)
            carried, probes = onward * erases, exclusive * probes
        store_tile(carrier + rows, d_k, places, C, columns, d_k, carried)
        if prober is not None:
            store_tile(prober + rows, d_k, places, C, columns, d_k, probes)
        square = load_square(scratch_block(solver, chunk, head, heads, C * C), C)
        solved = tl.dot(square, probes, input_precision=FAST)
        store_tile(solved_prober + rows, d_k, places, C, columns, d_k, solved)


@triton.jit
@no_type_check
def value_rows_kernel(
    write_value, chunks, solver, probed, solved_given, heads, d_v: tl.constexpr,
    TERMS: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """solver @ given, for a block of value channels; given is F where the erase is tied, else sum_m N_m F_m."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    row, start, count = chunk_place(chunks, chunk)
    places = tl.arange(0, C)
    columns = tl.program_id(2) * BV + tl.arange(0, BV)
    values = first_row(write_value, row, start, head)
    if probed is None:
        given = load_tile(values, write_value[2], places, count, columns, d_v)
    else:
        given = tl.zeros([C, BV], tl.float32)
        squares = scratch_block(probed, chunk, head, heads, TERMS * C * C)
        for term in range(TERMS):
            value = load_tile(values + term * write_value[4], write_value[2], places, count, columns, d_v)
            given = tl.dot(load_square(squares + term * C * C, C), value, given, input_precision=FAST)
    square = load_square(scratch_block(solver, chunk, head, heads, C * C), C)
    solved = tl.dot(square, given, input_precision=FAST)
    here = scratch_block(solved_given, chunk, head, heads, C * d_v)
    store_tile(here, d_v, places, C, columns, d_v, solved)


def prepare(factors: Factors, sequences: Sequences, *, keep_prober: bool = False) -> Prepared:
    """What every chunk does to its incoming state; `prober` is kept for the adjoint only."""
    prepared = empty_prepared(factors, sequences, keep_prober=keep_prober)
    chunks, heads, d_k, d_v = len(sequences.chunks), factors.query.shape[2], factors.d_k, factors.d_v
    size, precision = sequences.size, Precision.of(factors.query.dtype)
    key_block, value_block = block_of(d_k, precision.block), block_of(d_v, precision.block)
    shared = {"chunks": sequences.chunks, "solver": prepared.solver, "heads": heads}
    shared |= {"TERMS": terms_in(factors), "C": size}
    roles = {"write_key": terms_of(factors.write_key)} | {
        name: rows_of(getattr(factors, name)) for name in ("log_decay", "query", "erase", "probe", "erase_strength")
    }

    def outputs(*names: str) -> dict[str, Tensor | None]:
        return {name: getattr(prepared, name) for name in names}

    grams = {**shared, **roles, **outputs("asked", "probed", "queried")}
    grams |= {"d_k": d_k}
    if factors.vector_decay:
        Launch(channel_grams_kernel, (chunks, heads), {**grams, "BK": block_of(d_k, 64)}).run()
    else:
        grams |= {"BK": block_of(d_k, precision.block // 2), "FAST": precision.fast}
        Launch(scalar_grams_kernel, (chunks, heads), grams).run()
    if factors.erases:
        solver = {
            "solver": prepared.solver,
            "heads": heads,
            "C": size,
            "BLOCK": min(size, 32),
            "EXACT": precision.exact,
        }
        Launch(solver_kernel, (chunks, heads), solver).run()
    key_rows = {**shared, **roles, **outputs("whole", "reader", "carrier", "injector", "prober", "solved_prober")}
    key_rows |= {"d_k": d_k, "BK": key_block, "FAST": precision.fast, "PER_CHANNEL": factors.vector_decay}
    Launch(key_rows_kernel, (chunks, heads, triton.cdiv(d_k, key_block)), key_rows).run()
    if factors.erases:
        value_rows = {**shared, **outputs("probed", "solved_given"), "write_value": terms_of(factors.write_value)}
        value_rows |= {"d_v": d_v, "BV": value_block, "FAST": precision.fast}
        Launch(value_rows_kernel, (chunks, heads, triton.cdiv(d_v, value_block)), value_rows).run()
    return prepared


def empty_prepared(factors: Factors, sequences: Sequences, *, keep_prober: bool = False) -> Prepared:
    """The scratch that `prepare` fills."""
    chunks, heads, size = len(sequences.chunks), factors.query.shape[2], sequences.size
    d_k, d_v, like = factors.d_k, factors.d_v, factors.query
    terms, tied = terms_in(factors), factors.erase_strength is not None

    def rows(width: int, *term: int) -> Tensor:
        return scratch(chunks, heads, *term, size, width, like=like)

    prepared = {"whole": scratch(chunks, heads, d_k if factors.vector_decay else 1, like=like), "reader": rows(d_k)}
    if not tied:
        prepared |= {"injector": rows(d_k, terms), "queried": rows(size, terms)}
    if factors.erases:
        prepared |= {"solver": rows(size), "asked": rows(size), "carrier": rows(d_k)}
        prepared |= {"solved_prober": rows(d_k), "solved_given": rows(d_v)}
        if keep_prober:
            prepared["prober"] = rows(d_k)
        if not tied:
            prepared["probed"] = rows(size, terms)
    return Prepared(**prepared)


def terms_in(factors: Factors) -> int:
    """Writes at a position."""
    return factors.write_key.shape[3] if factors.write_key.ndim == 5 else 1
