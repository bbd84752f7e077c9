"""The three sums that keep a WriteSAE at the cost of its factors: nothing here is of size d_k x d_v or [batch, atoms,
d].

A sum of rank-1 terms M = sum_i c_i l_i r_i^T has the squared Frobenius norm

    |M|^2 = sum_ij c_i c_j (l_i . l_j)(r_i . r_j) = c^T (L L^T * R R^T) c                       (1)

A write is one term and its reconstruction k terms, so the squared error of a reconstruction is (1) with the
coefficients (1, -a_1, ..., -a_k); multiplied out,

    |X - sum_i a_i A_i|^2 = |k|^2 |v|^2 - 2 sum_i a_i (v_i . k)(w_i . v) + sum_ij a_i a_j (v_i . v_j)(w_i . w_j)

Two Gram matrices of size (k+1)^2 replace the matrix, and the derivatives of (1) reuse them:

    d|M|^2/dc = 2 G c      d|M|^2/dL = 2 (c c^T * R R^T) L      d|M|^2/dR = 2 (c c^T * L L^T) R      G = L L^T * R R^T

Autograd would find the same with twice the products, because it cannot know that a Gram matrix is symmetric.

The score of an atom is a product of two projections, z_i = (p_i . key)(r_i . value). All atoms are scored to find the
active ones (two matrix products), but only active atoms get a gradient, so the backward is a sparse product over
batch x k pairs.

Precision: (1) is a small difference of large numbers. Its rounding error is some 1e-7 |X|^2 in float32: harmless beside
the errors that training sees (a per cent of |X|^2 and more), visible when a reconstruction is nearly exact.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import writesae.sae.kernels as kernels

_GATHERED = 256  # samples whose rows are gathered at once where no one keeps them
_GRAM_ADVANTAGE = 4  # how many times the matrix's own multiplications the Gram matrices may take before they lose


class _SquaredNormOfSum(torch.autograd.Function):
    """Equation (1) and its three derivatives, for several lists of coefficients over the same outer products."""

    @staticmethod
    def forward(ctx, coefficients, left, right):
        left_gram = left @ left.transpose(1, 2)
        right_gram = right @ right.transpose(1, 2)
        gram = left_gram * right_gram
        if coefficients.shape[1] == 1:
            # A batched matrix-vector product is slow on the CPU; the same as an elementwise product and a sum is not.
            applied = (gram * coefficients).sum(-1)[:, None]
        else:
            applied = coefficients @ gram
        ctx.save_for_backward(coefficients, left, right, left_gram, right_gram, applied)
        return (coefficients * applied).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        coefficients, left, right, left_gram, right_gram, applied = ctx.saved_tensors
        scaled = 2 * grad[..., None] * coefficients
        if coefficients.shape[1] == 1:
            pairs = scaled.transpose(1, 2) * coefficients
        else:
            pairs = scaled.transpose(1, 2) @ coefficients
        grad_left = (pairs * right_gram) @ left if ctx.needs_input_grad[1] else None
        grad_right = (pairs * left_gram) @ right if ctx.needs_input_grad[2] else None
        return 2 * grad[..., None] * applied, grad_left, grad_right


def matrix_is_cheaper(term: int, d_k: int, d_v: int) -> bool:
    """Whether a sum of so many outer products is cheaper to form than their Gram matrices."""
    return term * (d_k + d_v) > _GRAM_ADVANTAGE * d_k * d_v


def squared_norm_of_sum(
    coefficients: Float[Tensor, "batch level term"],
    left: Float[Tensor, "batch term d_k"],
    right: Float[Tensor, "batch term d_v"],
) -> Float[Tensor, "batch level"]:
    """|sum_i c_i l_i r_i^T|^2 of every sample and level of coefficients; differentiable once in all three arguments.

    By equation (1), unless there are so many terms that the matrix itself is the cheaper way.
    """
    if matrix_is_cheaper(left.shape[1], left.shape[2], right.shape[2]):
        levels = [(left * level[..., None]).transpose(1, 2) @ right for level in coefficients.unbind(1)]
        return torch.stack([matrix.square().sum((1, 2)) for matrix in levels], dim=1)
    return _SquaredNormOfSum.apply(coefficients, left, right)


def squared_norms_at(
    coefficients: Float[Tensor, "batch level term"],
    rows: tuple[Float[Tensor, "row d_k"], Float[Tensor, "row d_v"]],
    indices: Int[Tensor, "batch term"],
) -> Float[Tensor, "batch level"]:
    """|sum_j c_j l_j r_j^T|^2 of every level, where l and r are chosen rows that no one has gathered yet.

    By kernels, where `kernels.use_triton(*rows)`; else gathered a block of samples at a time, once more in the backward pass,
    so that a passage of thousands of states never holds more gathered vectors than a batch of writes does.
    """
    (d_k, d_v), count = (side.shape[1] for side in rows), len(indices)
    if not kernels.use_triton(*rows):
        # Rows that are frozen now must still be when they are gathered again, whatever has happened to their parameter.
        sides = [side if side.requires_grad else side.detach() for side in rows]
        blocks = zip(coefficients.split(_GATHERED), indices.split(_GATHERED), strict=True)
        return torch.cat([checkpoint(_gathered_norms, *block, *sides, use_reentrant=False) for block in blocks])
    if matrix_is_cheaper(indices.shape[1], d_k, d_v):
        levels = [kernels.decode_at(level, *rows, indices).square().sum((1, 2)) for level in coefficients.unbind(1)]
        return torch.stack(levels, dim=1).type_as(coefficients)
    nothing = (side.new_zeros(count, 0, side.shape[1]) for side in rows)
    none = coefficients.new_zeros(*coefficients.shape[:2], 0)
    return kernels.squared_norm_at(coefficients, *rows, indices, *nothing, none).type_as(coefficients)


def _gathered_norms(coefficients: Tensor, indices: Tensor, left: Tensor, right: Tensor) -> Tensor:
    gathered = (side.index_select(0, indices.reshape(-1)).view(*indices.shape, -1) for side in (left, right))
    return squared_norm_of_sum(coefficients, *gathered)


def inner_with_sum(
    left: Float[Tensor, "batch term d_k"],
    right: Float[Tensor, "batch term d_v"],
    coefficients: Float[Tensor, "batch other"],
    other_left: Float[Tensor, "batch other d_k"],
    other_right: Float[Tensor, "batch other d_v"],
) -> Float[Tensor, "batch term"]:
    """Inner product of each l_i r_i^T with the matrix sum_j c_j l'_j r'_j^T, without that matrix."""
    pairs = (left @ other_left.transpose(1, 2)) * (right @ other_right.transpose(1, 2))
    return (pairs * coefficients[:, None, :]).sum(-1)


def sum_outer_at(
    weights: Float[Tensor, "batch term"],
    samples: Int[Tensor, " pair"],
    order: Int[Tensor, " pair"],
    offsets: Int[Tensor, " row"],
    vectors: Float[Tensor, "batch d"],
) -> Float[Tensor, "row d"]:
    """Row i: the sum of weights[b, j] vectors[b] over the pairs (b, j) that chose row i, given by `pairs_by_row`."""
    sorted_weights = weights.reshape(-1).index_select(0, order)
    return F.embedding_bag(samples, vectors, offsets, mode="sum", per_sample_weights=sorted_weights)


def pairs_by_row(
    indices: Int[Tensor, "batch term"], n_rows: int
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], Int[Tensor, " row"]]:
    """The pairs (sample, chosen row) sorted by row: each pair's sample, its old place, and where each row begins."""
    flat = indices.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=n_rows)
    return order // indices.shape[1], order, counts.cumsum(0) - counts


