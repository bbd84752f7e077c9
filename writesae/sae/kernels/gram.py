"""Gram matrices of outer products among chosen rows, tile by tile in registers: the kernels behind `squared_norm.py`.

For the terms l_i r_i^T of a sample, its chosen rows and then extra ones of its own,

    G_ij = (l_i . l_j)(r_i . r_j)        (G c)_i        sum_j W_ij (r_i . r_j) l_j        sum_j W_ij (l_i . l_j) r_j

Forward, a program holds a block of G and leaves G c, one number per term. Backward, one program per row of the dictionary goes
through the pairs (sample, place) that chose the row. l_i and r_i are then its own, loaded once; the other terms of each sample
pass by in tiles, are multiplied with the own row and added up. Nothing of size [batch, term, d] is left in memory, nor a Gram
matrix, and the order of the sum is always the same.
"""

from collections.abc import Iterator
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent.scan.kernels.layout import Launch, block_of, recorded, scratch
from hooked_recurrent.scan.kernels.variants import Case, Variant, register
from writesae.sae.kernels import WIDEST
from writesae.sae.kernels.rows import TERMS, launched, load_rows, load_vector, meta, precision_of


@triton.jit
@no_type_check
def terms_at(indices, sample, places, terms, extras):
    """Where a sample's terms are: which places are chosen rows, these rows, which are its own, and their rows."""
    chosen, own = places < terms, (places >= terms) & (places < terms + extras)
    rows = tl.load(indices + sample * terms + places, mask=chosen, other=0)
    return chosen, rows, own, sample * extras + places - terms


@triton.jit
@no_type_check
def load_terms(table, extra, at, columns, width):
    """Factors of the terms at some places; zero where there is no term."""
    return load_rows(table, at[1], at[0], columns, width) + load_rows(extra, at[3], at[2], columns, width)


@triton.jit
@no_type_check
def gram(table, extra, mine, others, width, BT: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):
    """Inner products of two blocks of a sample's terms."""
    product = tl.zeros([BT, BT], tl.float32)
    for begin in range(0, width, BD):
        columns = begin + tl.arange(0, BD)
        left, right = load_terms(table, extra, mine, columns, width), load_terms(table, extra, others, columns, width)
        product = tl.dot(left, tl.trans(right), product, input_precision=PRECISION)
    return product


