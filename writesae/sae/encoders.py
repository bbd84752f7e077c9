"""Encoders: how strongly every atom answers to a matrix, before the sparsifier.

The bilinear encoder reads a matrix X with two vectors per atom, z_i = sum_r p_ir^T X r_ir + c_i. For a write X = k
v^T this is

    z_i = sum_r (p_ir . k)(r_ir . v) + c_i

two matrix products over the whole dictionary, and no matrix of the write. p and r are untied from the decoder's
factors, so an atom may listen for something else than what it writes; they start out equal.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from writesae.config import WriteSAEConfig
from writesae.sae.atoms import with_leading_term
from writesae.sae.factored import bilinear_at


@dataclass(frozen=True)
class Projections:
    """What scoring the whole dictionary leaves behind; none of it carries a gradient."""

    by_key: Float[Tensor, "batch row"]
    """p_ir . k, one row per atom and rank."""
    by_value: Float[Tensor, "batch row"]
    """r_ir . v, likewise."""
    scores: Float[Tensor, "batch n_atoms"]
    """z_i of every atom."""


class BilinearEncoder(nn.Module):
    """Two vectors and a bias per atom: `key_factors` [n_atoms, rank, d_k], `value_factors` [n_atoms, rank, d_v],
    `bias`.

    The bias is learned in scaled units; every method takes `bias_scale`, which turns it into the units of its input.
    """

    def __init__(self, config: WriteSAEConfig, key_atoms: Tensor, value_atoms: Tensor):
        super().__init__()
        self.rank = config.rank
        self.key_factors = nn.Parameter(key_atoms.detach().clone())
        self.value_factors = nn.Parameter(value_atoms.detach().clone())
        self.bias = nn.Parameter(torch.zeros(config.n_atoms))

    def _sum_ranks(self, products: Float[Tensor, "batch row"]) -> Float[Tensor, "batch n"]:
        return products.unflatten(1, (-1, self.rank)).sum(-1) if self.rank > 1 else products

    @torch.no_grad()
    def project(
        self, key: Float[Tensor, "batch d_k"], value: Float[Tensor, "batch d_v"], bias_scale: Float[Tensor, ""]
    ) -> Projections:
        """Score every atom, without gradient."""
        by_key, by_value = key @ self.key_factors.flatten(0, 1).T, value @ self.value_factors.flatten(0, 1).T
        return Projections(by_key, by_value, self._sum_ranks(by_key * by_value) + self.bias * bias_scale)

    def at(
        self,
        indices: Int[Tensor, "batch k"],
        key: Float[Tensor, "batch d_k"],
        value: Float[Tensor, "batch d_v"],
        projections: Projections,
        bias_scale: Float[Tensor, ""],
    ) -> Float[Tensor, "batch k"]:
        """Scores of the chosen atoms only, with gradients at the cost of the chosen atoms."""
        rows = indices
        if self.rank > 1:
            rows = (indices[..., None] * self.rank + torch.arange(self.rank, device=indices.device)).flatten(1)
        factors = self.key_factors.flatten(0, 1), self.value_factors.flatten(0, 1)
        products = bilinear_at(*factors, key, value, projections.by_key, projections.by_value, rows)
        biases = self.bias.index_select(0, indices.reshape(-1)).view(indices.shape)
        return self._sum_ranks(products) + biases * bias_scale

    def scores_of_matrix(
        self, x: Float[Tensor, "batch d_k d_v"], bias_scale: Float[Tensor, ""]
    ) -> Float[Tensor, "batch n_atoms"]:
        """Scores of any matrices, by the definition; the reference, and the path of matrices without factors."""
        products = torch.einsum("nrk,bkv,nrv->bn", self.key_factors, x, self.value_factors)
        return products + self.bias * bias_scale

    @torch.no_grad()
    def absorb_mean_(self, mean: Float[Tensor, "d_k d_v"], scale: Float[Tensor, ""]) -> None:
        """Start the biases at -p_i^T M r_i, so that at first the encoder sees the centred matrices."""
        self.bias.copy_(-((self.key_factors @ mean) * self.value_factors).sum((-1, -2)) * scale)

    @torch.no_grad()
    def amplify_(self, factor: Float[Tensor, ""]) -> None:
        """Multiply every score by a positive factor."""
        self.key_factors.mul_(factor.sqrt())
        self.value_factors.mul_(factor.sqrt())
        self.bias.mul_(factor)

    @torch.no_grad()
    def reset_(
        self,
        atoms: Int[Tensor, " chosen"],
        key_directions: Float[Tensor, "chosen d_k"],
        value_directions: Float[Tensor, "chosen d_v"],
        alive: Int[Tensor, " alive"],
        shrink: float,
    ) -> None:
        """Point the chosen atoms at the given unit vectors, at `shrink` times the mean length of the living factors.

        Small, so that a moved atom has to earn its place (Bricken et al. 2023); without living atoms the length is
        `shrink`.
        """
        for factor, directions in ((self.key_factors, key_directions), (self.value_factors, value_directions)):
            length = factor[alive].norm(dim=-1).mean() if len(alive) else factor.new_ones(())
            factor[atoms] = shrink * length * with_leading_term(factor[atoms], directions)
        self.bias[atoms] = 0.0


ENCODERS = {"bilinear": BilinearEncoder}
