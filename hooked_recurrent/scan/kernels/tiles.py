"""What the chunk kernels share, compiled into each: where rows stand, decays between positions, and the triangular inverse.

`rows` is a tensor of [batch, pos, head, ...] with its strides: (pointer, batch row, position, head). A chunk has `count`
positions from `start` on in batch row `row`; a tile has one row for each of the chunk's C places, zero where there is no
position, and a log decay of zero changes nothing. Everything is float32 from here on.

Decays are summed over the positions that they cover, never taken as the difference of two sums: one strong decay does not round
away the weak ones after it, and no exponent is ever positive.

`no_type_check` keeps the tests' checks of annotations out of kernels, which are read as source and never run as Python.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def chunk_place(chunks, chunk):
    """Batch row, first position and number of positions of a chunk."""
    return tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1), tl.load(chunks + 3 * chunk + 2)


@triton.jit
@no_type_check
def first_row(rows, row, start, head):
    """Where the row of a position begins. Offsets from the beginning of a tensor may need 64 bits, those in a chunk do not."""
    return rows[0] + row.to(tl.int64) * rows[1] + start.to(tl.int64) * rows[2] + head * rows[3]


@triton.jit
@no_type_check
def scratch_block(pointer, chunk, head, heads, size):
    """Where the block of a chunk and head begins in scratch [chunk, head, ...] with `size` numbers per block."""
    return pointer + (chunk.to(tl.int64) * heads + head) * size


@triton.jit
@no_type_check
def load_tile(first, stride, places, count, columns, width):
    """Rows from `first` on; zero outside of the places 0 .. count - 1 and of the width."""
    inside = (places >= 0) & (places < count)
    mask = inside[:, None] & (columns < width)[None, :]
    return tl.load(first + places[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def store_tile(first, stride, places, count, columns, width, tile):
    """Store the places 0 .. count - 1 of a tile, as wide as `width`."""
    mask = (places < count)[:, None] & (columns < width)[None, :]
    tl.store(first + places[:, None] * stride + columns[None, :], tile, mask=mask)


@triton.jit
@no_type_check
def load_square(first, C: tl.constexpr):
    """A [C, C] matrix of scratch."""
    places = tl.arange(0, C)
    return tl.load(first + places[:, None] * C + places[None, :])


@triton.jit
@no_type_check
def store_square(first, matrix, C: tl.constexpr):
    """Write a [C, C] matrix of scratch."""
    places = tl.arange(0, C)
    tl.store(first + places[:, None] * C + places[None, :], matrix)


@triton.jit
@no_type_check
def since_start(first, stride, places, count, columns, width, exclusive: tl.constexpr):
    """The decay from the chunk's start to t; to t - 1 with `exclusive`."""
    shift: tl.constexpr = 1 if exclusive else 0
    return tl.exp(tl.cumsum(load_tile(first, stride, places - shift, count, columns, width), axis=0))


@triton.jit
@no_type_check
def until_end(first, stride, places, count, columns, width):
    """The decay from t to the chunk's end (or to any count of positions, for t before it)."""
    later = load_tile(first, stride, places + 1, count, columns, width)
    return tl.exp(tl.cumsum(later, axis=0, reverse=True))


@triton.jit
@no_type_check
def over_chunk(first, stride, places, count, columns, width):
    """The decay over the first `count` positions, per column."""
    return tl.exp(tl.sum(load_tile(first, stride, places, count, columns, width), axis=0))


@triton.jit
@no_type_check
def decays_between(first, stride, places, count, exclusive: tl.constexpr):
    """Scalar decay: exp(c_t - c_j) where j <= t; with `exclusive` exp(c_{t-1} - c_j) where j < t. Zero elsewhere."""
    shift: tl.constexpr = 1 if exclusive else 0
    log_decay = load_tile(first, stride, places - shift, count, tl.arange(0, 1), 1)
    t, j = places[:, None], places[None, :] + shift
    covered = tl.cumsum(tl.where(t > j, log_decay, 0.0), axis=0)
    return tl.where(t >= j, tl.exp(covered), 0.0)


@triton.jit
@no_type_check
def gram(
    left, left_stride, right, right_stride, decay, decay_stride, count, exclusive: tl.constexpr,
    d_k, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scalar decay: left_t . right_j of every two places of a chunk, times the decay between them."""
    places = tl.arange(0, C)
    product = tl.zeros([C, C], tl.float32)
    for begin in range(0, d_k, BK):
        columns = begin + tl.arange(0, BK)
        left_tile = load_tile(left, left_stride, places, count, columns, d_k)
        right_tile = load_tile(right, right_stride, places, count, columns, d_k)
        product = tl.dot(left_tile, tl.trans(right_tile), product, input_precision=PRECISION)
    return product * decays_between(decay, decay_stride, places, count, exclusive)


@triton.jit
@no_type_check
def grams_per_channel(
    left, left_stride, asks, asks_stride, right, right_stride, decay, decay_stride, count,
    d_k, C: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Vector decay: left_t . exp(c_{t-1} - c_j) right_j where j < t, and asks_t . exp(c_t - c_j) right_j where j <= t.

    Column by column from the last: towards an earlier j every decay that is covered gains a factor, exp(log_decay_{j+1}).
    """
    places = tl.arange(0, C)
    this = places[:, None]
    on_left, on_asks = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for begin in range(0, d_k, BK):
        columns = begin + tl.arange(0, BK)
        left_tile = load_tile(left, left_stride, places, count, columns, d_k)
        asks_tile = load_tile(asks, asks_stride, places, count, columns, d_k)
        decay_tile = tl.exp(load_tile(decay, decay_stride, places, count, columns, d_k))
        covered = tl.zeros([C, BK], tl.float32)  # exp(c_{t-1} - c_j) below the diagonal, zero elsewhere
        for back in range(0, C):
            j = C - 1 - back
            next_row = load_tile(decay, decay_stride, j + 1 + tl.arange(0, 1), count, columns, d_k)
            covered = tl.where(this == j + 1, 1.0, covered * tl.exp(next_row))
            right_row = load_tile(right, right_stride, j + tl.arange(0, 1), count, columns, d_k)
            found = tl.sum(left_tile * covered * right_row, axis=1)
            on_left += tl.where(places[None, :] == j, found[:, None], 0.0)
            inclusive = tl.where(this == j, 1.0, covered * decay_tile)
            found = tl.sum(asks_tile * inclusive * right_row, axis=1)
            on_asks += tl.where(places[None, :] == j, found[:, None], 0.0)
    return on_left, on_asks


@triton.jit
@no_type_check
def inverse(strictly_lower, PRECISION: tl.constexpr):
    """(I - strictly_lower)^{-1} by forward substitution with blocks of 1, 2, 4, ... positions.

    With the inverse known on blocks of w, two neighbours make one on 2w: below the diagonal stands the later block's inverse
    times what couples the two, times the earlier block's. Powers of the matrix, which explode where keys repeat, never occur.
    """
    C: tl.constexpr = strictly_lower.shape[0]
    # Two places lie in one block of 2w and in different blocks of w exactly when w <= their exclusive or < 2w.
    apart = tl.arange(0, C)[:, None] ^ tl.arange(0, C)[None, :]
    # With blocks of one position both inverses are 1.
    solver = tl.where(apart == 0, 1.0, tl.where(apart == 1, strictly_lower, 0.0))
    width = 2
    while width < C:
        couples = tl.where((apart >= width) & (apart < 2 * width), strictly_lower, 0.0)
        step = tl.dot(solver, couples, input_precision=PRECISION)
        solver = tl.dot(step, solver, solver, input_precision=PRECISION)
        width *= 2
    return solver
