"""What is put in the place of a write: the conditions of the replacement test as low-rank matrices, term by term.

A substitute is a sum of `term` outer products key value^T; absent terms are zero. Scales (protocol decision D3): `coef`
gives an atom the coefficient that the SAE assigned, `norm` the Frobenius norm of the native write. Pools (D2): `listed` is
the atom whose firing was collected, `dominant` the atom with the largest coefficient there. Controls (D6):

    random_listed_coef     a random dictionary atom at the listed atom's coefficient
    random_dominant_coef   the same atom at the dominant atom's coefficient
    random_silent_norm     a random atom that does not fire here, at the native norm
    random_empirical_norm  factors drawn coordinate by coordinate from the native writes, at the native norm
    random_gaussian_norm   Gaussian factors, at the native norm
"""

import torch
from jaxtyping import Float
from torch import Tensor

from writesae.evaluation.firings import CellWrites, Firing
from writesae.evaluation.low_rank import LowRank
from writesae.sae.write_sae import WriteSAE

NATIVE, DELETE = "native", "delete"
POOLS, SCALES = ("listed", "dominant"), ("coef", "norm")
ATOMS = tuple(f"atom_{pool}_{scale}" for pool in POOLS for scale in SCALES)
CONTROLS = (
    "random_listed_coef",
    "random_dominant_coef",
    "random_silent_norm",
    "random_empirical_norm",
    "random_gaussian_norm",
)
CONDITIONS = (NATIVE, DELETE, *ATOMS, *CONTROLS)


class Substitutes:
    """Draws the substitutes of every condition. All random draws are made here, in the order of the firings, so that the
    result does not depend on how the forks are batched or in which order they run."""

    def __init__(self, sae: WriteSAE, writes: CellWrites, seed: int):
        self.key_atoms, self.value_atoms = sae.key_atoms.detach(), sae.value_atoms.detach()
        self.keys, self.values = writes.key.flatten(0, 1), writes.value.flatten(0, 1)
        self.codes = writes.codes
        self.generator = torch.Generator().manual_seed(seed)

    def atom(self, index: int) -> LowRank:
        """One atom as it stands in the dictionary, whatever its norm."""
        return LowRank(self.key_atoms[index], self.value_atoms[index])

    def draw(self, firing: Firing, native: LowRank) -> dict[str, LowRank]:
        """Every condition's substitute at one firing, by name."""
        norm = native.norm()
        coefficients = {"listed": firing.coefficient, "dominant": firing.dominant_coefficient}
        chosen = {"listed": self.atom(firing.atom), "dominant": self.atom(firing.dominant)}
        anyone = self.atom(self._randint(len(self.key_atoms)))
        substitutes = {NATIVE: native, DELETE: native.times(0.0)}
        for pool, atom in chosen.items():
            substitutes[f"atom_{pool}_coef"] = atom.times(coefficients[pool])
            substitutes[f"atom_{pool}_norm"] = atom.at_norm(norm)
            substitutes[f"random_{pool}_coef"] = anyone.times(coefficients[pool])
        substitutes["random_silent_norm"] = self.atom(self._silent(firing)).at_norm(norm)
        substitutes["random_empirical_norm"] = LowRank(self._mixed(self.keys), self._mixed(self.values)).at_norm(norm)
        gaussian = (torch.randn(1, side.shape[-1], generator=self.generator) for side in (self.keys, self.values))
        substitutes["random_gaussian_norm"] = LowRank(*(side.to(self.keys) for side in gaussian)).at_norm(norm)
        return {name: substitutes[name] for name in CONDITIONS}

    def _randint(self, bound: int) -> int:
        return int(torch.randint(bound, (1,), generator=self.generator))

    def _silent(self, firing: Firing) -> int:
        """An atom that does not fire at this token."""
        here = self.codes.indices[firing.passage, firing.position][self.codes.active[firing.passage, firing.position]]
        silent = torch.ones(len(self.key_atoms), dtype=torch.bool)
        silent[here.cpu()] = False
        candidates = silent.nonzero()[:, 0]
        return int(candidates[self._randint(len(candidates))])

    def _mixed(self, rows: Float[Tensor, "write d"]) -> Float[Tensor, "one d"]:
        """Each coordinate from another random native write."""
        picks = torch.randint(len(rows), (rows.shape[1],), generator=self.generator)
        return rows[picks.to(rows.device), torch.arange(rows.shape[1], device=rows.device)][None]
