"""Gradients of keys and decays, chunk by chunk: of what reads the state (query, probe) and of what is written (erase, keys).

Given are, per chunk, the state S before it and the adjoint P of the state after it, and per position the gradient g of the
read, the answer y to the probe and its gradient x. With decay D(t<-j) between positions and the weights

    g_t . value_j  (j <= t) for a query                x_t . value_j  (j < t) for a probe, which D(t-1<-j) reaches

where value_j is y_j for an erase and the write value for a write key, the gradients are

    reader   D(t<-0) S g_t  +  sum_j weights[t, j] D(t<-j) source_j             (S x_t for a probe)
    source   D(C<-t) P value_t  +  sum_i weights[i, t] D(i<-t) reader_i         (i runs over queries and probes)

Weights of a scalar decay come with it, and the sums are products; with a vector decay they come without, and the sums go
position by position.

The gradient of log d_t sums over every path that decays at t: from the state before the chunk or a source j < t, to a query
i >= t, a probe i > t or the state after the chunk. No path is counted outside of its own t, to be taken off again: under
strong decay the difference would be noise. `reader_gradient_kernel` counts the paths to its readers and (with `adjoints`)
those from state to state, `source_gradient_kernel` those from its sources to the state after. Each launch, and with a
scalar decay each block of key channels, writes a part of its own; the sum over parts is the gradient.

A tied rule's probe is strength * write_key and its answers u = strength * y + value stand for y, with its one write key as
the source.
"""

from typing import no_type_check

import triton
import triton.language as tl

from hooked_recurrent.scan.kernels.tiles import (
    chunk_place,
    first_row,
    load_square,
    load_tile,
    over_chunk,
    scratch_block,
    since_start,
    store_tile,
    until_end,
)

FAINTEST = tl.constexpr(-100.0)
"""A log decay below this leaves nothing in float32; taken as this, it leaves the digits of its neighbours in their sum."""


@triton.jit
@no_type_check
def summed_decay(first, stride, places, count, columns, width):
    """c_t of a vector decay; with places - 1 for places, c_{t-1}."""
    return tl.cumsum(tl.maximum(load_tile(first, stride, places, count, columns, width), FAINTEST), axis=0)


@triton.jit
@no_type_check
def row_of(tile, places, index):
    """One row of a tile."""
    return tl.sum(tl.where((places == index)[:, None], tile, 0.0), axis=0)


