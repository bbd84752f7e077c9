"""Samples whose errors do not all count alike."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.sae.samples import Factored, Rows, Sides


class Weighted(Factored):
    """Sums of outer products whose squared errors count `weight` [sample] times; all else is as without weights."""

    def __init__(
        self,
        key: Float[Tensor, "sample *term d_k"],
        value: Float[Tensor, "same *terms d_v"],
        weight: Float[Tensor, " sample"],
    ):
        super().__init__(key, value)
        self.weight = weight

    @staticmethod
    def relative(samples: Factored, floor: float = 0.01) -> "Weighted":
        """Errors relative to the sample's own size: |X - X_hat|^2 / (|X|^2 + floor * mean |X|^2), times that mean."""
        norms = samples.squared_norms()
        mean = norms.mean()
        return Weighted(
            samples.key, samples.value, mean / (norms + floor * mean).clamp_min(torch.finfo(norms.dtype).tiny)
        )

    def scaled(self, factor: Float[Tensor, ""] | float) -> "Weighted":
        """Every matrix times `factor`; the weights stay."""
        return Weighted(self.key, self.value * factor, self.weight)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Weighted":
        """The same samples elsewhere or in another type."""
        moved = (side.to(device=device or side.device, dtype=dtype or side.dtype) for side in self._parts())
        return Weighted(*moved)

    def take(self, rows: Rows) -> "Weighted":
        """The chosen samples with their weights."""
        return Weighted(*(part[rows] for part in self._parts()))

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.key, self.value, self.weight

    def squared_errors(
        self,
        coefficients: Float[Tensor, "sample level term"],
        left: Float[Tensor, "sample term d_k"],
        right: Float[Tensor, "sample term d_v"],
        rows: Sides,
        indices: Int[Tensor, "sample term"],
    ) -> Float[Tensor, "sample level"]:
        """|X - sum|^2 times the weight."""
        return super().squared_errors(coefficients, left, right, rows, indices) * self.weight[:, None]

    def squared_errors_at(
        self, coefficients: Float[Tensor, "sample level term"], rows: Sides, indices: Int[Tensor, "sample term"]
    ) -> Float[Tensor, "sample level"]:
        """The same by rows that no one has gathered."""
        return super().squared_errors_at(coefficients, rows, indices) * self.weight[:, None]
