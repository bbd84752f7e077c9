"""Encoders: how strongly every atom answers to a matrix, before the sparsifier. All numbers are in scaled units.

    bilinear   z_i = sum_r p_ir^T X r_ir + c_i     two vectors per atom (and rank); for a write X = k v^T this is
                                                   (p_i . k)(r_i . v): two products over the dictionary, and no matrix
    tied       the same with p = v, r = w, the decoder's own factors, so only the biases are its own
    linear     z_i = <E_i, X> + c_i                a whole matrix per atom, at the cost of whole matrices

The bilinear factors are untied from the decoder's, so an atom may listen for something else than what it writes; they start
out equal. All atoms are scored to find the active ones; only these get a gradient.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hooked_recurrent.display import OneLine
from writesae.config import WriteSAEConfig
from writesae.sae.atoms import DenseAtoms, OuterProductAtoms, sum_ranks, term_rows, with_leading_term
from writesae.sae.factored import pairs_by_row, sum_outer_at
from writesae.sae.samples import Inner, Samples

Decoder = OuterProductAtoms | DenseAtoms


@dataclass(frozen=True, repr=False)
class Scores(OneLine):
    """What scoring the whole dictionary leaves behind; none of it carries a gradient."""

    scores: Float[Tensor, "sample n_atoms"]
    """z_i of every atom."""
    inner: Inner
    """The inner products that they are made of."""


class Encoder(nn.Module, ABC):
    """Base: an optional bias per atom. `biased=False` leaves biases to the sparsifier."""

    bias: nn.Parameter | None

    def __init__(self, n_atoms: int, biased: bool):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(n_atoms)) if biased else None

    @abstractmethod
    def inner(self, samples: Samples) -> tuple[Float[Tensor, "sample n_atoms"], Inner]:
        """Scores without bias and without gradient, and what they are made of."""

    @abstractmethod
    def inner_at(
        self, indices: Int[Tensor, "sample chosen"], samples: Samples, inner: Inner
    ) -> Float[Tensor, "sample chosen"]:
        """Scores of the chosen atoms without bias, with gradients at the cost of the chosen atoms."""

    @abstractmethod
    def of_matrix(self, matrix: Float[Tensor, "d_k d_v"]) -> Float[Tensor, " n_atoms"]:
        """Scores of one matrix, without bias."""

    @abstractmethod
    def amplify_(self, factor: Float[Tensor, ""]) -> bool:
        """Multiply every score by a positive factor; False where the encoder cannot (its factors are the decoder's)."""

    @abstractmethod
    def point_(
        self,
        atoms: Int[Tensor, " chosen"],
        chosen: Samples,
        leading: tuple[Float[Tensor, "chosen d_k"], Float[Tensor, "chosen d_v"]],
        alive: Int[Tensor, " alive"],
        shrink: float,
    ) -> None:
        """Point the chosen atoms at the given samples, at `shrink` times the mean length of the living."""

    @torch.no_grad()
    def project(self, samples: Samples) -> Scores:
        """Score every atom, without gradient."""
        scores, inner = self.inner(samples)
        return Scores(scores if self.bias is None else scores + self.bias, inner)

    def at(
        self, indices: Int[Tensor, "sample chosen"], samples: Samples, scores: Scores
    ) -> Float[Tensor, "sample chosen"]:
        """Scores of the chosen atoms only, with gradients."""
        found = self.inner_at(indices, samples, scores.inner)
        if self.bias is None:
            return found
        return found + self.bias.index_select(0, indices.reshape(-1)).view(indices.shape)

    @torch.no_grad()
    def reset_(
        self,
        atoms: Int[Tensor, " chosen"],
        chosen: Samples,
        leading: tuple[Float[Tensor, "chosen d_k"], Float[Tensor, "chosen d_v"]],
        alive: Int[Tensor, " alive"],
        shrink: float,
    ) -> None:
        """Point the chosen atoms at samples, at `shrink` times the mean length of the living, with bias 0.

        Small, so that a moved atom has to earn its place (Bricken et al. 2023); without living atoms the length is
        `shrink`.
        """
        self.point_(atoms, chosen, leading, alive, shrink)
        if self.bias is not None:
            self.bias[atoms] = 0.0


def _mean_length(factor: Tensor, alive: Tensor) -> Tensor:
    return factor[alive].norm(dim=-1).mean() if len(alive) else factor.new_ones(())


class BilinearEncoder(Encoder):
    """`key_factors` [n_atoms, rank, d_k], `value_factors` [n_atoms, rank, d_v]."""

    def __init__(self, config: WriteSAEConfig, decoder: Decoder, biased: bool):
        super().__init__(config.n_atoms, biased)
        self.rank = config.rank
        key_atoms, value_atoms = decoder.leading_factors()
        self.key_factors, self.value_factors = nn.Parameter(key_atoms), nn.Parameter(value_atoms)

    def inner(self, samples: Samples) -> tuple[Float[Tensor, "sample n_atoms"], Inner]:
        inner = samples.inner(self.key_factors.flatten(0, 1), self.value_factors.flatten(0, 1))
        return sum_ranks(inner.scores, self.rank), inner

    def inner_at(
        self, indices: Int[Tensor, "sample chosen"], samples: Samples, inner: Inner
    ) -> Float[Tensor, "sample chosen"]:
        factors = self.key_factors.flatten(0, 1), self.value_factors.flatten(0, 1)
        return sum_ranks(samples.inner_at(*factors, inner, term_rows(indices, self.rank)), self.rank)

    def of_matrix(self, matrix: Float[Tensor, "d_k d_v"]) -> Float[Tensor, " n_atoms"]:
        return ((self.key_factors @ matrix) * self.value_factors).sum((-1, -2))

    @torch.no_grad()
    def amplify_(self, factor: Float[Tensor, ""]) -> bool:
        self.key_factors.mul_(factor.sqrt())
        self.value_factors.mul_(factor.sqrt())
        return True

    def point_(self, atoms, chosen, leading, alive, shrink) -> None:
        for factor, directions in zip((self.key_factors, self.value_factors), leading, strict=True):
            length = shrink * _mean_length(factor, alive)
            factor[atoms] = length * with_leading_term(factor[atoms], directions)


class TiedEncoder(Encoder):
    """The decoder's atoms are what it listens for: z_i = <X, A_i> + c_i."""

    def __init__(self, config: WriteSAEConfig, decoder: Decoder, biased: bool):
        super().__init__(config.n_atoms, biased)
        self.rank = config.rank
        self._decoder = (decoder,)  # in a tuple, so that its parameters are not registered twice

    @property
    def factors(self) -> tuple[Float[Tensor, "row d_k"], Float[Tensor, "row d_v"]]:
        """The decoder's factors, all ranks in a row."""
        return self._decoder[0].rows

    def inner(self, samples: Samples) -> tuple[Float[Tensor, "sample n_atoms"], Inner]:
        inner = samples.inner(*self.factors)
        return sum_ranks(inner.scores, self.rank), inner

    def inner_at(
        self, indices: Int[Tensor, "sample chosen"], samples: Samples, inner: Inner
    ) -> Float[Tensor, "sample chosen"]:
        return sum_ranks(samples.inner_at(*self.factors, inner, term_rows(indices, self.rank)), self.rank)

    def of_matrix(self, matrix: Float[Tensor, "d_k d_v"]) -> Float[Tensor, " n_atoms"]:
        return self._decoder[0].inner_with_matrix(matrix)

    def amplify_(self, factor: Float[Tensor, ""]) -> bool:
        return False

    def point_(self, atoms, chosen, leading, alive, shrink) -> None:
        """The decoder has been pointed already, at unit length."""


class _LinearAt(torch.autograd.Function):
    """Chosen scores of a linear map that have been computed already, with a backward over the chosen pairs only."""

    @staticmethod
    def forward(ctx, weight, x, scores, indices):
        ctx.save_for_backward(x, indices)
        ctx.n_rows = weight.shape[0]
        return scores.gather(1, indices).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, indices = ctx.saved_tensors
        return sum_outer_at(grad, *pairs_by_row(indices, ctx.n_rows), x), None, None, None


class LinearEncoder(Encoder):
    """A whole matrix per atom: `weight` [n_atoms, d_k, d_v]. It starts as the decoder's atoms."""

    def __init__(self, config: WriteSAEConfig, decoder: Decoder, biased: bool):
        super().__init__(config.n_atoms, biased)
        self.weight = nn.Parameter(decoder.matrices())

    def inner(self, samples: Samples) -> tuple[Float[Tensor, "sample n_atoms"], Inner]:
        x = samples.matrices().flatten(1)
        scores = x @ self.weight.flatten(1).T
        return scores, Inner(scores, (x,))

    def inner_at(
        self, indices: Int[Tensor, "sample chosen"], samples: Samples, inner: Inner
    ) -> Float[Tensor, "sample chosen"]:
        return _LinearAt.apply(self.weight.flatten(1), inner.kept[0], inner.scores, indices)

    def of_matrix(self, matrix: Float[Tensor, "d_k d_v"]) -> Float[Tensor, " n_atoms"]:
        return (self.weight * matrix).sum((1, 2))

    @torch.no_grad()
    def amplify_(self, factor: Float[Tensor, ""]) -> bool:
        self.weight.mul_(factor)
        return True

    def point_(self, atoms, chosen, leading, alive, shrink) -> None:
        length = shrink * _mean_length(self.weight.flatten(1), alive)
        self.weight[atoms] = length * F.normalize(chosen.matrices().flatten(1), dim=1).view_as(self.weight[atoms])


ENCODERS: dict[str, Callable[[WriteSAEConfig, Decoder, bool], Encoder]] = {
    "bilinear": BilinearEncoder,
    "tied": TiedEncoder,
    "linear": LinearEncoder,
}