class _BilinearAt(torch.autograd.Function):
    """Products of two projections at chosen rows, with a backward over the chosen pairs only."""

    @staticmethod
    def forward(ctx, key_factors, value_factors, key, value, key_projections, value_projections, indices):
        by_key, by_value = key_projections.gather(1, indices), value_projections.gather(1, indices)
        ctx.save_for_backward(key_factors, value_factors, key, value, by_key, by_value, indices)
        return by_key * by_value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        key_factors, value_factors, key, value, by_key, by_value, indices = ctx.saved_tensors
        key_grad, value_grad = grad * by_value, grad * by_key
        grads: list[Tensor | None] = [None, None, None, None]
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            pairs = pairs_by_row(indices, key_factors.shape[0])
            grads[0] = sum_outer_at(key_grad, *pairs, key)
            grads[1] = sum_outer_at(value_grad, *pairs, value)
        if ctx.needs_input_grad[2]:
            grads[2] = F.embedding_bag(indices, key_factors, mode="sum", per_sample_weights=key_grad)
        if ctx.needs_input_grad[3]:
            grads[3] = F.embedding_bag(indices, value_factors, mode="sum", per_sample_weights=value_grad)
        return *grads, None, None, None


def bilinear_at(
    key_factors: Float[Tensor, "row d_k"],
    value_factors: Float[Tensor, "row d_v"],
    key: Float[Tensor, "batch d_k"],
    value: Float[Tensor, "batch d_v"],
    key_projections: Float[Tensor, "batch row"],
    value_projections: Float[Tensor, "batch row"],
    indices: Int[Tensor, "batch term"],
) -> Float[Tensor, "batch term"]:
    """(p_i . key)(r_i . value) at the chosen rows i; differentiable once in the first four arguments.

    The projections key @ key_factors^T and value @ value_factors^T are handed in because choosing the rows has
    already cost them. On a GPU a kernel takes the chosen ones again, which is less than reading them back.
    """
    if kernels.use_triton(key_factors, value_factors, widest=None):
        return kernels.bilinear_at(key_factors, value_factors, key, value, indices).type_as(key_factors)
    return _BilinearAt.apply(key_factors, value_factors, key, value, key_projections, value_projections, indices)
