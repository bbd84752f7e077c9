"""The kernels' functions in plain torch, differentiable: gather the chosen rows, then the sums of `factored.py`.

They hold [batch, term, d] in memory, which the kernels are there to avoid, and serve any device and dtype.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.sae.factored import inner_with_sum, squared_norm_of_sum


def squared_norm_at(
    coefficients: Float[Tensor, "batch level term"],
    key_atoms: Float[Tensor, "row d_k"],
    value_atoms: Float[Tensor, "row d_v"],
    indices: Int[Tensor, "batch term"],
    extra_key: Float[Tensor, "batch extra d_k"],
    extra_value: Float[Tensor, "batch extra d_v"],
    extra_coefficients: Float[Tensor, "batch level extra"],
) -> Float[Tensor, "batch level"]:
    """|sum_i c_i v_i w_i^T + the extra terms|^2 of every sample and level."""
    every = torch.cat([coefficients, extra_coefficients], dim=2)
    left = torch.cat([key_atoms[indices], extra_key], dim=1)
    right = torch.cat([value_atoms[indices], extra_value], dim=1)
    return squared_norm_of_sum(every, left, right)


def inner_with_sum_at(
    key_atoms: Float[Tensor, "row d_k"],
    value_atoms: Float[Tensor, "row d_v"],
    indices: Int[Tensor, "batch term"],
    others: Int[Tensor, "batch other"],
    other_coefficients: Float[Tensor, "batch other"],
) -> Float[Tensor, "batch term"]:
    """<A_i, sum_j c_j A_j> of chosen rows i with a sum over other rows j, which gets no gradient."""
    fixed = other_coefficients.detach(), key_atoms.detach()[others], value_atoms.detach()[others]
    return inner_with_sum(key_atoms[indices], value_atoms[indices], *fixed)


def bilinear_at(
    key_factors: Float[Tensor, "row d_k"],
    value_factors: Float[Tensor, "row d_v"],
    key: Float[Tensor, "batch d_k"],
    value: Float[Tensor, "batch d_v"],
    indices: Int[Tensor, "batch term"],
) -> Float[Tensor, "batch term"]:
    """(p_i . key)(r_i . value) at the chosen rows i."""
    by_key = (key_factors[indices] @ key[:, :, None]).squeeze(-1)
    return by_key * (value_factors[indices] @ value[:, :, None]).squeeze(-1)


def decode_at(
    values: Float[Tensor, "batch chosen"],
    key_atoms: Float[Tensor, "row d_k"],
    value_atoms: Float[Tensor, "row d_v"],
    indices: Int[Tensor, "batch chosen"],
    rank: int = 1,
) -> Float[Tensor, "batch d_k d_v"]:
    """sum_i a_i A_i, where atom i has the rows i * rank .. i * rank + rank - 1."""
    weights, rows = per_term(values, indices, rank)
    return (key_atoms[rows] * weights[..., None]).transpose(1, 2) @ value_atoms[rows]


def decode_dense_at(
    values: Float[Tensor, "batch chosen"], atoms: Float[Tensor, "row d"], indices: Int[Tensor, "batch chosen"]
) -> Float[Tensor, "batch d"]:
    """sum_i a_i A_i of atoms that are rows."""
    return (values[:, None, :] @ atoms[indices]).squeeze(1)


def inner_of_matrices_at(
    matrices: Float[Tensor, "batch d_k d_v"],
    key_atoms: Float[Tensor, "row d_k"],
    value_atoms: Float[Tensor, "row d_v"],
    indices: Int[Tensor, "batch term"],
) -> Float[Tensor, "batch term"]:
    """v_i^T X w_i at the chosen rows i."""
    return ((key_atoms[indices] @ matrices) * value_atoms[indices]).sum(-1)


def per_term(
    values: Float[Tensor, "batch chosen"], indices: Int[Tensor, "batch chosen"], rank: int
) -> tuple[Float[Tensor, "batch term"], Int[Tensor, "batch term"]]:
    """An atom's number for each of its rows, and which rows these are, the ranks of one atom side by side."""
    if rank == 1:
        return values, indices
    rows = (indices[..., None] * rank + torch.arange(rank, device=indices.device)).flatten(1)
    return values.repeat_interleave(rank, dim=1), rows