@triton.jit
@no_type_check
def gram_applied_kernel(
    coefficients, key_atoms, value_atoms, indices, extra_key, extra_value, applied,
    levels, terms, extras, d_k, d_v,
    BL: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """G c [sample, level, term]. One program per sample and block of terms."""
    sample = tl.program_id(0).to(tl.int64)
    every = terms + extras
    mine = tl.program_id(1) * BT + tl.arange(0, BT)
    level = tl.arange(0, BL)
    first = (sample * levels + level)[:, None] * every
    these = terms_at(indices, sample, mine, terms, extras)
    total = tl.zeros([BL, BT], tl.float32)
    for begin in range(0, every, BT):
        others = begin + tl.arange(0, BT)
        those = terms_at(indices, sample, others, terms, extras)
        product = gram(key_atoms, extra_key, these, those, d_k, BT, BK, PRECISION)
        product *= gram(value_atoms, extra_value, these, those, d_v, BT, BV, PRECISION)
        mask = (level < levels)[:, None] & (others < every)[None, :]
        weight = tl.load(coefficients + first + others[None, :], mask=mask, other=0.0)
        total += tl.sum(product[None, :, :] * weight[:, None, :], axis=2)
    mask = (level < levels)[:, None] & (mine < every)[None, :]
    tl.store(applied + first + mine[None, :], total, mask=mask)


@triton.jit
@no_type_check
def rows_gradient_kernel(
    own_weights, weights, key_atoms, value_atoms, indices, extra_key, extra_value, order, offsets,
    key_gradient, value_gradient, levels, terms, extras, d_k, d_v,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Both gradients of a row [row, d_k], [row, d_v]. One program per row of the tables; without `offsets` per extra term."""
    row = tl.program_id(0).to(tl.int64)
    every = terms + extras
    k, v = tl.arange(0, BK), tl.arange(0, BV)
    if offsets is not None:
        first, last = tl.load(offsets + row), tl.load(offsets + row + 1)
        own_key = load_vector(key_atoms + row * d_k, k, d_k)
        own_value = load_vector(value_atoms + row * d_v, v, d_v)
    else:
        first, last = row, row + 1
        own_key = load_vector(extra_key + row * d_k, k, d_k)
        own_value = load_vector(extra_value + row * d_v, v, d_v)
    key_sum, value_sum = tl.zeros([BT, BK], tl.float32), tl.zeros([BT, BV], tl.float32)
    for place in range(first, last):
        if offsets is not None:
            pair = tl.load(order + place)
            sample, own = pair // terms, pair % terms
        else:
            sample, own = row // extras, terms + row % extras
        for begin in range(0, every, BT):
            others = begin + tl.arange(0, BT)
            weight = tl.zeros([BT], tl.float32)
            for level in range(0, levels):
                at = (sample * levels + level) * every
                own_weight = tl.load(own_weights + at + own)
                weight += own_weight * tl.load(weights + at + others, mask=others < every, other=0.0)
            those = terms_at(indices, sample, others, terms, extras)
            keys = load_terms(key_atoms, extra_key, those, k, d_k)
            values = load_terms(value_atoms, extra_value, those, v, d_v)
            key_sum += keys * (weight * tl.sum(values * own_value[None, :], axis=1))[:, None]
            value_sum += values * (weight * tl.sum(keys * own_key[None, :], axis=1))[:, None]
    tl.store(key_gradient + row * d_k + k, tl.sum(key_sum, axis=0), mask=k < d_k)
    tl.store(value_gradient + row * d_v + v, tl.sum(value_sum, axis=0), mask=v < d_v)


def gram_applied(
    coefficients: Float[Tensor, "batch level every"],
    key_atoms: Float[Tensor, "row d_k"],
    value_atoms: Float[Tensor, "row d_v"],
    indices: Int[Tensor, "batch term"],
    extra_key: Float[Tensor, "batch extra d_k"],
    extra_value: Float[Tensor, "batch extra d_v"],
) -> Float[Tensor, "batch level every"]:
    """G c of every sample and level, in float32. The tensors are contiguous."""
    batch, levels, every = coefficients.shape
    applied = scratch(batch, levels, every, like=coefficients)
    # 33 terms, the usual number, fill three blocks of 16 better than two of 32.
    block = 16 if every <= 48 else 32
    # Numbers of 16 bits are exact in TF32.
    precision = precision_of(key_atoms, value_atoms, extra_key, extra_value)
    arguments = {
        "coefficients": coefficients,
        "key_atoms": key_atoms,
        "value_atoms": value_atoms,
        "indices": indices,
        "extra_key": extra_key,
        "extra_value": extra_value,
        "applied": applied,
        "levels": levels,
        "terms": indices.shape[1],
        "extras": extra_key.shape[1],
        "d_k": key_atoms.shape[1],
        "d_v": value_atoms.shape[1],
        "BL": triton.next_power_of_2(levels),
        "BT": block,
        "BK": block_of(key_atoms.shape[1], precision.block // 2),
        "BV": block_of(value_atoms.shape[1], precision.block // 2),
        "PRECISION": precision.fast,
    }
    Launch(gram_applied_kernel, (batch, triton.cdiv(every, block)), arguments, 1 if block == 16 else 4).run()
    return applied


def rows_gradient(
    own_weights: Float[Tensor, "batch level every"],
    weights: Float[Tensor, "batch level every"],
    key_atoms: Float[Tensor, "row d_k"],
    value_atoms: Float[Tensor, "row d_v"],
    indices: Int[Tensor, "batch term"],
    extra_key: Float[Tensor, "batch extra d_k"],
    extra_value: Float[Tensor, "batch extra d_v"],
    pairs: tuple[Tensor, Tensor] | None,
) -> tuple[Float[Tensor, "own d_k"], Float[Tensor, "own d_v"]]:
    """Row i: sum_j W_ij (r_i . r_j) l_j and sum_j W_ij (l_i . l_j) r_j over the samples that chose it, in float32.

    W_ij = sum over levels of own_weights_i weights_j. Without `pairs` the same of the extra terms, [batch * extra, d]. The
    tensors are contiguous; `pairs` are the indices' `sorted_pairs`.
    """
    d_k, d_v, extras = key_atoms.shape[1], value_atoms.shape[1], extra_key.shape[1]
    own = len(key_atoms) if pairs is not None else len(indices) * extras
    key_gradient, value_gradient = scratch(own, d_k, like=key_atoms), scratch(own, d_v, like=value_atoms)
    key_block, value_block = block_of(d_k, WIDEST), block_of(d_v, WIDEST)
    # Two tiles and two sums of BT rows stay in registers: of wide rows fewer are taken.
    widest = max(key_block, value_block)
    rows = 8 if widest <= 64 else min(4, 1024 // widest)
    order, offsets = (None, None) if pairs is None else pairs
    arguments = {
        "own_weights": own_weights,
        "weights": weights,
        "key_atoms": key_atoms,
        "value_atoms": value_atoms,
        "indices": indices,
        "extra_key": extra_key,
        "extra_value": extra_value,
        "order": order,
        "offsets": offsets,
        "key_gradient": key_gradient,
        "value_gradient": value_gradient,
        "levels": weights.shape[1],
        "terms": indices.shape[1],
        "extras": extras,
        "d_k": d_k,
        "d_v": d_v,
        "BT": rows,
        "BK": key_block,
        "BV": value_block,
    }
    Launch(rows_gradient_kernel, (own,), arguments).run()
    return key_gradient, value_gradient


@register
def variants(case: Case) -> Iterator[Variant]:
    """Both kernels on writes with 8, 32 or 64 atoms, one level or three, and the gradient of the writes."""
    batch, rows = 256, 2048
    for terms in TERMS:
        for levels in (1, 3):
            tensors = (
                meta(batch, levels, terms + 1),
                meta(rows, case.d_k, dtype=case.dtype),
                meta(rows, case.d_v, dtype=case.dtype),
                meta(batch, terms, dtype=torch.int64),
                meta(batch, 1, case.d_k, dtype=case.dtype),
                meta(batch, 1, case.d_v, dtype=case.dtype),
            )
            pairs = (meta(batch * terms, dtype=torch.int64), meta(rows + 1, dtype=torch.int64))
            with recorded(case.backend) as launches:
                gram_applied(*tensors)
                rows_gradient(meta(batch, levels, terms + 1), *tensors, pairs)
                rows_gradient(meta(batch, levels, terms + 1), *tensors, None)
            yield from launched(f"squared norm, {terms} terms", case, launches)
