"""|M|^2 of M = sum_i c_i l_i r_i^T, where most terms are chosen rows of a dictionary: the squared error of reconstructions.

    |M|^2 = c^T G c        G_ij = (l_i . l_j)(r_i . r_j)
    d|M|^2/dc = 2 G c      d|M|^2/dl_i = 2 c_i sum_j c_j (r_i . r_j) l_j      d|M|^2/dr_i = 2 c_i sum_j c_j (l_i . l_j) r_j

The terms of a sample are its chosen rows, then extra ones of its own: the write itself with the coefficient 1, while atoms have
-a_i. Several levels of coefficients, such as the prefixes of a Matryoshka dictionary, share the Gram matrices. G c, which the
forward pass finds, is half of the coefficients' gradient.

Inner products of chosen rows with a sum over others are one more G c, in which the first have the coefficient 0.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.sae.kernels import WIDEST
from writesae.sae.kernels.gram import gram_applied, rows_gradient
from writesae.sae.kernels.rows import check, no_second_derivative, sorted_pairs


@torch.library.custom_op("writesae::squared_norm", mutates_args=())
def squared_norm(
    coefficients: Tensor,
    key_atoms: Tensor,
    value_atoms: Tensor,
    indices: Tensor,
    extra_key: Tensor,
    extra_value: Tensor,
) -> tuple[Tensor, Tensor]:
    """|M|^2 [batch, level], and G c [batch, level, term + extra], which is kept for the gradient and has none of its own."""
    inputs = (coefficients, key_atoms, value_atoms, indices, extra_key, extra_value)
    given = [tensor.contiguous() for tensor in inputs]
    applied = gram_applied(*given)
    return (given[0] * applied).sum(-1), applied


@squared_norm.register_fake
def _(coefficients, key_atoms, value_atoms, indices, extra_key, extra_value):
    return coefficients.new_empty(coefficients.shape[:2]), coefficients.new_empty(coefficients.shape)


@torch.library.custom_op("writesae::squared_norm_gradient", mutates_args=())
def squared_norm_gradient(
    gradient: Tensor,
    coefficients: Tensor,
    key_atoms: Tensor,
    value_atoms: Tensor,
    indices: Tensor,
    extra_key: Tensor,
    extra_value: Tensor,
    of_extra: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of both tables, or those of the extra terms."""
    pairs = None
    if not of_extra:
        active = (coefficients[:, :, : indices.shape[1]] != 0).any(1)
        pairs = sorted_pairs(indices, len(key_atoms), active)
    key_gradient, value_gradient = rows_gradient(
        (2 * gradient[..., None] * coefficients).contiguous(),
        coefficients.contiguous(),
        key_atoms.contiguous(),
        value_atoms.contiguous(),
        indices.contiguous(),
        extra_key.contiguous(),
        extra_value.contiguous(),
        pairs,
    )
    key, value = (extra_key, extra_value) if of_extra else (key_atoms, value_atoms)
    return key_gradient.view(key.shape).to(key.dtype), value_gradient.view(value.shape).to(value.dtype)


@squared_norm_gradient.register_fake
def _(gradient, coefficients, key_atoms, value_atoms, indices, extra_key, extra_value, of_extra):
    key, value = (extra_key, extra_value) if of_extra else (key_atoms, value_atoms)
    return key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, gradient: Tensor, applied_gradient: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, applied = ctx.saved_tensors
    needed = ctx.needs_input_grad
    atoms = squared_norm_gradient(gradient, *inputs, False) if needed[1] or needed[2] else (None, None)
    extra = squared_norm_gradient(gradient, *inputs, True) if needed[4] or needed[5] else (None, None)
    return 2 * gradient[..., None] * applied if needed[0] else None, *atoms, None, *extra


squared_norm.register_autograd(_backward, setup_context=_keep)
squared_norm_gradient.register_autograd(no_second_derivative("squared_norm_at"))


