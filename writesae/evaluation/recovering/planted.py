"""Samples whose atoms are known: sums of planted rank-1 atoms, sparse, noisy, with controlled overlap.

An atom is A_i = v_i w_i^T with unit v_i and w_i. A planted sample is

    kind "writes"   X   = sum over k atoms drawn without replacement of a_i A_i + noise
    kind "states"   S_t = decay S_{t-1} + X_t,  X_t a planted write, S_0 = 0;  the sample is the state after `length`

A single write of a model is one outer product, and so is one planted atom: k = 1 plants one atom per write. With
k > 1 a sample is a net change, as RWKV-7's writes are (two terms), or the sum of what several tokens wrote, and holds
the atoms in superposition: telling them apart is what a dictionary is for.

Noise is a sum of random outer products of Gaussian vectors, so that samples stay lists of factors. Its entries are
uncorrelated and of one variance, as those of white noise are.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_recurrent.config import StrictConfig, require_positive
from writesae.config import require_at_least_zero, require_one_of
from writesae.sae.atoms import unit_rows
from writesae.sae.samples import Factored

KINDS = ("writes", "states")
NOISE_TERMS = 4
"""Random outer products in the noise of one write."""
_OWN_SEEDS = 0x5EED_0000
"""Added to the seed: a dictionary with the seed of the planted atoms would draw these very atoms as its first ones."""


@dataclass(frozen=True)
class Planted(StrictConfig):
    """What is planted."""

    n_atoms: int = 512
    """Atoms in the planted dictionary."""
    d_k: int = 64
    """Width of the key side."""
    d_v: int = 64
    """Width of the value side."""
    k: int = 8
    """Different atoms in one write, all equally likely."""
    lowest: float = 0.5
    """Coefficients are uniform in lowest .. 2 - lowest, so their mean is 1; at most 1."""
    noise: float = 0.01
    """Root mean square norm of the noise in a write, as a share of the norm of the write without it."""
    overlap: float = 0.0
    """Mean cosine between two atoms of one group, as matrices; atoms of different groups have mean cosine 0."""
    group: int = 8
    """Atoms in a group (the last one may be smaller); they share a key direction and a value direction."""
    kind: str = "writes"
    """"writes", or "states": a decayed sum of `length` writes."""
    log_decay: float = -0.5
    """States: log of the decay per write."""
    length: int = 16
    """States: writes since the empty state."""
    seed: int = 0
    """Seed of the atoms."""

    def __post_init__(self) -> None:
        owner = "Planted"
        require_positive(owner, n_atoms=self.n_atoms, d_k=self.d_k, d_v=self.d_v, k=self.k)
        require_positive(owner, group=self.group, length=self.length)
        require_at_least_zero(owner, noise=self.noise, overlap=self.overlap, lowest=self.lowest)
        require_one_of(owner, "kind", self.kind, KINDS)
        if self.k > self.n_atoms:
            raise ValueError(f"Planted.k must be at most n_atoms={self.n_atoms}, got {self.k}")
        if self.lowest > 1:
            raise ValueError(f"Planted.lowest must lie in 0..1, got {self.lowest!r}")
        if self.overlap >= 1:
            raise ValueError(f"Planted.overlap must lie below 1, where atoms would be equal, got {self.overlap!r}")
        if self.overlap and min(self.d_k, self.d_v) < 2:
            raise ValueError(f"Planted.overlap needs at least 2 dimensions a side, got {self.d_k} and {self.d_v}")
        if self.log_decay > 0:
            raise ValueError(f"Planted.log_decay must be at most 0, got {self.log_decay!r}")


class PlantedAtoms:
    """A planted dictionary, `key` [n_atoms, d_k] and `value` [n_atoms, d_v] of unit rows, and samples made from it."""

    def __init__(self, planted: Planted):
        self.planted = planted
        generator = torch.Generator().manual_seed(_OWN_SEEDS + planted.seed)
        self.key = self._side(planted.d_k, generator)
        self.value = self._side(planted.d_v, generator)

    def _side(self, width: int, generator: torch.Generator) -> Float[Tensor, "n_atoms d"]:
        """Unit rows; within a group their mean cosine is the root of the overlap, so that of the atoms is the overlap.

        Every row is sqrt(c) s + sqrt(1 - c) u: s is the group's direction, u a random one at right angles to it.
        """
        planted = self.planted
        own = unit_rows(planted.n_atoms, width, generator=generator)
        if not planted.overlap:
            return own
        share = math.sqrt(planted.overlap)
        groups = torch.arange(planted.n_atoms) // planted.group
        shared = unit_rows(int(groups[-1]) + 1, width, generator=generator)[groups]
        apart = torch.nn.functional.normalize(own - (own * shared).sum(-1, keepdim=True) * shared, dim=-1)
        return math.sqrt(share) * shared + math.sqrt(1 - share) * apart

    def cosines(self) -> Float[Tensor, "n_atoms n_atoms"]:
        """Cosines between the planted atoms, as matrices."""
        return (self.key @ self.key.T) * (self.value @ self.value.T)

    def draw(self, n: int, generator: torch.Generator) -> Factored:
        """`n` independent samples, float32, on the CPU."""
        planted = self.planted
        if planted.kind == "writes":
            return self._writes(n, generator)
        writes = self._writes(n * planted.length, generator)
        steps_ago = torch.arange(planted.length - 1, -1, -1)
        decay = torch.exp(planted.log_decay * steps_ago)[None, :, None, None]
        key = writes.key.view(n, planted.length, -1, planted.d_k)
        value = writes.value.view(n, planted.length, -1, planted.d_v) * decay
        return Factored(key.flatten(1, 2), value.flatten(1, 2))

    def batches(self, batch_size: int, seed: int) -> Iterator[Factored]:
        """Fresh batches without end; `seed` fixes them all."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.draw(batch_size, generator)

    def _writes(self, n: int, generator: torch.Generator) -> Factored:
        """Sums of k atoms, then the noise: [n, k + NOISE_TERMS] factors."""
        planted = self.planted
        chosen = torch.rand(n, planted.n_atoms, generator=generator).topk(planted.k).indices
        spread = 2 * (1 - planted.lowest)
        coefficients = planted.lowest + spread * torch.rand(n, planted.k, generator=generator)
        key, value = self.key[chosen], self.value[chosen] * coefficients[..., None]
        if not planted.noise:
            return Factored(key, value)
        # An outer product of standard Gaussian vectors has mean squared norm d_k d_v; independent ones add.
        size = Factored(key, value).squared_norms().clamp_min(0).sqrt() * planted.noise
        size = size / math.sqrt(NOISE_TERMS * planted.d_k * planted.d_v)
        noise_key = torch.randn(n, NOISE_TERMS, planted.d_k, generator=generator)
        noise_value = torch.randn(n, NOISE_TERMS, planted.d_v, generator=generator) * size[:, None, None]
        return Factored(torch.cat([key, noise_key], 1), torch.cat([value, noise_value], 1))
