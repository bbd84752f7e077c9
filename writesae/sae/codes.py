"""A sparse code: which atoms are active and with what coefficient, in the units of the raw write."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_recurrent.display import OneLine


@dataclass(frozen=True, repr=False)
class Codes(OneLine):
    """At most k active atoms per sample. An entry whose value is 0 is not active, whatever its index says."""

    indices: Int[Tensor, "*batch k"]
    """Atom numbers, in order of falling coefficient."""
    values: Float[Tensor, "*batch k"]
    """Coefficients a_i >= 0 in raw units: sum_i a_i A_i rebuilds the write, so a_i is the amplitude to substitute."""

    @property
    def active(self) -> Bool[Tensor, "*batch k"]:
        """Which entries fire."""
        return self.values > 0

    @property
    def l0(self) -> Int[Tensor, "*batch"]:
        """Active atoms per sample."""
        return self.active.sum(-1)

    def dense(self, n_atoms: int) -> Float[Tensor, "*batch n_atoms"]:
        """The same code with a place for every atom: [.., n_atoms], zero where an atom is not active."""
        empty = torch.zeros(*self.values.shape[:-1], n_atoms, dtype=self.values.dtype, device=self.values.device)
        return empty.scatter_add(-1, self.indices, self.values)  # an entry that only fills its row must not overwrite

    def of(self, atom: int) -> Float[Tensor, "*batch"]:
        """The coefficient of one atom at every sample, 0 where it is silent."""
        return torch.where(self.indices == atom, self.values, 0).sum(-1)

    def busiest(self, count: int) -> list[int]:
        """The atoms with the largest sums of coefficients over all samples, largest first; fewer where fewer fire."""
        fired, places = self.indices[self.active].unique(return_inverse=True)
        sums = torch.zeros(len(fired), dtype=self.values.dtype, device=self.values.device)
        sums.scatter_add_(0, places, self.values[self.active].detach())
        return fired[sums.argsort(descending=True, stable=True)[:count]].tolist()

    def __getitem__(self, place: int | slice | tuple[int | slice, ...]) -> "Codes":
        """The codes at some places of the leading axes: codes[passage], codes[passage, 3:9]."""
        if len(place if isinstance(place, tuple) else (place,)) >= self.values.ndim:
            raise IndexError(
                f"codes of shape {tuple(self.values.shape)} have no place {place}: the last axis is that of k"
            )
        return Codes(self.indices[place], self.values[place])

    def detach(self) -> "Codes":
        """The same code without its history of gradients."""
        return Codes(self.indices, self.values.detach())

    def over(self, scale: Float[Tensor, ""]) -> "Codes":
        """The same code with coefficients divided by `scale`: raw units from scaled ones."""
        return Codes(self.indices, self.values / scale)

    def times(self, scale: Float[Tensor, ""]) -> "Codes":
        """The same code with coefficients times `scale`: scaled units from raw ones."""
        return Codes(self.indices, self.values * scale)

    def reshape(self, leading: torch.Size) -> "Codes":
        """The same codes with other leading axes."""
        shape = (*leading, self.values.shape[-1])
        return Codes(self.indices.reshape(shape), self.values.reshape(shape))

    @staticmethod
    def concatenate(blocks: Sequence["Codes"]) -> "Codes":
        """Blocks [row, k] as one, every row ordered by falling coefficient; shorter rows are filled up with zeros."""
        most = max(block.values.shape[1] for block in blocks)
        padded = [(0, most - block.values.shape[1]) for block in blocks]
        values = torch.cat([F.pad(block.values, pad) for block, pad in zip(blocks, padded, strict=True)])
        indices = torch.cat([F.pad(block.indices, pad) for block, pad in zip(blocks, padded, strict=True)])
        values, order = values.sort(dim=-1, descending=True, stable=True)
        return Codes(indices.gather(-1, order), values)
