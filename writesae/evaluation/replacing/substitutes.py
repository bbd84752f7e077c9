"""What is put in the place of a write: the conditions of the replacement test as low-rank matrices, term by term.

A substitute is a sum of `term` outer products key value^T. Pools (protocol decision D2): `listed` is the atom whose firing
was collected, `dominant` the atom with the largest coefficient there. Scales (D3): `coef` gives an atom the coefficient that
the SAE assigned (to the state, where it was trained on states), `norm` the Frobenius norm of the native write, and `best`
the coefficient <X, A> / |A|^2 that brings the one atom A closest to the native write X: it tells a badly scaled atom from a
badly pointing one, and nothing that the dictionary says goes into it. Controls (D6):

    random_listed_coef     a random dictionary atom at the listed atom's coefficient
    random_dominant_coef   the same atom at the dominant atom's coefficient
    random_silent_norm     a random atom that does not fire here, at the native norm
    random_empirical_norm  factors drawn coordinate by coordinate from the native writes, at the native norm
    random_gaussian_norm   Gaussian factors, at the native norm

A dense atom (a flat dictionary) has no write's shape. What stands for it is its leading singular pair sigma_1 u_1 v_1^T, the
nearest matrix that a token could write, or with `dense="whole"` the matrix itself.
"""

from collections.abc import Callable, Mapping
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from writesae.evaluation.firings import CellWrites, Firing
from writesae.evaluation.low_rank import LowRank
from writesae.sae.write_sae import WriteSAE

NATIVE, DELETE = "native", "delete"
POOLS, SCALES = ("listed", "dominant"), ("coef", "norm", "best")
ATOMS = tuple(f"atom_{pool}_{scale}" for pool in POOLS for scale in SCALES)
CONTROLS = (
    "random_listed_coef",
    "random_dominant_coef",
    "random_silent_norm",
    "random_empirical_norm",
    "random_gaussian_norm",
)
CONDITIONS = (NATIVE, DELETE, *ATOMS, *CONTROLS)
DENSE = ("leading", "whole")
Others = Mapping[str, Callable[[Firing], LowRank]]
"""Further conditions by name: what stands in the write's place at a firing."""


def check_others(others: Others) -> None:
    """Raise `ValueError` for a name that is taken, or that cannot be part of a column's name."""
    for name in others:
        if name in CONDITIONS or name.startswith("reverse_"):
            raise ValueError(f"a further condition cannot be called {name!r}: the test has a column of that name")
        if not name.isidentifier():
            raise ValueError(f"a further condition must be named by letters, digits and underscores, got {name!r}")


class Substitutes:
    """Draws the substitutes of every condition. All random draws are made here, in the order of the firings, so that the
    result does not depend on how the forks are batched or in which order they run."""

    def __init__(
        self, sae: WriteSAE, writes: CellWrites, seed: int, dense: str = "leading", others: Others | None = None
    ):
        self.atom = cache(lambda index: atom_of(sae, index, dense).to(writes.key.device))
        self.n_atoms = sae.config.n_atoms
        self.keys, self.values = writes.key.flatten(0, 1), writes.value.flatten(0, 1)
        self.codes = writes.codes
        self.others = others or {}
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, firing: Firing, native: LowRank) -> dict[str, LowRank]:
        """Every condition's substitute at one firing, by name: those of `CONDITIONS`, then the others."""
        norm = native.norm()
        coefficients = {"listed": firing.coefficient, "dominant": firing.dominant_coefficient}
        chosen = {"listed": self.atom(firing.atom), "dominant": self.atom(firing.dominant)}
        anyone = self.atom(self._randint(self.n_atoms))
        substitutes = {NATIVE: native, DELETE: native.times(0.0)}
        for pool, atom in chosen.items():
            substitutes[f"atom_{pool}_coef"] = atom.times(coefficients[pool])
            substitutes[f"atom_{pool}_norm"] = atom.at_norm(norm)
            substitutes[f"atom_{pool}_best"] = atom.times(_best(native, atom))
            substitutes[f"random_{pool}_coef"] = anyone.times(coefficients[pool])
        substitutes["random_silent_norm"] = self.atom(self._silent(firing)).at_norm(norm)
        substitutes["random_empirical_norm"] = LowRank(self._mixed(self.keys), self._mixed(self.values)).at_norm(norm)
        gaussian = (torch.randn(1, side.shape[-1], generator=self.generator) for side in (self.keys, self.values))
        substitutes["random_gaussian_norm"] = LowRank(*(side.to(self.keys) for side in gaussian)).at_norm(norm)
        given = {name: other(firing).to(self.keys.device) for name, other in self.others.items()}
        return {name: substitutes[name] for name in CONDITIONS} | given

    def _randint(self, bound: int) -> int:
        return int(torch.randint(bound, (1,), generator=self.generator))

    def _silent(self, firing: Firing) -> int:
        """An atom that does not fire at this token."""
        here = self.codes.indices[firing.passage, firing.position][self.codes.active[firing.passage, firing.position]]
        silent = torch.ones(self.n_atoms, dtype=torch.bool)
        silent[here.cpu()] = False
        candidates = silent.nonzero()[:, 0]
        return int(candidates[self._randint(len(candidates))])

    def _mixed(self, rows: Float[Tensor, "write d"]) -> Float[Tensor, "one d"]:
        """Each coordinate from another random native write."""
        picks = torch.randint(len(rows), (rows.shape[1],), generator=self.generator)
        return rows[picks.to(rows.device), torch.arange(rows.shape[1], device=rows.device)][None]


def atom_of(sae: WriteSAE, index: int, dense: str = "whole") -> LowRank:
    """One atom as it stands in the dictionary, whatever its norm; a dense one "whole", or its "leading" outer product."""
    if sae.config.decoder != "dense":
        return LowRank(sae.key_atoms[index].detach(), sae.value_atoms[index].detach())
    matrix = sae.atom(index)  # by its singular value decomposition
    terms = slice(0, 1) if dense == "leading" else slice(None)
    return LowRank(matrix.A.detach().T[terms], matrix.B.detach()[terms])


def _best(native: LowRank, atom: LowRank) -> float:
    """The coefficient of the one atom that leaves the least of the native write; 0 for an atom of zeros."""
    squared = atom.norm() ** 2
    return native.inner(atom) / squared if squared > 0 else 0.0
