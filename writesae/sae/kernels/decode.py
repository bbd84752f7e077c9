"""What a code rebuilds, from its active atoms only: sum_i a_i v_i w_i^T as matrices, or sum_i a_i A_i of a dense dictionary.

With D the gradient of the matrices, that of a coefficient is v_i^T D w_i, and those of row i are (sum a D) w_i and
(sum a D)^T v_i over the samples that chose it: the matrices are added up in registers, a block of key channels at a time, and
meet the row's own factors at the end.

Dense atoms need no kernel forward: torch's embedding_bag sums rows as it reads them. Its gradient on CUDA keeps partial sums
of rows, up to [batch * term, d] of them, so that the gradients here are the sums of `rows.py`.
"""

from collections.abc import Iterator
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent.scan.kernels.layout import Launch, block_of, recorded, scratch
from hooked_recurrent.scan.kernels.variants import Case, Variant, register
from writesae.sae.kernels import WIDEST
from writesae.sae.kernels.reference import per_term
from writesae.sae.kernels.rows import (
    TERMS,
    check,
    inner_of_rows,
    launched,
    load_rows,
    load_vector,
    meta,
    no_second_derivative,
    precision_of,
    sorted_pairs,
    sum_by_row,
)


@triton.jit
@no_type_check
def outer_kernel(
    weights, key_atoms, value_atoms, indices, out, terms, d_k, d_v,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_j weights[b, j] v_j w_j^T [sample, d_k, d_v]. One program per sample and block of the matrix."""
    sample = tl.program_id(0).to(tl.int64)
    k, v = tl.program_id(1) * BK + tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV)
    total = tl.zeros([BK, BV], tl.float32)
    for begin in range(0, terms, BT):
        places = begin + tl.arange(0, BT)
        inside = places < terms
        rows = tl.load(indices + sample * terms + places, mask=inside, other=0)
        weight = tl.load(weights + sample * terms + places, mask=inside, other=0.0).to(tl.float32)
        keys = weight[:, None] * load_rows(key_atoms, rows, inside, k, d_k)
        total = tl.dot(tl.trans(keys), load_rows(value_atoms, rows, inside, v, d_v), total, input_precision=PRECISION)
    mask = (k < d_k)[:, None] & (v < d_v)[None, :]
    tl.store(out + sample * d_k * d_v + k[:, None] * d_v + v[None, :], total, mask=mask)


@triton.jit
@no_type_check
def between_kernel(
    matrices, key_atoms, value_atoms, indices, out, terms, d_k, d_v,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """v_j^T D_b w_j [sample, term]. One program per sample and block of terms."""
    sample = tl.program_id(0).to(tl.int64)
    mine = tl.program_id(1) * BT + tl.arange(0, BT)
    inside = mine < terms
    rows = tl.load(indices + sample * terms + mine, mask=inside, other=0)
    found = tl.zeros([BT, BK], tl.float32)
    for key_begin in range(0, d_k, BK):
        k = key_begin + tl.arange(0, BK)
        half = tl.zeros([BT, BK], tl.float32)
        for value_begin in range(0, d_v, BV):
            v = value_begin + tl.arange(0, BV)
            tile = load_rows(matrices + sample * d_k * d_v, k, k < d_k, v, d_v)
            values = load_rows(value_atoms, rows, inside, v, d_v)
            half = tl.dot(values, tl.trans(tile), half, input_precision=PRECISION)
        found += half * load_rows(key_atoms, rows, inside, k, d_k)
    tl.store(out + sample * terms + mine, tl.sum(found, axis=1), mask=inside)


@triton.jit
@no_type_check
def atoms_gradient_kernel(
    matrices, weights, key_atoms, value_atoms, order, offsets, key_gradient, value_gradient, terms, d_k, d_v,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Both gradients of a row [row, d_k], [row, d_v]. One program per row."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BV)
    first, last = tl.load(offsets + row), tl.load(offsets + row + 1)
    own_value = load_vector(value_atoms + row * d_v, v, d_v)
    of_value = tl.zeros([BK, BV], tl.float32)
    for begin in range(0, d_k, BK):
        k = begin + tl.arange(0, BK)
        total = tl.zeros([BK, BV], tl.float32)
        for place in range(first, last):
            pair = tl.load(order + place)
            weight = tl.load(weights + pair).to(tl.float32)
            total += weight * load_rows(matrices + pair // terms * d_k * d_v, k, k < d_k, v, d_v)
        tl.store(key_gradient + row * d_k + k, tl.sum(total * own_value[None, :], axis=1), mask=k < d_k)
        of_value += total * load_vector(key_atoms + row * d_k, k, d_k)[:, None]
    tl.store(value_gradient + row * d_v + v, tl.sum(of_value, axis=0), mask=v < d_v)


def outer(
    weights: Float[Tensor, "batch term"],
    key_atoms: Float[Tensor, "row d_k"],
    value_atoms: Float[Tensor, "row d_v"],
    indices: Int[Tensor, "batch term"],
) -> Float[Tensor, "batch d_k d_v"]:
    """sum_j weights[b, j] v_j w_j^T, in float32. The tensors are contiguous."""
    (batch, terms), d_k, d_v = indices.shape, key_atoms.shape[1], value_atoms.shape[1]
    out = scratch(batch, d_k, d_v, like=key_atoms)
    key_block, value_block = block_of(d_k, 64), block_of(d_v, 64)
    arguments = dict(weights=weights, key_atoms=key_atoms, value_atoms=value_atoms, indices=indices, out=out)
    arguments |= dict(terms=terms, d_k=d_k, d_v=d_v, BT=block_of(terms, 32), BK=key_block, BV=value_block)
    arguments |= dict(PRECISION=precision_of(key_atoms, value_atoms).fast)
    Launch(outer_kernel, (batch, triton.cdiv(d_k, key_block), triton.cdiv(d_v, value_block)), arguments).run()
    return out


def between(
    matrices: Float[Tensor, "batch d_k d_v"],
    key_atoms: Float[Tensor, "row d_k"],
    value_atoms: Float[Tensor, "row d_v"],
    indices: Int[Tensor, "batch term"],
) -> Float[Tensor, "batch term"]:
    """v_j^T D_b w_j of every pair, in float32. The tensors are contiguous."""
    (batch, terms), d_k, d_v = indices.shape, key_atoms.shape[1], value_atoms.shape[1]
    out, block = scratch(batch, terms, like=matrices), block_of(terms, 32)
    arguments = dict(matrices=matrices, key_atoms=key_atoms, value_atoms=value_atoms, indices=indices, out=out)
    arguments |= dict(terms=terms, d_k=d_k, d_v=d_v, BT=block, BK=block_of(d_k, 32), BV=block_of(d_v, 32))
    arguments |= dict(PRECISION=precision_of(key_atoms, value_atoms).fast)
    Launch(between_kernel, (batch, triton.cdiv(terms, block)), arguments).run()
    return out


def atoms_gradient(
    matrices: Float[Tensor, "batch d_k d_v"],
    weights: Float[Tensor, "batch term"],
    key_atoms: Float[Tensor, "row d_k"],
    value_atoms: Float[Tensor, "row d_v"],
    order: Int[Tensor, " pair"],
    offsets: Int[Tensor, " bound"],
) -> tuple[Float[Tensor, "row d_k"], Float[Tensor, "row d_v"]]:
    """(sum a D) w_i and (sum a D)^T v_i of every row, in float32. The tensors are contiguous."""
    (rows, d_k), d_v = key_atoms.shape, value_atoms.shape[1]
    key_gradient, value_gradient = scratch(rows, d_k, like=matrices), scratch(rows, d_v, like=matrices)
    wide = block_of(d_v, WIDEST)
    arguments = dict(matrices=matrices, weights=weights, key_atoms=key_atoms, value_atoms=value_atoms, order=order)
    arguments |= dict(offsets=offsets, key_gradient=key_gradient, value_gradient=value_gradient)
    arguments |= dict(terms=weights.shape[1], d_k=d_k, d_v=d_v, BK=max(1, min(32, 4096 // wide)), BV=wide)
    Launch(atoms_gradient_kernel, (rows,), arguments).run()
    return key_gradient, value_gradient


@torch.library.custom_op("writesae::decode", mutates_args=())
def decode(weights: Tensor, key_atoms: Tensor, value_atoms: Tensor, indices: Tensor) -> Tensor:
    """sum_j weights[b, j] v_j w_j^T [batch, d_k, d_v], in float32."""
    return outer(*(tensor.contiguous() for tensor in (weights, key_atoms, value_atoms, indices)))


@decode.register_fake
def _(weights, key_atoms, value_atoms, indices):
    shape = (indices.shape[0], key_atoms.shape[1], value_atoms.shape[1])
    return key_atoms.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("writesae::decode_gradient", mutates_args=())
def decode_gradient(
    gradient: Tensor, weights: Tensor, key_atoms: Tensor, value_atoms: Tensor, indices: Tensor, of_atoms: bool
) -> list[Tensor]:
    """The gradients of both tables, or that of the weights."""
    gradient, tables = gradient.contiguous(), (key_atoms.contiguous(), value_atoms.contiguous())
    if not of_atoms:
        return [between(gradient, tables[0], tables[1], indices.contiguous()).to(weights.dtype)]
    order, offsets = sorted_pairs(indices, len(key_atoms), weights != 0)
    of_key, of_value = atoms_gradient(gradient, weights.contiguous(), tables[0], tables[1], order, offsets)
    return [of_key.to(key_atoms.dtype), of_value.to(value_atoms.dtype)]


@decode_gradient.register_fake
def _(gradient, weights, key_atoms, value_atoms, indices, of_atoms):
    return [one.new_empty(one.shape) for one in ((key_atoms, value_atoms) if of_atoms else (weights,))]


@torch.library.custom_op("writesae::decode_dense", mutates_args=())
def decode_dense(weights: Tensor, atoms: Tensor, indices: Tensor) -> Tensor:
    """sum_j weights[b, j] atoms[indices[b, j]] [batch, d], in the dtype of the atoms."""
    return F.embedding_bag(indices, atoms, mode="sum", per_sample_weights=weights.to(atoms.dtype))


@decode_dense.register_fake
def _(weights, atoms, indices):
    return atoms.new_empty(indices.shape[0], atoms.shape[1])


@torch.library.custom_op("writesae::decode_dense_gradient", mutates_args=())
def decode_dense_gradient(gradient: Tensor, weights: Tensor, atoms: Tensor, indices: Tensor, of_atoms: bool) -> Tensor:
    """The gradient of the atoms, or that of the weights."""
    gradient = gradient.contiguous()
    if not of_atoms:
        return inner_of_rows(atoms.contiguous(), gradient, indices.contiguous()).to(weights.dtype)
    return sum_by_row(weights.contiguous(), gradient, *sorted_pairs(indices, len(atoms), weights != 0)).to(atoms.dtype)


@decode_dense_gradient.register_fake
def _(gradient, weights, atoms, indices, of_atoms):
    like = atoms if of_atoms else weights
    return like.new_empty(like.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    needed, inputs = ctx.needs_input_grad, ctx.saved_tensors
    weights = decode_gradient(gradient, *inputs, False)[0] if needed[0] else None
    atoms = decode_gradient(gradient, *inputs, True) if needed[1] or needed[2] else (None, None)
    return weights, *atoms, None


def _dense_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    needed, inputs = ctx.needs_input_grad, ctx.saved_tensors
    weights = decode_dense_gradient(gradient, *inputs, False) if needed[0] else None
    return weights, decode_dense_gradient(gradient, *inputs, True) if needed[1] else None, None


decode.register_autograd(_backward, setup_context=_keep)
decode_gradient.register_autograd(no_second_derivative("decode_at"))
decode_dense.register_autograd(_dense_backward, setup_context=_keep)
decode_dense_gradient.register_autograd(no_second_derivative("decode_dense_at"))


def decode_at(
    values: Float[Tensor, "batch chosen"],
    key_atoms: Float[Tensor, "row d_k"],
    value_atoms: Float[Tensor, "row d_v"],
    indices: Int[Tensor, "batch chosen"],
    rank: int = 1,
) -> Float[Tensor, "batch d_k d_v"]:
    """sum_i a_i A_i, where atom i has the rows i * rank .. i * rank + rank - 1, in float32; differentiable once.

    An atom may be chosen twice, and must exist.

    Raises:
        ValueError: for widths, devices or dtypes that the kernels cannot take.
    """
    check(indices, (key_atoms, key_atoms), (value_atoms, value_atoms), widest=WIDEST)
    weights, rows = per_term(values, indices, rank)
    return decode(weights.float(), key_atoms, value_atoms, rows)


def decode_dense_at(
    values: Float[Tensor, "batch chosen"], atoms: Float[Tensor, "row d"], indices: Int[Tensor, "batch chosen"]
) -> Float[Tensor, "batch d"]:
    """sum_i a_i A_i of atoms that are rows of any width, in the dtype of the atoms; differentiable once.

    Raises:
        ValueError: for devices or dtypes that the kernels cannot take.
    """
    check(indices, (atoms, atoms))
    return decode_dense(values, atoms, indices)


@torch.library.custom_op("writesae::inner_of_matrices", mutates_args=())
def inner_of_matrices(matrices: Tensor, key_atoms: Tensor, value_atoms: Tensor, indices: Tensor) -> Tensor:
    """v_j^T X_b w_j [batch, term] of every pair, in float32."""
    return between(matrices.contiguous(), key_atoms.contiguous(), value_atoms.contiguous(), indices.contiguous())


@inner_of_matrices.register_fake
def _(matrices, key_atoms, value_atoms, indices):
    return matrices.new_empty(indices.shape, dtype=torch.float32)


@torch.library.custom_op("writesae::inner_of_matrices_gradient", mutates_args=())
def inner_of_matrices_gradient(
    gradient: Tensor, matrices: Tensor, key_atoms: Tensor, value_atoms: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of both tables: those of a sum of outer products, with the places of matrices and weights changed."""
    order, offsets = sorted_pairs(indices, len(key_atoms), gradient != 0)
    tables = key_atoms.contiguous(), value_atoms.contiguous()
    of_key, of_value = atoms_gradient(matrices.contiguous(), gradient.contiguous(), *tables, order, offsets)
    return of_key.to(key_atoms.dtype), of_value.to(value_atoms.dtype)


@inner_of_matrices_gradient.register_fake
def _(gradient, matrices, key_atoms, value_atoms, indices):
    return key_atoms.new_empty(key_atoms.shape), value_atoms.new_empty(value_atoms.shape)


def _inner_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    atoms = (None, None)
    if needed[1] or needed[2]:
        atoms = inner_of_matrices_gradient(gradient, *ctx.saved_tensors)
    matrices = decode(gradient, *ctx.saved_tensors[1:]).to(ctx.saved_tensors[0].dtype) if needed[0] else None
    return matrices, *atoms, None


inner_of_matrices.register_autograd(_inner_backward, setup_context=_keep)
inner_of_matrices_gradient.register_autograd(no_second_derivative("inner_of_matrices_at"))


def inner_of_matrices_at(
    matrices: Float[Tensor, "batch d_k d_v"],
    key_atoms: Float[Tensor, "row d_k"],
    value_atoms: Float[Tensor, "row d_v"],
    indices: Int[Tensor, "batch term"],
) -> Float[Tensor, "batch term"]:
    """v_i^T X w_i at the chosen rows i, in float32; differentiable once in the matrices and the tables.

    Raises:
        ValueError: for widths, devices or dtypes that the kernels cannot take.
    """
    check(indices, (key_atoms, matrices[:, :, 0]), (value_atoms, matrices), widest=WIDEST)
    return inner_of_matrices(matrices, key_atoms, value_atoms, indices)


@register
def variants(case: Case) -> Iterator[Variant]:
    """The kernels of matrices, for every number of terms."""
    batch, n_rows = 256, 2048
    key_atoms, value_atoms = (meta(n_rows, width, dtype=case.dtype) for width in (case.d_k, case.d_v))
    matrices = meta(batch, case.d_k, case.d_v)
    for terms in TERMS:
        indices, weights = meta(batch, terms, dtype=torch.int64), meta(batch, terms)
        order, offsets = meta(batch * terms, dtype=torch.int64), meta(n_rows + 1, dtype=torch.int64)
        with recorded(case.backend) as launches:
            outer(weights, key_atoms, value_atoms, indices)
            between(matrices, key_atoms, value_atoms, indices)
            atoms_gradient(matrices, weights, key_atoms, value_atoms, order, offsets)
        yield from launched(f"decode, {terms} terms", case, launches)
