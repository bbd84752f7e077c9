"""What a dictionary learns from: batches of matrices X_1..X_n [d_k, d_v] that are known by their inner products.

An encoder asks p^T X r, a decoder <X, v w^T> and |X|^2. Whoever answers these never has to be a matrix:

    Factored     X = sum_m key_m value_m^T: writes (one term) and net writes (two where erase and write keys differ)
    Vectors      X = x as a column [d, 1]: any vector hook, and the dictionary is an ordinary sparse autoencoder
    Matrices     X itself: the reference, and the way of whatever has no factors
    StateSequences (states.py)   every state of whole passages under scalar decay, by running sums

Everything is written once for all of them. Samples never need gradients; dictionaries do.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

import writesae.sae.kernels as kernels
from hooked_recurrent.display import OneLine
from writesae.sae.factored import (
    bilinear_at,
    inner_with_sum,
    matrix_is_cheaper,
    squared_norm_of_sum,
    squared_norms_at,
)

Rows = Int[Tensor, " chosen"] | slice
Sides = tuple[Float[Tensor, "row d_k"], Float[Tensor, "row d_v"]]


@dataclass(frozen=True, repr=False)
class Inner(OneLine):
    """Inner products of all samples with all rows l_i r_i^T; none of it carries a gradient."""

    scores: Float[Tensor, "sample row"]
    """l_i^T X r_i."""
    kept: tuple[Tensor, ...] = ()
    """What the samples want to have at hand when they are asked again at chosen rows."""


class Samples(ABC):
    """n matrices [d_k, d_v]. Subclasses answer the questions below at the least cost that they know."""

    d_k: int
    d_v: int
    meets_vectors = True
    """Whether the samples are best asked with vectors gathered for each of them, rather than with rows for all."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of matrices."""

    def __repr__(self) -> str:
        """One line: how many matrices of which shape, type and place."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{type(self).__name__}({len(self):,} matrices {self.d_k} x {self.d_v}, {dtype} on {self.device})"

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Type of the numbers."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the numbers are."""

    @abstractmethod
    def scaled(self, factor: Float[Tensor, ""] | float) -> "Samples":
        """Every matrix times `factor`."""

    @abstractmethod
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Samples":
        """The same samples elsewhere or in another type."""

    @abstractmethod
    def take(self, rows: Rows) -> "Samples":
        """The chosen samples, in the order of `rows`."""

    @abstractmethod
    def inner(self, left: Float[Tensor, "row d_k"], right: Float[Tensor, "row d_v"]) -> Inner:
        """left_i^T X right_i of every sample and row, without gradient."""

    @abstractmethod
    def inner_at(
        self,
        left: Float[Tensor, "row d_k"],
        right: Float[Tensor, "row d_v"],
        inner: Inner,
        indices: Int[Tensor, "sample chosen"],
    ) -> Float[Tensor, "sample chosen"]:
        """The same at chosen rows, differentiable once in `left` and `right`; `inner` is of the same left and right."""

    @abstractmethod
    def inner_with_matrix(self, matrix: Float[Tensor, "d_k d_v"]) -> Float[Tensor, " sample"]:
        """<X, matrix> of every sample."""

    @abstractmethod
    def squared_norms(self) -> Float[Tensor, " sample"]:
        """|X|^2 of every sample (Frobenius)."""

    @abstractmethod
    def matrices(self) -> Float[Tensor, "sample d_k d_v"]:
        """The matrices themselves: for references and dense dictionaries."""

    @abstractmethod
    def mean(self) -> Float[Tensor, "d_k d_v"]:
        """Mean of the matrices, in float64."""

    def leading(self, rows: Int[Tensor, " chosen"]) -> tuple[Float[Tensor, "chosen d_k"], Float[Tensor, "chosen d_v"]]:
        """Unit leading singular vectors (u_1, v_1) of the chosen samples; zero where a sample is zero."""
        if len(rows) == 0:
            return torch.zeros(0, self.d_k, dtype=self.dtype), torch.zeros(0, self.d_v, dtype=self.dtype)
        u, s, vh = torch.linalg.svd(self.take(rows).matrices(), full_matrices=False)
        there = (s[:, :1] > 0).to(u.dtype)
        return u[:, :, 0] * there, vh[:, 0] * there

    def inner_with(
        self,
        left: Float[Tensor, "sample term d_k"],
        right: Float[Tensor, "sample term d_v"],
        rows: Sides,
        indices: Int[Tensor, "sample term"],
    ) -> Float[Tensor, "sample term"]:
        """<X, l_j r_j^T> of every sample with vectors of its own, which are `rows[..][indices]`; differentiable in them.

        Samples choose what is cheaper for them: the vectors, or all rows at once.
        """
        return self.inner_at(*rows, self.inner(*rows), indices)

    def squared_errors(
        self,
        coefficients: Float[Tensor, "sample level term"],
        left: Float[Tensor, "sample term d_k"],
        right: Float[Tensor, "sample term d_v"],
        rows: Sides,
        indices: Int[Tensor, "sample term"],
    ) -> Float[Tensor, "sample level"]:
        """|X - sum_j c_j l_j r_j^T|^2 for every level of coefficients: |X|^2 - 2 c . <X, l r^T> + |sum|^2."""
        crossed = (coefficients * self.inner_with(left, right, rows, indices)[:, None]).sum(2)
        return self.squared_norms()[:, None] - 2 * crossed + squared_norm_of_sum(coefficients, left, right)

    def inner_with_at(self, rows: Sides, indices: Int[Tensor, "sample term"]) -> Float[Tensor, "sample term"]:
        """`inner_with` of rows that no one has gathered."""
        return self.inner_at(*rows, self.inner(*rows), indices)

    def squared_errors_at(
        self, coefficients: Float[Tensor, "sample level term"], rows: Sides, indices: Int[Tensor, "sample term"]
    ) -> Float[Tensor, "sample level"]:
        """`squared_errors` by rows that no one has gathered."""
        crossed = (coefficients * self.inner_with_at(rows, indices)[:, None]).sum(2)
        return self.squared_norms()[:, None] - 2 * crossed + squared_norms_at(coefficients, rows, indices)

    def blocks(self, size: int) -> Iterator["Samples"]:
        """The samples in order, at most `size` at a time (kinds that cannot be cut there may give more)."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))


class Factored(Samples):
    """Sums of outer products X = sum_m key_m value_m^T. `key` is [sample, d_k] or [sample, term, d_k], `value` alike."""

    def __init__(self, key: Float[Tensor, "sample *term d_k"], value: Float[Tensor, "same *terms d_v"]):
        if key.ndim not in (2, 3) or key.shape[:-1] != value.shape[:-1]:
            came = f"{tuple(key.shape)} and {tuple(value.shape)}"
            raise ValueError(f"factors must be [sample, d] or [sample, term, d] with the same leading axes, got {came}")
        self.key, self.value = (side[:, None] if side.ndim == 2 else side for side in (key, value))
        self.d_k, self.d_v, self.terms = key.shape[-1], value.shape[-1], self.key.shape[1]

    def __len__(self) -> int:
        return len(self.key)

    @property
    def dtype(self) -> torch.dtype:
        return self.key.dtype

    @property
    def device(self) -> torch.device:
        return self.key.device

    def scaled(self, factor: Float[Tensor, ""] | float) -> "Factored":
        return type(self)._of(self.key, self.value * factor)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Factored":
        moved = (side.to(device=device or side.device, dtype=dtype or side.dtype) for side in (self.key, self.value))
        return type(self)._of(*moved)

    def take(self, rows: Rows) -> "Factored":
        return type(self)._of(self.key[rows], self.value[rows])

    @classmethod
    def _of(cls, key: Tensor, value: Tensor) -> "Factored":
        return cls(key, value)

    @torch.no_grad()
    def inner(self, left: Float[Tensor, "row d_k"], right: Float[Tensor, "row d_v"]) -> Inner:
        by_key, by_value = self.key.flatten(0, 1) @ left.T, self.value.flatten(0, 1) @ right.T
        return Inner(self._sum_terms(by_key * by_value), (by_key, by_value))

    def inner_at(
        self,
        left: Float[Tensor, "row d_k"],
        right: Float[Tensor, "row d_v"],
        inner: Inner,
        indices: Int[Tensor, "sample chosen"],
    ) -> Float[Tensor, "sample chosen"]:
        if kernels.use_triton(left, right, widest=None):
            return self.inner_with_at((left, right), indices)
        if inner.kept[0].dtype != self.dtype:  # scored in a narrower type: good enough to choose by, not to learn from
            return self.inner_with(left[indices], right[indices], (left, right), indices)
        by_term = indices.repeat_interleave(self.terms, 0) if self.terms > 1 else indices
        key, value, (by_key, by_value) = self.key.flatten(0, 1), self.value.flatten(0, 1), inner.kept
        products = bilinear_at(left, right, key, value, by_key, by_value, by_term)
        return self._sum_terms(products)

    def inner_with(
        self,
        left: Float[Tensor, "sample term d_k"],
        right: Float[Tensor, "sample term d_v"],
        rows: Sides,
        indices: Int[Tensor, "sample term"],
    ) -> Float[Tensor, "sample term"]:
        return inner_with_sum(left, right, self.key.new_ones(len(self), self.terms), self.key, self.value)

    def inner_with_at(self, rows: Sides, indices: Int[Tensor, "sample term"]) -> Float[Tensor, "sample term"]:
        by_term = indices.repeat_interleave(self.terms, 0) if self.terms > 1 else indices
        products = kernels.bilinear_at(*rows, self.key.flatten(0, 1), self.value.flatten(0, 1), by_term)
        return self._sum_terms(products.type_as(rows[0]))

    def _sum_terms(self, products: Tensor) -> Tensor:
        return products if self.terms == 1 else products.view(len(self), self.terms, -1).sum(1)

    def inner_with_matrix(self, matrix: Float[Tensor, "d_k d_v"]) -> Float[Tensor, " sample"]:
        return ((self.key @ matrix) * self.value).sum((1, 2))

    def squared_norms(self) -> Float[Tensor, " sample"]:
        if self.terms == 1:
            return (self.key.square().sum(-1) * self.value.square().sum(-1)).squeeze(1)
        return squared_norm_of_sum(self.key.new_ones(len(self), 1, self.terms), self.key, self.value).squeeze(1)

    def matrices(self) -> Float[Tensor, "sample d_k d_v"]:
        return self.key.transpose(1, 2) @ self.value

    def mean(self) -> Float[Tensor, "d_k d_v"]:
        return self.key.double().flatten(0, 1).T @ self.value.double().flatten(0, 1) / max(len(self), 1)

    def leading(self, rows: Int[Tensor, " chosen"]) -> tuple[Float[Tensor, "chosen d_k"], Float[Tensor, "chosen d_v"]]:
        """A single term is its own decomposition."""
        if self.terms > 1:
            return super().leading(rows)
        sides = (torch.nn.functional.normalize(side[rows, 0], dim=-1) for side in (self.key, self.value))
        key, value = sides
        return key, value

    def squared_errors(
        self,
        coefficients: Float[Tensor, "sample level term"],
        left: Float[Tensor, "sample term d_k"],
        right: Float[Tensor, "sample term d_v"],
        rows: Sides,
        indices: Int[Tensor, "sample term"],
    ) -> Float[Tensor, "sample level"]:
        """The residual is a sum of outer products itself: one pair of Gram matrices holds everything."""
        ones = coefficients.new_ones(*coefficients.shape[:2], self.terms)
        both = torch.cat([ones, -coefficients], dim=2)
        return squared_norm_of_sum(both, torch.cat([self.key, left], dim=1), torch.cat([self.value, right], dim=1))

    def squared_errors_at(
        self, coefficients: Float[Tensor, "sample level term"], rows: Sides, indices: Int[Tensor, "sample term"]
    ) -> Float[Tensor, "sample level"]:
        if matrix_is_cheaper(indices.shape[1] + self.terms, self.d_k, self.d_v):
            return Matrices(self.matrices()).squared_errors_at(coefficients, rows, indices)
        ones = coefficients.new_ones(*coefficients.shape[:2], self.terms)
        found = kernels.squared_norm_at(-coefficients, *rows, indices, self.key, self.value, ones)
        return found.type_as(coefficients)


class Vectors(Factored):
    """Vectors x [sample, d] as matrices of one column, [d, 1]: the activations of any vector hook."""

    def __init__(self, x: Float[Tensor, "sample d"]):
        super().__init__(x, x.new_ones(len(x), 1))

    @classmethod
    def _of(cls, key: Tensor, value: Tensor) -> "Factored":
        return Factored(key, value)


class Matrices(Samples):
    """Matrices as they are, [sample, d_k, d_v]."""

    def __init__(self, x: Float[Tensor, "sample *d_k_d_v"]):
        if x.ndim != 3:
            raise ValueError(f"matrices must be [sample, d_k, d_v], got shape {tuple(x.shape)}")
        self.x = x
        self.d_k, self.d_v = x.shape[1:]

    def __len__(self) -> int:
        return len(self.x)

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device

    def scaled(self, factor: Float[Tensor, ""] | float) -> "Matrices":
        return Matrices(self.x * factor)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Matrices":
        return Matrices(self.x.to(device=device or self.device, dtype=dtype or self.dtype))

    def take(self, rows: Rows) -> "Matrices":
        return Matrices(self.x[rows])

    @torch.no_grad()
    def inner(self, left: Float[Tensor, "row d_k"], right: Float[Tensor, "row d_v"]) -> Inner:
        return Inner(torch.einsum("nkv,rk,rv->nr", self.x, left, right))

    def inner_at(
        self,
        left: Float[Tensor, "row d_k"],
        right: Float[Tensor, "row d_v"],
        inner: Inner,
        indices: Int[Tensor, "sample chosen"],
    ) -> Float[Tensor, "sample chosen"]:
        if kernels.use_triton(left, right):
            return self.inner_with_at((left, right), indices)
        return ((left[indices] @ self.x) * right[indices]).sum(-1)

    def inner_with(
        self,
        left: Float[Tensor, "sample term d_k"],
        right: Float[Tensor, "sample term d_v"],
        rows: Sides,
        indices: Int[Tensor, "sample term"],
    ) -> Float[Tensor, "sample term"]:
        return ((left @ self.x) * right).sum(-1)

    def inner_with_at(self, rows: Sides, indices: Int[Tensor, "sample term"]) -> Float[Tensor, "sample term"]:
        return kernels.inner_of_matrices_at(self.x, *rows, indices).type_as(rows[0])

    def inner_with_matrix(self, matrix: Float[Tensor, "d_k d_v"]) -> Float[Tensor, " sample"]:
        return (self.x * matrix).sum((1, 2))

    def squared_norms(self) -> Float[Tensor, " sample"]:
        return self.x.square().sum((1, 2))

    def matrices(self) -> Float[Tensor, "sample d_k d_v"]:
        return self.x

    def mean(self) -> Float[Tensor, "d_k d_v"]:
        return self.x.double().mean(0)

    def squared_errors(
        self,
        coefficients: Float[Tensor, "sample level term"],
        left: Float[Tensor, "sample term d_k"],
        right: Float[Tensor, "sample term d_v"],
        rows: Sides,
        indices: Int[Tensor, "sample term"],
    ) -> Float[Tensor, "sample level"]:
        """By the definition: the rebuilt matrix is formed, and compared."""
        levels = [
            (self.x - (left * level[..., None]).transpose(1, 2) @ right).square().sum((1, 2))
            for level in coefficients.unbind(1)
        ]
        return torch.stack(levels, dim=1)

    def squared_errors_at(
        self, coefficients: Float[Tensor, "sample level term"], rows: Sides, indices: Int[Tensor, "sample term"]
    ) -> Float[Tensor, "sample level"]:
        rebuilt = (kernels.decode_at(level, *rows, indices) for level in coefficients.unbind(1))
        return torch.stack([(self.x - one).square().sum((1, 2)) for one in rebuilt], dim=1).type_as(coefficients)
