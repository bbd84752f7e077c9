"""Decoder atoms A_i = sum_r v_ir w_ir^T, kept as factors: v in key space, w in value space.

An atom has the shape of a native write, which is why it can be put in a write's place. Its matrix is never formed
except to be looked at: inner products and norms come from the factors,

    <k v^T, A_i> = sum_r (v_ir . k)(w_ir . v)        <A_i, A_j> = sum_rs (v_ir . v_js)(w_ir . w_js)

Training keeps every atom at unit Frobenius norm, so that a coefficient IS the size of what it adds, but nothing that
needs a norm assumes it: a checkpoint may come from elsewhere.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import FactoredMatrix

from writesae.config import WriteSAEConfig


def unit_rows(*shape: int, generator: torch.Generator) -> Float[Tensor, "..."]:
    """Gaussian vectors scaled to unit length along the last axis."""
    rows = torch.randn(*shape, generator=generator)
    return rows / rows.norm(dim=-1, keepdim=True)


def with_leading_term(
    factors: Float[Tensor, "chosen rank d"], directions: Float[Tensor, "chosen d"], further: float = 0.1
) -> Float[Tensor, "chosen rank d"]:
    """The given vectors as first rank, and the old further ranks at length `further`."""
    tiny = torch.finfo(factors.dtype).tiny
    shrunk = further * factors[:, 1:] / factors[:, 1:].norm(dim=-1, keepdim=True).clamp_min(tiny)
    return torch.cat([directions[:, None].to(factors.dtype), shrunk], dim=1)


class OuterProductAtoms(nn.Module):
    """n_atoms sums of `rank` outer products.

    Parameters `key_atoms` [n_atoms, rank, d_k] and `value_atoms` [n_atoms, rank, d_v].
    """

    def __init__(self, config: WriteSAEConfig, generator: torch.Generator):
        super().__init__()
        self.rank = config.rank
        self.key_atoms = nn.Parameter(unit_rows(config.n_atoms, config.rank, config.d_k, generator=generator))
        self.value_atoms = nn.Parameter(unit_rows(config.n_atoms, config.rank, config.d_v, generator=generator))
        self.normalise_()

    def factors_at(
        self, indices: Int[Tensor, "batch k"]
    ) -> tuple[Float[Tensor, "batch term d_k"], Float[Tensor, "batch term d_v"]]:
        """Both factors of the chosen atoms, the ranks of one atom side by side: term = k * rank.

        Rows are gathered like embeddings, so gradients reach the chosen atoms only.
        """
        flat, (batch, k) = indices.reshape(-1), indices.shape
        key_rows, value_rows = self.key_atoms.index_select(0, flat), self.value_atoms.index_select(0, flat)
        return key_rows.view(batch, k * self.rank, key_rows.shape[-1]), value_rows.view(
            batch, k * self.rank, value_rows.shape[-1]
        )

    def per_term(self, per_atom: Float[Tensor, "batch k"]) -> Float[Tensor, "batch term"]:
        """One number per atom repeated for each of its outer products."""
        return per_atom.repeat_interleave(self.rank, dim=1) if self.rank > 1 else per_atom

    def decode(
        self, indices: Int[Tensor, "batch k"], values: Float[Tensor, "batch k"]
    ) -> Float[Tensor, "batch d_k d_v"]:
        """The matrices sum_i a_i A_i, from the active atoms only."""
        key_rows, value_rows = self.factors_at(indices)
        return (key_rows * self.per_term(values)[..., None]).transpose(1, 2) @ value_rows

    def matrix(self, atom: int) -> FactoredMatrix:
        """Atom `atom` as a FactoredMatrix [d_k, d_v] of inner dimension `rank`."""
        return FactoredMatrix(self.key_atoms[atom].detach().T, self.value_atoms[atom].detach())

    def norms(self) -> Float[Tensor, " n_atoms"]:
        """Frobenius norm of every atom, computed from the factors as they are now."""
        if self.rank == 1:
            return (self.key_atoms.norm(dim=-1) * self.value_atoms.norm(dim=-1)).squeeze(-1)
        key_grams = self.key_atoms @ self.key_atoms.transpose(1, 2)
        value_grams = self.value_atoms @ self.value_atoms.transpose(1, 2)
        return (key_grams * value_grams).sum((-1, -2)).clamp_min(0).sqrt()

    def inner_with_matrix(self, matrix: Float[Tensor, "d_k d_v"]) -> Float[Tensor, " n_atoms"]:
        """<matrix, A_i> for every atom."""
        return ((self.key_atoms @ matrix) * self.value_atoms).sum((-1, -2))

    @torch.no_grad()
    def normalise_(self) -> None:
        """Scale every atom to Frobenius norm 1, with both factors of a term equally long; zero terms stay zero.

        For rank 1 this makes both factors unit vectors.
        """
        tiny = torch.finfo(self.key_atoms.dtype).tiny
        key_norms = self.key_atoms.norm(dim=-1, keepdim=True).clamp_min(tiny)
        value_norms = self.value_atoms.norm(dim=-1, keepdim=True).clamp_min(tiny)
        if self.rank == 1:
            self.key_atoms.div_(key_norms)
            self.value_atoms.div_(value_norms)
            return
        balance = (value_norms / key_norms).sqrt()
        shrink = self.norms().clamp_min(tiny).rsqrt()[:, None, None]
        self.key_atoms.mul_(balance * shrink)
        self.value_atoms.mul_(shrink / balance)

    @torch.no_grad()
    def project_gradients_(self) -> None:
        """Remove from each factor's gradient its part along the factor, which the norm constraint would undo."""
        for factor in (self.key_atoms, self.value_atoms):
            if factor.grad is not None:
                squared = factor.square().sum(-1, keepdim=True).clamp_min(torch.finfo(factor.dtype).tiny)
                factor.grad.sub_(factor * ((factor.grad * factor).sum(-1, keepdim=True) / squared))

    @torch.no_grad()
    def reset_(
        self,
        atoms: Int[Tensor, " chosen"],
        key_directions: Float[Tensor, "chosen d_k"],
        value_directions: Float[Tensor, "chosen d_v"],
    ) -> None:
        """Make the chosen atoms the outer products of the given unit vectors.

        Further ranks keep their direction at a small size: a term of two zero factors would never get a gradient again.
        """
        for factor, directions in ((self.key_atoms, key_directions), (self.value_atoms, value_directions)):
            factor[atoms] = with_leading_term(factor[atoms], directions)


DECODERS = {"outer_product": OuterProductAtoms}