@triton.jit
@no_type_check
def load_row(first, stride, index, columns, width):
    """One row of what stands from `first` on."""
    return tl.load(first + index * stride + columns, mask=columns < width, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def through_state(first, stride, matrix, places, count, columns, d_k, d_v, BV: tl.constexpr, FAST: tl.constexpr):
    """A [d_k, d_v] matrix times each of the rows from `first` on, for the key channels `columns`."""
    total = tl.zeros([places.shape[0], columns.shape[0]], tl.float32)
    for begin in range(0, d_v, BV):
        over = begin + tl.arange(0, BV)
        rows = load_tile(first, stride, places, count, over, d_v)
        block = load_tile(matrix, d_v, columns, d_k, over, d_v)
        total = tl.dot(rows, tl.trans(block), total, input_precision=FAST)
    return total


@triton.jit
@no_type_check
def state_products(state, adjoint, columns, d_k, d_v, BV: tl.constexpr):
    """S * P summed over values, per key channel."""
    total = tl.zeros([columns.shape[0]], tl.float32)
    for begin in range(0, d_v, BV):
        over = begin + tl.arange(0, BV)
        block = load_tile(state, d_v, columns, d_k, over, d_v)
        total += tl.sum(block * load_tile(adjoint, d_v, columns, d_k, over, d_v), axis=1)
    return total


@triton.jit
@no_type_check
def sources_by_products(total, paths, reader, first, rows, weights, terms, count, columns, d_k, FAST: tl.constexpr):
    """Scalar decay: add sum_j weights[t, j] source_j to `total`, and weights[t, j] reader_t . source_j to `paths`."""
    C: tl.constexpr = total.shape[0]
    places = tl.arange(0, C)
    for term in range(terms):
        source = load_tile(first + term * rows[4], rows[2], places, count, columns, d_k)
        weight = load_square(weights + term * C * C, C)
        total = tl.dot(weight, source, total, input_precision=FAST)
        paths += weight * tl.dot(reader, tl.trans(source), input_precision=FAST)
    return total, paths


@triton.jit
@no_type_check
def decay_of_paths(paths, arriving, EXCLUSIVE: tl.constexpr, FAST: tl.constexpr):
    """Per t the sum over paths that decay there, from [i, j] that go from j to i, and those that arrive at i from the state."""
    C: tl.constexpr = paths.shape[0]
    i, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    from_before = tl.dot(paths, tl.where(i < t, 1.0, 0.0), input_precision=FAST) + arriving[:, None]
    return tl.sum(tl.where((i > t) if EXCLUSIVE else (i >= t), from_before, 0.0), axis=0)


@triton.jit
@no_type_check
def weighted_row(first, rows, weights, terms, index, places, columns, d_k):
    """weights[t, j] source_j for one j, summed over terms."""
    C: tl.constexpr = places.shape[0]
    total = tl.zeros([C, columns.shape[0]], tl.float32)
    for term in range(terms):
        weight = tl.load(weights + term * C * C + places * C + index)
        total += weight[:, None] * load_row(first + term * rows[4], rows[2], index, columns, d_k)[None, :]
    return total


@triton.jit
@no_type_check
def reader_gradient_kernel(
    chunks, log_decay, readers, strength, upstream, states, adjoints, erase, erase_weights, keys, key_weights,
    gradient, strength_parts, decay_parts, heads, d_k, d_v,
    STACKED: tl.constexpr, EXCLUSIVE: tl.constexpr, VECTOR: tl.constexpr, TERMS: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gradient of queries or probes, and of the decay on every path to one. Grid: chunk, head, block of key channels."""
    chunk, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, start, count = chunk_place(chunks, chunk)
    places, columns = tl.arange(0, C), block * BK + tl.arange(0, BK)
    decay, decay_columns = first_row(log_decay, row, start, head), columns if VECTOR else tl.arange(0, 1)
    decay_width = d_k if VECTOR else 1
    reader = load_tile(first_row(readers, row, start, head), readers[2], places, count, columns, d_k)
    owned = reader
    if strength is not None:
        strengths = load_tile(first_row(strength, row, start, head), strength[2], places, count, tl.arange(0, 1), 1)
        owned = strengths * reader
    # 1. through the state before the chunk
    up = first_row(upstream, chunk, start * 0, head) if STACKED else first_row(upstream, row, start, head)
    state = scratch_block(states, chunk, head, heads, d_k * d_v)
    total = through_state(up, upstream[2], state, places, count, columns, d_k, d_v, BV, FAST)
    total *= since_start(decay, log_decay[2], places, count, decay_columns, decay_width, EXCLUSIVE)
    passing = tl.zeros([BK], tl.float32)
    if adjoints is not None:
        adjoint = scratch_block(adjoints, chunk, head, heads, d_k * d_v)
        passing = state_products(state, adjoint, columns, d_k, d_v, BV)
        passing *= over_chunk(decay, log_decay[2], places, count, decay_columns, decay_width)
    # 2. from the sources of the chunk
    key, key_weight = first_row(keys, row, start, head), scratch_block(key_weights, chunk, head, heads, TERMS * C * C)
    if erase is not None:
        erasing = first_row(erase, row, start, head)
        erase_weight = scratch_block(erase_weights, chunk, head, heads, C * C)
    parts = first_row(decay_parts, row, start, head)
    if VECTOR:
        summed = summed_decay(decay, log_decay[2], places, count, columns, d_k)
        reached = summed_decay(decay, log_decay[2], places - 1, count, columns, d_k) if EXCLUSIVE else summed
        for j in range(count):
            later = ((places > j) if EXCLUSIVE else (places >= j))[:, None]
            path = passing + tl.sum(tl.where(later, owned * total, 0.0), axis=0)
            tl.store(parts + j * decay_parts[2] + columns, path, mask=columns < d_k)
            arriving = weighted_row(key, keys, key_weight, TERMS, j, places, columns, d_k)
            if erase is not None:
                arriving += weighted_row(erasing, erase, erase_weight, 1, j, places, columns, d_k)
            total += tl.exp(tl.where(later, reached - row_of(summed, places, j)[None, :], float("-inf"))) * arriving
    else:
        arriving, paths = tl.sum(owned * total, axis=1), tl.zeros([C, C], tl.float32)
        if erase is not None:
            total, paths = sources_by_products(
                total, paths, owned, erasing, erase, erase_weight, 1, count, columns, d_k, FAST
            )
        total, paths = sources_by_products(total, paths, owned, key, keys, key_weight, TERMS, count, columns, d_k, FAST)
        path = decay_of_paths(paths, arriving, EXCLUSIVE, FAST) + tl.sum(passing, axis=0)
        tl.store(parts + block * decay_parts[4] + places * decay_parts[2], path, mask=places < count)
    # 3. a tied probe is strength * key, and its part joins what the key has as a source
    here = first_row(gradient, row, start, head)
    if strength is not None:
        part = first_row(strength_parts, row, start, head) + block * strength_parts[4]
        tl.store(part + places * strength_parts[2], tl.sum(reader * total, axis=1), mask=places < count)
        total = strengths * total + load_tile(here, gradient[2], places, count, columns, d_k)
    store_tile(here, gradient[2], places, count, columns, d_k, total)


@triton.jit
@no_type_check
def to_readers(
    total, summed, first, stride, weights, scale, scale_stride, count, columns, d_k, EXCLUSIVE: tl.constexpr
):  # fmt: skip
    """Vector decay: add sum_i weights[i, t] D(i<-t) scale_i reader_i to `total`; with EXCLUSIVE over i > t, and D(i-1<-t)."""
    C: tl.constexpr = total.shape[0]
    places = tl.arange(0, C)
    for i in range(count):
        weight = tl.load(weights + i * C + places)
        if scale is not None:
            weight *= tl.load(scale + i * scale_stride).to(tl.float32)
        reached = row_of(summed, places, i - 1 if EXCLUSIVE else i)[None, :]
        earlier = ((places < i) if EXCLUSIVE else (places <= i))[:, None]
        fade = tl.exp(tl.where(earlier, reached - summed, float("-inf")))
        total += fade * (weight[:, None] * load_row(first, stride, i, columns, d_k)[None, :])
    return total


@triton.jit
@no_type_check
def source_gradient_kernel(
    chunks, log_decay, sources, values, adjoints, query, read_weights, probe, strength, answer_weights,
    gradient, decay_parts, heads, d_k, d_v,
    STACKED: tl.constexpr, VECTOR: tl.constexpr, TERMS: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gradient of erases or write keys, and of the decay from them to the state after. Grid: chunk, head, block and term."""
    chunk, head, block, term = tl.program_id(0), tl.program_id(1), tl.program_id(2) // TERMS, tl.program_id(2) % TERMS
    row, start, count = chunk_place(chunks, chunk)
    places, columns = tl.arange(0, C), block * BK + tl.arange(0, BK)
    decay, decay_columns = first_row(log_decay, row, start, head), columns if VECTOR else tl.arange(0, 1)
    decay_width = d_k if VECTOR else 1
    # 1. through the state after the chunk
    value = first_row(values, chunk, start * 0, head) if STACKED else first_row(values, row, start, head)
    adjoint = scratch_block(adjoints, chunk, head, heads, d_k * d_v)
    value += term * values[4]
    total = through_state(value, values[2], adjoint, places, count, columns, d_k, d_v, BV, FAST)
    total *= until_end(decay, log_decay[2], places, count, decay_columns, decay_width)
    source = first_row(sources, row, start, head) + term * sources[4]
    leaving = total * load_tile(source, sources[2], places, count, columns, d_k)
    before = tl.where(places[:, None] > places[None, :], 1.0, 0.0)
    parts = first_row(decay_parts, row, start, head)
    if VECTOR:
        parts += term * decay_parts[4]
        store_tile(parts, decay_parts[2], places, count, columns, d_k, tl.dot(before, leaving, input_precision=FAST))
    else:
        parts += tl.program_id(2) * decay_parts[4]
        path = tl.sum(before * tl.sum(leaving, axis=1)[None, :], axis=1)
        tl.store(parts + places * decay_parts[2], path, mask=places < count)
    # 2. to the queries and probes of the chunk
    weights = scratch_block(0, chunk, head, heads, TERMS * C * C) + term * C * C
    asking = first_row(query, row, start, head)
    if VECTOR:
        summed = summed_decay(decay, log_decay[2], places, count, columns, d_k)
        total = to_readers(total, summed, asking, query[2], read_weights + weights, None, 0, count, columns, d_k, False)
    else:
        readers = load_tile(asking, query[2], places, count, columns, d_k)
        total = tl.dot(tl.trans(load_square(read_weights + weights, C)), readers, total, input_precision=FAST)
    if probe is not None:
        probing = first_row(probe, row, start, head)
        scale, scale_stride = None, 0
        if strength is not None:
            scale, scale_stride = first_row(strength, row, start, head), strength[2]
        if VECTOR:
            total = to_readers(
                total, summed, probing, probe[2], answer_weights + weights, scale, scale_stride, count, columns, d_k, True
            )  # fmt: skip
        else:
            readers = load_tile(probing, probe[2], places, count, columns, d_k)
            if scale is not None:
                readers *= load_tile(scale, scale_stride, places, count, tl.arange(0, 1), 1)
            total = tl.dot(tl.trans(load_square(answer_weights + weights, C)), readers, total, input_precision=FAST)
    here = first_row(gradient, row, start, head) + term * gradient[4]
    store_tile(here, gradient[2], places, count, columns, d_k, total)
