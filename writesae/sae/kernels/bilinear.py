"""(p_i . key)(r_i . value) at chosen rows i of an encoder, without [batch, term, d].

Both gradients are weighted sums, of a sample's vector over the pairs of a row, and of rows over the pairs of a sample. The
pairs are sorted by row once for both factors.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.sae.kernels.rows import (
    check,
    inner_of_rows,
    no_second_derivative,
    sorted_pairs,
    sum_by_row,
    sum_of_rows,
)


@torch.library.custom_op("writesae::projections_at", mutates_args=())
def projections_at(
    key_factors: Tensor, value_factors: Tensor, key: Tensor, value: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor]:
    """p_i . key and r_i . value [batch, term] at the chosen rows, in float32."""
    indices = indices.contiguous()
    by_key = inner_of_rows(key_factors.contiguous(), key.contiguous(), indices)
    return by_key, inner_of_rows(value_factors.contiguous(), value.contiguous(), indices)


@projections_at.register_fake
def _(key_factors, value_factors, key, value, indices):
    by_key = key_factors.new_empty(indices.shape, dtype=torch.float32)
    return by_key, torch.empty_like(by_key)


@torch.library.custom_op("writesae::projections_gradient", mutates_args=())
def projections_gradient(
    by_key_gradient: Tensor,
    by_value_gradient: Tensor,
    key_factors: Tensor,
    value_factors: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    of_factors: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of both tables of factors, or those of keys and values."""
    given = ((by_key_gradient, key_factors, key), (by_value_gradient, value_factors, value))
    indices = indices.contiguous()
    if of_factors:
        # A pair of an inactive atom has no gradient at all: d(score) is zero, and so are both products with it.
        pairs = sorted_pairs(indices, len(key_factors), (by_key_gradient != 0) | (by_value_gradient != 0))
        of_key, of_value = (
            sum_by_row(weights.contiguous(), vectors.contiguous(), *pairs).to(table.dtype)
            for weights, table, vectors in given
        )
    else:
        of_key, of_value = (
            sum_of_rows(weights.contiguous(), table.contiguous(), indices).to(vectors.dtype)
            for weights, table, vectors in given
        )
    return of_key, of_value


@projections_gradient.register_fake
def _(by_key_gradient, by_value_gradient, key_factors, value_factors, key, value, indices, of_factors):
    like = (key_factors, value_factors) if of_factors else (key, value)
    return like[0].new_empty(like[0].shape), like[1].new_empty(like[1].shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, by_key: Tensor, by_value: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    gradients = by_key, by_value, *ctx.saved_tensors
    factors = projections_gradient(*gradients, True) if needed[0] or needed[1] else (None, None)
    inputs = projections_gradient(*gradients, False) if needed[2] or needed[3] else (None, None)
    return *factors, *inputs, None


projections_at.register_autograd(_backward, setup_context=_keep)
projections_gradient.register_autograd(no_second_derivative("bilinear_at"))


def bilinear_at(
    key_factors: Float[Tensor, "row d_k"],
    value_factors: Float[Tensor, "row d_v"],
    key: Float[Tensor, "batch d_k"],
    value: Float[Tensor, "batch d_v"],
    indices: Int[Tensor, "batch term"],
) -> Float[Tensor, "batch term"]:
    """(p_i . key)(r_i . value) at the chosen rows i, in float32; differentiable once in the first four arguments.

    Also the inner products <key value^T, A_i> with the atoms of a decoder. A row may be chosen twice, and must exist.

    Raises:
        ValueError: for widths, devices or dtypes that the kernels cannot take.
    """
    check(indices, (key_factors, key), (value_factors, value))
    by_key, by_value = projections_at(key_factors, value_factors, key, value, indices)
    return by_key * by_value
