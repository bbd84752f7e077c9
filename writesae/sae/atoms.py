"""Decoder atoms A_i, whose weighted sum rebuilds a matrix.

Outer products, A_i = sum_r v_ir w_ir^T with v in key space and w in value space, have the shape of a native write, which is
why one can be put in a write's place. Their matrices are never formed except to be looked at: inner products and norms
come from the factors,

    <k v^T, A_i> = sum_r (v_ir . k)(w_ir . v)        <A_i, A_j> = sum_rs (v_ir . v_js)(w_ir . w_js)

Dense atoms are whole matrices: what an ordinary sparse autoencoder has, and the baseline.

Training keeps every atom at unit Frobenius norm, so that a coefficient IS the size of what it adds, but nothing that
needs a norm assumes it: a checkpoint may come from elsewhere.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import FactoredMatrix

import writesae.sae.kernels as kernels
from writesae.config import WriteSAEConfig
from writesae.sae.factored import inner_with_sum, squared_norm_of_sum, squared_norms_at
from writesae.sae.samples import Samples


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


def term_rows(indices: Int[Tensor, "batch k"], rank: int) -> Int[Tensor, "batch term"]:
    """The rows of the chosen atoms where every atom has `rank` rows, the ranks of one atom side by side."""
    if rank == 1:
        return indices
    return (indices[..., None] * rank + torch.arange(rank, device=indices.device)).flatten(1)


def sum_ranks(products: Float[Tensor, "batch row"], rank: int) -> Float[Tensor, "batch n"]:
    """One number per atom from one per row."""
    return products.unflatten(1, (-1, rank)).sum(-1) if rank > 1 else products


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

    @property
    def rows(self) -> tuple[Float[Tensor, "row d_k"], Float[Tensor, "row d_v"]]:
        """Both factors with atoms and ranks in a row."""
        return self.key_atoms.flatten(0, 1), self.value_atoms.flatten(0, 1)

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

    def per_term(self, per_atom: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch term"]:
        """One number per atom repeated for each of its outer products."""
        return per_atom.repeat_interleave(self.rank, dim=-1) if self.rank > 1 else per_atom

    def decode(
        self, indices: Int[Tensor, "batch k"], values: Float[Tensor, "batch k"]
    ) -> Float[Tensor, "batch d_k d_v"]:
        """The matrices sum_i a_i A_i, from the active atoms only."""
        if kernels.use_triton(*self.rows):
            return kernels.decode_at(values, *self.rows, indices, self.rank).type_as(values)
        key_rows, value_rows = self.factors_at(indices)
        return (key_rows * self.per_term(values)[..., None]).transpose(1, 2) @ value_rows

    def inner_at(self, samples: Samples, indices: Int[Tensor, "batch k"]) -> Float[Tensor, "batch k"]:
        """<X, A_i> of the chosen atoms, differentiable in the atoms."""
        return sum_ranks(self._inner_at_terms(samples, indices), self.rank)

    def _inner_at_terms(self, samples: Samples, indices: Tensor) -> Tensor:
        rows, at = self.rows, term_rows(indices, self.rank)
        if not samples.meets_vectors or kernels.use_triton(*rows):
            return samples.inner_with_at(rows, at)
        return samples.inner_with(*self.factors_at(indices), rows, at)

    def squared_errors(
        self, samples: Samples, indices: Int[Tensor, "batch k"], coefficients: Float[Tensor, "batch level k"]
    ) -> Float[Tensor, "batch level"]:
        """|X - sum_i c_i A_i|^2 of every sample and level of coefficients."""
        coefficients, rows, at = self.per_term(coefficients), self.rows, term_rows(indices, self.rank)
        if not samples.meets_vectors or kernels.use_triton(*rows):
            return samples.squared_errors_at(coefficients, rows, at)
        return samples.squared_errors(coefficients, *self.factors_at(indices), rows, at)

    def squared_norms_of(
        self, indices: Int[Tensor, "batch k"], values: Float[Tensor, "batch k"]
    ) -> Float[Tensor, " batch"]:
        """|sum_i a_i A_i|^2."""
        coefficients = self.per_term(values)[:, None]
        if kernels.use_triton(*self.rows):
            return squared_norms_at(coefficients, self.rows, term_rows(indices, self.rank)).squeeze(1)
        return squared_norm_of_sum(coefficients, *self.factors_at(indices)).squeeze(1)

    def inner_with_code(
        self,
        indices: Int[Tensor, "batch k"],
        other_indices: Int[Tensor, "batch other"],
        other_values: Float[Tensor, "batch other"],
    ) -> Float[Tensor, "batch k"]:
        """<A_i, X_hat> of the chosen atoms with the matrix X_hat of another code, which gets no gradient."""
        if kernels.use_triton(*self.rows):
            at, others_at = term_rows(indices, self.rank), term_rows(other_indices, self.rank)
            products = kernels.inner_with_sum_at(*self.rows, at, others_at, self.per_term(other_values))
            return sum_ranks(products.type_as(other_values), self.rank)
        others = (factor.detach() for factor in self.factors_at(other_indices))
        return sum_ranks(
            inner_with_sum(*self.factors_at(indices), self.per_term(other_values.detach()), *others), self.rank
        )

    def matrix(self, atom: int) -> FactoredMatrix:
        """Atom `atom` as a FactoredMatrix [d_k, d_v] of inner dimension `rank`."""
        return FactoredMatrix(self.key_atoms[atom].detach().T, self.value_atoms[atom].detach())

    def matrices(self) -> Float[Tensor, "n_atoms d_k d_v"]:
        """Every atom as a matrix, without history."""
        return (self.key_atoms.transpose(1, 2) @ self.value_atoms).detach()

    def leading_factors(self) -> tuple[Float[Tensor, "n_atoms rank d_k"], Float[Tensor, "n_atoms rank d_v"]]:
        """Copies of the factors, for an encoder to start from."""
        return self.key_atoms.detach().clone(), self.value_atoms.detach().clone()

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

    def project_gradients_(self) -> None:
        """Remove from each factor's gradient its part along the factor, which the norm constraint would undo."""
        for factor in (self.key_atoms, self.value_atoms):
            remove_radial_(factor)

    @torch.no_grad()
    def reset_(
        self,
        atoms: Int[Tensor, " chosen"],
        chosen: Samples,
        leading: tuple[Float[Tensor, "chosen d_k"], Float[Tensor, "chosen d_v"]],
    ) -> None:
        """Make the chosen atoms the outer products of the samples' leading singular vectors.

        Further ranks keep their direction at a small size: a term of two zero factors would never get a gradient again.
        """
        for factor, directions in zip((self.key_atoms, self.value_atoms), leading, strict=True):
            factor[atoms] = with_leading_term(factor[atoms], directions)