def squared_norm_at(
    coefficients: Float[Tensor, "batch level term"],
    key_atoms: Float[Tensor, "row d_k"],
    value_atoms: Float[Tensor, "row d_v"],
    indices: Int[Tensor, "batch term"],
    extra_key: Float[Tensor, "batch extra d_k"],
    extra_value: Float[Tensor, "batch extra d_v"],
    extra_coefficients: Float[Tensor, "batch level extra"],
) -> Float[Tensor, "batch level"]:
    """|sum_i c_i v_i w_i^T + sum_m x_m key_m value_m^T|^2 of every sample and level, in float32; differentiable once.

    Args:
        coefficients: of the chosen rows, -a_i for a residual; one set per level.
        key_atoms, value_atoms: the factors of all rows, float32 or narrower.
        indices: which rows; a row may be chosen twice, and must exist.
        extra_key, extra_value: factors of the sample's own terms, of which there may be none.
        extra_coefficients: of those, 1 for the write of a residual.

    Raises:
        ValueError: for widths, devices or dtypes that the kernels cannot take.
    """
    check(indices, (key_atoms, extra_key), (value_atoms, extra_value), widest=WIDEST)
    every = torch.cat([coefficients.float(), extra_coefficients.float()], dim=2)
    return squared_norm(every, key_atoms, value_atoms, indices, extra_key, extra_value)[0]


@torch.library.custom_op("writesae::inner_with_sum", mutates_args=())
def inner_with_sum(
    key_atoms: Tensor, value_atoms: Tensor, indices: Tensor, others: Tensor, other_coefficients: Tensor
) -> Tensor:
    """<l_i r_i^T, sum_j c_j l_j r_j^T> [batch, term] of chosen rows i with a sum over others j, in float32."""
    both, weights = _one_sum(indices, others, other_coefficients)
    none = (table.new_empty(len(indices), 0, table.shape[1]) for table in (key_atoms, value_atoms))
    applied = gram_applied(weights, key_atoms.contiguous(), value_atoms.contiguous(), both, next(none), next(none))
    return applied[:, 0, : indices.shape[1]].contiguous()


@inner_with_sum.register_fake
def _(key_atoms, value_atoms, indices, others, other_coefficients):
    return key_atoms.new_empty(indices.shape, dtype=torch.float32)


@torch.library.custom_op("writesae::inner_with_sum_gradient", mutates_args=())
def inner_with_sum_gradient(
    gradient: Tensor,
    key_atoms: Tensor,
    value_atoms: Tensor,
    indices: Tensor,
    others: Tensor,
    other_coefficients: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of both tables by their rows i; rows j are held fixed."""
    both, weights = _one_sum(indices, others, other_coefficients)
    own_weights = torch.zeros_like(weights)
    own_weights[:, 0, : indices.shape[1]] = gradient
    none = [table.new_empty(len(indices), 0, table.shape[1]) for table in (key_atoms, value_atoms)]
    pairs = sorted_pairs(both, len(key_atoms), own_weights[:, 0] != 0)
    of_key, of_value = rows_gradient(
        own_weights, weights, key_atoms.contiguous(), value_atoms.contiguous(), both, none[0], none[1], pairs
    )
    return of_key.to(key_atoms.dtype), of_value.to(value_atoms.dtype)


@inner_with_sum_gradient.register_fake
def _(gradient, key_atoms, value_atoms, indices, others, other_coefficients):
    return key_atoms.new_empty(key_atoms.shape), value_atoms.new_empty(value_atoms.shape)


def _one_sum(indices: Tensor, others: Tensor, other_coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Both lists of rows as the terms of one sum, [batch, every], in which the first have the coefficient 0."""
    none = torch.zeros(indices.shape, dtype=torch.float32, device=indices.device)
    return torch.cat([indices, others], dim=1), torch.cat([none, other_coefficients.float()], dim=1)[:, None]


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _inner_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
    return *(inner_with_sum_gradient(gradient, *ctx.saved_tensors) if needed else (None, None)), None, None, None


inner_with_sum.register_autograd(_inner_backward, setup_context=_keep_inputs)
inner_with_sum_gradient.register_autograd(no_second_derivative("inner_with_sum_at"))


def inner_with_sum_at(
    key_atoms: Float[Tensor, "row d_k"],
    value_atoms: Float[Tensor, "row d_v"],
    indices: Int[Tensor, "batch term"],
    others: Int[Tensor, "batch other"],
    other_coefficients: Float[Tensor, "batch other"],
) -> Float[Tensor, "batch term"]:
    """<A_i, sum_j c_j A_j> of chosen rows i with the sum over other rows j of the same tables, in float32.

    Differentiable once in the tables, by the rows i alone: the sum is held fixed, as what a residual is taken from.

    Raises:
        ValueError: for widths, devices or dtypes that the kernels cannot take.
    """
    check(indices, (key_atoms, key_atoms), (value_atoms, value_atoms), widest=WIDEST)
    return inner_with_sum(key_atoms, value_atoms, indices, others, other_coefficients.detach())
