"""The scan as kernels: `prepare` (prepare.py) every chunk at once, `carry` the state through them, `read` all chunks at once.

    carry       y = solved_given + solved_prober S,   S' = whole S + carrier^T y + sum_m injector_m^T F_m,   chunk by chunk
    read        o = reader S + asked y + sum_m queried_m F_m
    snapshot    the state after any number of positions, from its chunk's incoming state and y

y and every chunk's incoming S are kept. In the tied form u stands for y, and there are no sums over m.
"""

from collections.abc import Iterator, Sequence
from typing import no_type_check

import torch
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
    chunk_size,
    recorded,
    rows_of,
    scratch,
    states_of,
    terms_of,
)
from hooked_recurrent.scan.kernels.prepare import Prepared, prepare, terms_in
from hooked_recurrent.scan.kernels.tiles import (
    chunk_place,
    first_row,
    load_square,
    load_tile,
    over_chunk,
    scratch_block,
    store_tile,
    until_end,
)
from hooked_recurrent.scan.kernels.variants import Case, Variant, register, variants_of


@triton.jit
@no_type_check
def carry_kernel(
    whole, solved_prober, solved_given, carrier, injector, value, initial,
    chunks, first_chunk, y, states, final,
    heads, d_k: tl.constexpr, d_v: tl.constexpr,
    PER_CHANNEL: tl.constexpr, TERMS: tl.constexpr, REVERSE: tl.constexpr,
    C: tl.constexpr, BLOCKS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Some columns of a state through the chunks of one sequence and head, from the last to the first with REVERSE.

    The state is a tuple of BLOCKS tiles of BK key channels, so that no product needs all of it at once.
    """
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    state = ()
    for block in tl.static_range(BLOCKS):
        tile = tl.zeros([BK, BV], tl.float32)
        if initial is not None:
            channels = block * BK + tl.arange(0, BK)
            tile = load_tile(first_row(initial, sequence, sequence * 0, head), initial[2], channels, d_k, columns, d_v)
        state = state + (tile,)
    begin, end = tl.load(first_chunk + sequence), tl.load(first_chunk + sequence + 1)
    # Addresses that no step changes would fill the registers: they are computed anew.
    for step in tl.range(begin, end, disable_licm=True):
        if REVERSE:
            chunk = begin + end - 1 - step
        else:
            chunk = step
        store_state(scratch_block(states, chunk, head, heads, d_k * d_v), state, columns, d_k, d_v, BK)
        found = tl.zeros([C, BV], tl.float32)
        if solved_prober is not None:
            found = ask(solved_prober, solved_given, y, state, chunk, head, heads, columns, d_k, d_v, C, BK, FAST)
        after = ()
        for block in tl.static_range(BLOCKS):
            channels = block * BK + tl.arange(0, BK)
            if PER_CHANNEL:
                decay = scratch_block(whole, chunk, head, heads, d_k) + channels
                tile = tl.load(decay, mask=channels < d_k, other=0.0)[:, None] * state[block]
            else:
                tile = tl.load(scratch_block(whole, chunk, head, heads, 1)) * state[block]
            if carrier is not None:
                here = scratch_block(carrier, chunk, head, heads, C * d_k)
                rows = load_tile(here, d_k, tl.arange(0, C), C, channels, d_k)
                tile = tl.dot(tl.trans(rows), found, tile, input_precision=FAST)
            if injector is not None:
                tile = injected(
                    tile, injector, value, chunks, chunk, head, heads, channels, columns, d_k, d_v, TERMS, C, FAST
                )
            after = after + (tile,)
        state = after
    if final is not None:
        store_state(scratch_block(final, sequence, head, heads, d_k * d_v), state, columns, d_k, d_v, BK)


@triton.jit
@no_type_check
def store_state(first, state, columns, d_k: tl.constexpr, d_v: tl.constexpr, BK: tl.constexpr):
    """Write the tiles of a state."""
    for block in tl.static_range(len(state)):
        store_tile(first, d_v, block * BK + tl.arange(0, BK), d_k, columns, d_v, state[block])


@triton.jit
@no_type_check
def ask(
    solved_prober, solved_given, y, state, chunk, head, heads, columns,
    d_k: tl.constexpr, d_v: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """y = solved_given + solved_prober S, kept and returned."""
    places = tl.arange(0, C)
    rows = scratch_block(0, chunk, head, heads, C * d_v)
    found = load_tile(solved_given + rows, d_v, places, C, columns, d_v)
    asks = scratch_block(solved_prober, chunk, head, heads, C * d_k)
    for block in tl.static_range(len(state)):
        tile = load_tile(asks, d_k, places, C, block * BK + tl.arange(0, BK), d_k)
        found = tl.dot(tile, state[block], found, input_precision=FAST)
    store_tile(y + rows, d_v, places, C, columns, d_v, found)
    return found


@triton.jit
@no_type_check
def injected(
    tile, injector, value, chunks, chunk, head, heads, channels, columns,
    d_k: tl.constexpr, d_v: tl.constexpr, TERMS: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """A tile of the state with the writes of a chunk added: + sum_m injector_m^T F_m."""
    row, start, count = chunk_place(chunks, chunk)
    places = tl.arange(0, C)
    for term in range(TERMS):
        here = scratch_block(injector, chunk, head, heads, TERMS * C * d_k) + term * C * d_k
        rows = load_tile(here, d_k, places, C, channels, d_k)
        here = first_row(value, row, start, head) + term * value[4]
        values = load_tile(here, value[2], places, count, columns, d_v)
        tile = tl.dot(tl.trans(rows), values, tile, input_precision=FAST)
    return tile


@triton.jit
@no_type_check
def read_kernel(
    reader, states, asked, y, queried, write_value, chunks, read,
    heads, d_k: tl.constexpr, d_v: tl.constexpr,
    TERMS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """What the queries of a chunk read of the incoming state, of y and of the chunk's own writes."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    row, start, count = chunk_place(chunks, chunk)
    places = tl.arange(0, C)
    columns = tl.program_id(2) * BV + tl.arange(0, BV)
    out = tl.zeros([C, BV], tl.float32)
    rows, before = (
        scratch_block(reader, chunk, head, heads, C * d_k),
        scratch_block(states, chunk, head, heads, d_k * d_v),
    )
    for begin in range(0, d_k, BK):
        channels = begin + tl.arange(0, BK)
        asks = load_tile(rows, d_k, places, C, channels, d_k)
        state = load_tile(before + begin * d_v, d_v, tl.arange(0, BK), d_k - begin, columns, d_v)
        out = tl.dot(asks, state, out, input_precision=FAST)
    if asked is not None:
        square = load_square(scratch_block(asked, chunk, head, heads, C * C), C)
        found = load_tile(scratch_block(y, chunk, head, heads, C * d_v), d_v, places, C, columns, d_v)
        out = tl.dot(square, found, out, input_precision=FAST)
    if queried is not None:
        squares = scratch_block(queried, chunk, head, heads, TERMS * C * C)
        for term in range(TERMS):
            here = first_row(write_value, row, start, head) + term * write_value[4]
            value = load_tile(here, write_value[2], places, count, columns, d_v)
            out = tl.dot(load_square(squares + term * C * C, C), value, out, input_precision=FAST)
    store_tile(first_row(read, row, start, head), read[2], places, count, columns, d_v, out)


@triton.jit
@no_type_check
def snapshot_kernel(
    positions, log_decay, write_key, write_value, erase, chunks, first_chunk, y, states, out,
    heads, d_k: tl.constexpr, d_v: tl.constexpr,
    PER_CHANNEL: tl.constexpr, TERMS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """A tile of the state after some count of positions: what its chunk met and added, as if the chunk ended there."""
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    position = tl.load(positions + tl.program_id(1))
    across: tl.constexpr = (d_v + BV - 1) // BV
    channels = tl.program_id(2) // across * BK + tl.arange(0, BK)
    columns = tl.program_id(2) % across * BV + tl.arange(0, BV)
    begin, end = tl.load(first_chunk + sequence), tl.load(first_chunk + sequence + 1)
    chunk = tl.minimum(begin + position // C, end - 1)
    row, start, _ = chunk_place(chunks, chunk)
    places, count = tl.arange(0, C), position - (chunk - begin) * C
    decay = first_row(log_decay, row, start, head)
    tile = load_tile(scratch_block(states, chunk, head, heads, d_k * d_v), d_v, channels, d_k, columns, d_v)
    if PER_CHANNEL:
        tile *= over_chunk(decay, log_decay[2], places, count, channels, d_k)[:, None]
        onward = until_end(decay, log_decay[2], places, count, channels, d_k)
    else:
        tile *= over_chunk(decay, log_decay[2], places, count, tl.arange(0, 1), 1)[:, None]
        onward = until_end(decay, log_decay[2], places, count, tl.arange(0, 1), 1)
    if y is not None:
        erased = erase if erase is not None else write_key
        rows = onward * load_tile(first_row(erased, row, start, head), erased[2], places, count, channels, d_k)
        found = load_tile(scratch_block(y, chunk, head, heads, C * d_v), d_v, places, count, columns, d_v)
        tile = tl.dot(tl.trans(rows), found, tile, input_precision=FAST)
    if y is None or erase is not None:
        for term in range(TERMS):
            here = first_row(write_key, row, start, head) + term * write_key[4]
            rows = onward * load_tile(here, write_key[2], places, count, channels, d_k)
            here = first_row(write_value, row, start, head) + term * write_value[4]
            values = load_tile(here, write_value[2], places, count, columns, d_v)
            tile = tl.dot(tl.trans(rows), values, tile, input_precision=FAST)
    sequences = tl.num_programs(0) // heads
    here = scratch_block(out, tl.program_id(1) * sequences + sequence, head, heads, d_k * d_v)
    store_tile(here, d_v, channels, d_k, columns, d_v, tile)


def scan_chunks(
    factors: Factors,
    sequences: Sequences,
    initial_state: Float[Tensor, "sequences_or_1 head d_k d_v"] | None = None,
    *,
    snapshots: Sequence[int] = (),
    want_state: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The whole forward scan.

    Returns what is read [batch, pos, head, d_v], the final states [sequence, head, d_k, d_v] if wanted, and the snapshots
    [snapshot, sequence, head, d_k, d_v] if there are any.
    """
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
    kept = snapshots_at(snapshots, y, states, factors, sequences) if snapshots else None
    return read(prepared, y, states, factors, sequences), final, kept


def carry(
    sequences: Sequences,
    *,
    whole: Tensor,
    solved_prober: Float[Tensor, "chunk head place d_k"] | None,
    solved_given: Float[Tensor, "chunk head place d_v"] | None,
    carrier: Float[Tensor, "chunk head place d_k"] | None,
    injector: Float[Tensor, "chunk head term place d_k"] | None,
    value: Float[Tensor, "batch pos head *term d_v"],
    initial_state: Float[Tensor, "sequences_or_1 head d_k d_v"] | None,
    d_k: int,
    precision: Precision,
    want_final: bool = True,
    reverse: bool = False,
) -> tuple[Tensor | None, Float[Tensor, "chunk head d_k d_v"], Float[Tensor, "sequences head d_k d_v"] | None]:
    """Run a chunk map through every sequence, from its last chunk to its first with `reverse`.

    Returns y [chunk, head, C, d_v] (None without solved_prober), the state that every chunk met, and the one after all of them.
    """
    chunks, heads, d_v = len(sequences.chunks), value.shape[2], value.shape[-1]
    y = None if solved_given is None else scratch(*solved_given.shape, like=value)
    states = scratch(chunks, heads, d_k, d_v, like=value)
    final = scratch(sequences.count, heads, d_k, d_v, like=value) if want_final else None
    # More columns read the key side less often; how many there is room for depends on what else is in registers.
    wide = d_k <= 128 and precision.block == 64 and (carrier is None or injector is None)
    block = block_of(d_v, 32 if d_k <= 64 or wide else 16)
    warps = 8 if d_k > 64 and block == 32 else 4
    arguments = {
        "whole": whole,
        "solved_prober": solved_prober,
        "solved_given": solved_given,
        "carrier": carrier,
        "injector": injector,
        "value": terms_of(value),
        "initial": states_of(initial_state),
        "chunks": sequences.chunks,
        "first_chunk": sequences.first_chunk,
        "y": y,
        "states": states,
        "final": final,
        "heads": heads,
        "d_k": d_k,
        "d_v": d_v,
        "PER_CHANNEL": whole.shape[-1] > 1,
        "TERMS": 1 if injector is None else injector.shape[2],
        "REVERSE": reverse,
        "C": sequences.size,
        "BLOCKS": triton.cdiv(d_k, block_of(d_k, 64)),
        "BK": block_of(d_k, 64),
        "BV": block,
        "FAST": precision.fast,
    }
    Launch(carry_kernel, (sequences.count * heads, triton.cdiv(d_v, block)), arguments, warps).run()
    return y, states, final


def read(
    prepared: Prepared,
    y: Float[Tensor, "chunk head place d_v"] | None,
    states: Float[Tensor, "chunk head d_k d_v"],
    factors: Factors,
    sequences: Sequences,
) -> Float[Tensor, "batch pos head d_v"]:
    """What every query reads."""
    batch, length, heads = factors.query.shape[:3]
    out = scratch(batch, length, heads, factors.d_v, like=factors.query)
    precision = Precision.of(factors.query.dtype)
    block = block_of(factors.d_v, precision.block)
    arguments = {
        "reader": prepared.reader,
        "states": states,
        "asked": prepared.asked,
        "y": y,
        "queried": prepared.queried,
        "write_value": terms_of(factors.write_value),
        "chunks": sequences.chunks,
        "read": rows_of(out),
        "heads": heads,
        "d_k": factors.d_k,
        "d_v": factors.d_v,
        "TERMS": 1 if prepared.queried is None else prepared.queried.shape[2],
        "C": sequences.size,
        "BK": block_of(factors.d_k, precision.block),
        "BV": block,
        "FAST": precision.fast,
    }
    grid = (len(sequences.chunks), heads, triton.cdiv(factors.d_v, block))
    Launch(read_kernel, grid, arguments).run()
    return out


def snapshots_at(
    positions: Sequence[int],
    y: Float[Tensor, "chunk head place d_v"] | None,
    states: Float[Tensor, "chunk head d_k d_v"],
    factors: Factors,
    sequences: Sequences,
) -> Float[Tensor, "snapshot sequences head d_k d_v"]:
    """The states after some counts of positions of every sequence, all of which are that long."""
    heads, d_k, d_v = factors.query.shape[2], factors.d_k, factors.d_v
    out = scratch(len(positions), sequences.count, heads, d_k, d_v, like=states)
    precision = Precision.of(factors.query.dtype)
    key_block, value_block = block_of(d_k, 32), block_of(d_v, precision.block // 2)
    arguments = {
        "positions": torch.tensor(positions, dtype=torch.int32, device=out.device),
        "log_decay": rows_of(factors.log_decay),
        "write_key": terms_of(factors.write_key),
        "write_value": terms_of(factors.write_value),
        "erase": rows_of(factors.erase),
        "chunks": sequences.chunks,
        "first_chunk": sequences.first_chunk,
        "y": y,
        "states": states,
        "out": out,
        "heads": heads,
        "d_k": d_k,
        "d_v": d_v,
        "PER_CHANNEL": factors.vector_decay,
        "TERMS": terms_in(factors),
        "C": sequences.size,
        "BK": key_block,
        "BV": value_block,
        "FAST": precision.fast,
    }
    blocks = triton.cdiv(d_k, key_block) * triton.cdiv(d_v, value_block)
    Launch(snapshot_kernel, (sequences.count * heads, len(positions), blocks), arguments).run()
    return out


@register
def variants(case: Case) -> Iterator[Variant]:
    """All kernels of a forward scan with an initial state and snapshots."""
    factors = case.factors()
    initial_state = factors.zero_state()
    with recorded(case.backend) as launches:
        sequences = Sequences.of_batch(len(initial_state), factors.length, chunk_size(factors), factors.query.device)
        scan_chunks(factors, sequences, initial_state, snapshots=(1,))
    for launch in launches:
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        yield from variants_of("forward scan", launch.kernel, launch.arguments, case, **options)