@torch.no_grad()
def remove_radial_(factor: nn.Parameter) -> None:
    """Take out of a parameter's gradient, row by row, the part along the row."""
    if factor.grad is not None:
        squared = factor.square().sum(-1, keepdim=True).clamp_min(torch.finfo(factor.dtype).tiny)
        factor.grad.sub_(factor * ((factor.grad * factor).sum(-1, keepdim=True) / squared))


class DenseAtoms(nn.Module):
    """n_atoms whole matrices: parameter `atoms` [n_atoms, d_k, d_v], with the methods of OuterProductAtoms.

    Beside a bilinear encoder they start as random outer products, whose factors the encoder starts from.
    """

    def __init__(self, config: WriteSAEConfig, generator: torch.Generator):
        super().__init__()
        if config.encoder == "bilinear":
            start = OuterProductAtoms(config, generator)
            self._start, atoms = start.leading_factors(), start.matrices()
        else:
            atoms = unit_rows(config.n_atoms, config.d_k * config.d_v, generator=generator)
        self.atoms = nn.Parameter(atoms.reshape(config.n_atoms, config.d_k, config.d_v))

    def leading_factors(self) -> tuple[Float[Tensor, "n_atoms rank d_k"], Float[Tensor, "n_atoms rank d_v"]]:
        """The factors that the atoms started from; handed out once."""
        return self.__dict__.pop("_start")

    def decode(
        self, indices: Int[Tensor, "batch k"], values: Float[Tensor, "batch k"]
    ) -> Float[Tensor, "batch d_k d_v"]:
        """The matrices sum_i a_i A_i, from the active atoms only."""
        atoms = self.atoms.flatten(1)
        if kernels.use_triton(atoms, widest=None):
            flat = kernels.decode_dense_at(values, atoms, indices)
        else:
            flat = F.embedding_bag(indices, atoms, per_sample_weights=values, mode="sum")
        return flat.view(len(indices), *self.atoms.shape[1:])

    def inner_at(self, samples: Samples, indices: Int[Tensor, "batch k"]) -> Float[Tensor, "batch k"]:
        """<X, A_i> of the chosen atoms."""
        return self._inner_with(samples.matrices(), indices)

    def _inner_with(self, x: Float[Tensor, "batch d_k d_v"], indices: Int[Tensor, "batch k"]) -> Tensor:
        atoms = self.atoms.flatten(1)
        if kernels.use_triton(atoms, widest=None):  # products of two projections, one of them that of 1 on 1
            ones = atoms.new_ones(max(len(atoms), len(x)), 1)
            return kernels.bilinear_at(atoms, ones[: len(atoms)], x.flatten(1), ones[: len(x)], indices).type_as(x)
        return torch.stack([(self.atoms[slot] * x).sum((1, 2)) for slot in indices.unbind(1)], dim=1)

    def squared_errors(
        self, samples: Samples, indices: Int[Tensor, "batch k"], coefficients: Float[Tensor, "batch level k"]
    ) -> Float[Tensor, "batch level"]:
        """|X - sum_i c_i A_i|^2 of every sample and level of coefficients."""
        x = samples.matrices()
        levels = [(x - self.decode(indices, level)).square().sum((1, 2)) for level in coefficients.unbind(1)]
        return torch.stack(levels, dim=1)

    def squared_norms_of(
        self, indices: Int[Tensor, "batch k"], values: Float[Tensor, "batch k"]
    ) -> Float[Tensor, " batch"]:
        """|sum_i a_i A_i|^2."""
        return self.decode(indices, values).square().sum((1, 2))

    def inner_with_code(
        self,
        indices: Int[Tensor, "batch k"],
        other_indices: Int[Tensor, "batch other"],
        other_values: Float[Tensor, "batch other"],
    ) -> Float[Tensor, "batch k"]:
        """<A_i, X_hat> of the chosen atoms with the matrix X_hat of another code, which gets no gradient."""
        return self._inner_with(self.decode(other_indices, other_values).detach(), indices)

    def matrix(self, atom: int) -> FactoredMatrix:
        """Atom `atom` as a FactoredMatrix [d_k, d_v], by its singular value decomposition."""
        u, s, vh = torch.linalg.svd(self.atoms[atom].detach(), full_matrices=False)
        return FactoredMatrix(u * s, vh)

    def matrices(self) -> Float[Tensor, "n_atoms d_k d_v"]:
        """Every atom as a matrix, without history."""
        return self.atoms.detach().clone()

    def norms(self) -> Float[Tensor, " n_atoms"]:
        """Frobenius norm of every atom."""
        return self.atoms.flatten(1).norm(dim=1)

    def inner_with_matrix(self, matrix: Float[Tensor, "d_k d_v"]) -> Float[Tensor, " n_atoms"]:
        """<matrix, A_i> for every atom."""
        return (self.atoms * matrix).sum((1, 2))

    @torch.no_grad()
    def normalise_(self) -> None:
        """Scale every atom to Frobenius norm 1; a zero atom stays zero."""
        self.atoms.div_(self.norms().clamp_min(torch.finfo(self.atoms.dtype).tiny)[:, None, None])

    @torch.no_grad()
    def project_gradients_(self) -> None:
        """Remove from the gradient its part along the atom, which the norm constraint would undo."""
        if self.atoms.grad is not None:
            squared = self.norms().square().clamp_min(torch.finfo(self.atoms.dtype).tiny)
            along = (self.atoms.grad * self.atoms).sum((1, 2)) / squared
            self.atoms.grad.sub_(self.atoms * along[:, None, None])

    @torch.no_grad()
    def reset_(
        self,
        atoms: Int[Tensor, " chosen"],
        chosen: Samples,
        leading: tuple[Float[Tensor, "chosen d_k"], Float[Tensor, "chosen d_v"]],
    ) -> None:
        """Make the chosen atoms the samples themselves, at unit norm."""
        self.atoms[atoms] = F.normalize(chosen.matrices().flatten(1), dim=1).view_as(self.atoms[atoms])


DECODERS: dict[str, type[OuterProductAtoms] | type[DenseAtoms]] = {
    "outer_product": OuterProductAtoms,
    "dense": DenseAtoms,
}
