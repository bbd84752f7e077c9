"""A matrix as the sum of a few outer products: a write, an atom, or what is put in a write's place."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_recurrent.display import OneLine


@dataclass(frozen=True, repr=False)
class LowRank(OneLine):
    """A matrix sum_m key_m value_m^T, kept as its factors."""

    key: Float[Tensor, "term d_k"]
    """Key sides."""
    value: Float[Tensor, "term d_v"]
    """Value sides."""

    def norm(self) -> float:
        """Frobenius norm, from the Gram matrices of the factors in float64."""
        key, value = self.key.detach().double(), self.value.detach().double()
        return float(((key @ key.T) * (value @ value.T)).sum().clamp(min=0).sqrt())

    def inner(self, other: "LowRank") -> float:
        """Frobenius inner product."""
        return float(
            ((self.key.double() @ other.key.double().T) * (self.value.double() @ other.value.double().T)).sum()
        )

    def cosine(self, other: "LowRank") -> float:
        """Frobenius cosine; 0 where one of the two is zero."""
        scale = self.norm() * other.norm()
        return self.inner(other) / scale if scale > 0 else 0.0

    def matrix(self) -> Float[Tensor, "d_k d_v"]:
        """The matrix itself."""
        return self.key.T @ self.value

    def to(self, device: torch.device | str) -> "LowRank":
        """The same elsewhere."""
        return LowRank(self.key.to(device), self.value.to(device))

    def times(self, factor: float) -> "LowRank":
        """The matrix scaled."""
        return LowRank(self.key, self.value * factor)

    def at_norm(self, norm: float) -> "LowRank":
        """The matrix rescaled to a Frobenius norm; zero stays zero."""
        own = self.norm()
        return self.times(norm / own if own > 0 else 0.0)
