"""What an erasure study does, drawn before anything runs: halves, firings, silent positions, random atoms and tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_recurrent import WriteEdit
from hooked_recurrent.edits import Edit, Reading
from writesae.evaluation.acting.atom_edits import adding
from writesae.evaluation.describing.contexts import atom_coefficients
from writesae.evaluation.firings import CellWrites
from writesae.sae.write_sae import WriteSAE

if TYPE_CHECKING:
    from writesae.evaluation.acting.erasure import ErasureConfig

SELECT, TEST = "select", "test"


@dataclass(frozen=True)
class Trial:
    """One intervention at one position, as edits for each way of reading it."""

    index: int
    """Its place in the plan."""
    test: str
    """"erase", "write" or "floor"."""
    half: str
    """"select": its passage is in the half that chooses tokens; "test": in the other."""
    atom: int
    """The atom under study, also where the edit is a control."""
    control: int
    """The silent atom of its null."""
    condition: str
    """"delete", "atom", "random_atom" or "native"."""
    dose: float
    """Multiple of the median coefficient that is written; 1 for what is erased."""
    passage: int
    """Row of the tokens."""
    position: int
    """Position in it."""
    coefficient: float
    """What is taken away or added, in units of the atom."""
    random_token: int
    """The token of the null."""
    edits: dict[str, tuple[Edit, ...]]
    """Per reading "in_recurrence" and "cache"."""

    @property
    def selects(self) -> bool:
        """Whether preferred tokens are chosen by it."""
        return self.test == "erase" and self.half == SELECT and self.condition in ("delete", "random_atom")

    def columns(self) -> dict[str, Any]:
        """Its fields as the columns of a table."""
        left_out = ("index", "edits", "random_token")
        return {name: value for name, value in vars(self).items() if name not in left_out}


@dataclass
class _Planner:
    """Makes the trials of one atom, each with the next number."""

    sae: WriteSAE
    writes: CellWrites
    config: "ErasureConfig"
    layer: int
    head: int
    atom: int
    control: int
    d_vocab: int
    generator: torch.Generator
    trials: list[Trial]

    def erase(self, half: str, place: tuple[int, int], coefficient: float) -> None:
        """What is taken away at one firing."""
        conditions = {
            "delete": lambda reading: self._exchanged(place, reading, "delete"),
            "atom": lambda reading: self._adding(self.atom, -coefficient, place, reading),
            "random_atom": lambda reading: self._adding(self.control, -coefficient * self._equal, place, reading),
        }
        token = self._token()
        self._add("erase", half, place, 1.0, coefficient, token, conditions)
        native = {"native": lambda reading: self._exchanged(place, reading, "replace")}
        self._add("floor", half, place, 1.0, coefficient, token, native)

    def write(self, place: tuple[int, int], doses: dict[float, float]) -> None:
        """What is added at one silent position; `doses` maps each to the coefficient that it stands for."""
        token = self._token()
        for dose, coefficient in doses.items():
            conditions = {
                "atom": lambda reading, c=coefficient: self._adding(self.atom, c, place, reading),
                "random_atom": lambda reading, c=coefficient: self._adding(
                    self.control, c * self._equal, place, reading
                ),
            }
            self._add("write", TEST, place, dose, coefficient, token, conditions)

    def _add(
        self,
        test: str,
        half: str,
        place: tuple[int, int],
        dose: float,
        coefficient: float,
        token: int,
        conditions: Mapping[str, Callable[[Any], tuple[Edit, ...]]],
    ) -> None:
        for condition, made in conditions.items():
            self.trials.append(
                Trial(
                    index=len(self.trials),
                    test=test,
                    half=half,
                    atom=self.atom,
                    control=self.control,
                    condition=condition,
                    dose=dose,
                    passage=place[0],
                    position=place[1],
                    coefficient=coefficient,
                    random_token=token,
                    edits={reading: made(reading) for reading in get_args(Reading)},
                )
            )

    @property
    def _equal(self) -> float:
        """What makes the control as large as the atom."""
        norms = self.sae.atom_norms().detach()
        return float(norms[self.atom] / norms[self.control].clamp_min(1e-30))

    def _adding(self, atom: int, factor: float, place: tuple[int, int], reading: Reading) -> tuple[Edit, ...]:
        where = {"layer": self.layer, "head": self.head, "position": place[1], "batch": place[0]}
        return adding(self.sae, atom, factor, reading=reading, **where)

    def _exchanged(self, place: tuple[int, int], reading: Reading, op: Any) -> tuple[Edit, ...]:
        """The native write deleted, or put back in its own place."""
        sides, form = {}, self.config.form
        if op == "replace":
            sides, form = {"key": self.writes.key[place], "value": self.writes.value[place]}, "additive"
        where: dict[str, Any] = {"batch": place[0], "form": form, "reading": reading}
        return (WriteEdit(self.layer, self.head, place[1], op, **sides, **where),)

    def _token(self) -> int:
        return int(torch.randint(self.d_vocab, (1,), generator=self.generator))


def silent_atom(
    writes: CellWrites, places: list[tuple[int, int]], atom: int, n_atoms: int, generator: torch.Generator
) -> int:
    """A random atom other than this one among those that fire at the fewest of these places, as a rule at none."""
    if n_atoms < 2:
        raise ValueError("the dictionary has a single atom, so that none is left for the null")
    passage, position = torch.tensor(places).unbind(1)
    here = writes.codes.indices[passage, position][writes.codes.active[passage, position]]
    firings = torch.bincount(here.cpu(), minlength=n_atoms)
    firings[atom] = firings.max() + 1
    candidates = (firings == firings.min()).nonzero()[:, 0]
    return int(candidates[torch.randint(len(candidates), (1,), generator=generator)])


def sample(where: Bool[Tensor, "passage pos"], most: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """A random choice of at most so many places, sorted."""
    places = where.nonzero()
    chosen = places[torch.randperm(len(places), generator=generator)[:most]].tolist()
    return sorted((passage, position) for passage, position in chosen)


def halves(passages: Bool[Tensor, " passage"], generator: torch.Generator) -> Bool[Tensor, " passage"]:
    """Which passages choose: a random half of those in which an atom fires; the odd one out, and the others, test."""
    mine = passages.nonzero()[:, 0]
    chosen = torch.zeros_like(passages)
    chosen[mine[torch.randperm(len(mine), generator=generator)[: len(mine) // 2]]] = True
    return chosen


def plan_trials(
    sae: WriteSAE,
    writes: CellWrites,
    atoms: list[int],
    config: "ErasureConfig",
    *,
    layer: int,
    head: int,
    d_vocab: int,
    first: int,
    last: int,
) -> list[Trial]:
    """Every intervention of a study, all random draws included.

    An atom's draws come from its own generator, so that its trials are the same whichever other atoms are studied.
    """
    trials: list[Trial] = []
    window = torch.zeros(writes.codes.values.shape[:2], dtype=torch.bool)
    window[:, first : last + 1] = True
    for atom in atoms:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + atom)
        coefficients = atom_coefficients(writes, atom).cpu()
        fires = (coefficients > 0) & window
        selecting = halves(fires.any(1), generator)
        firings = {
            half: sample(fires & mine[:, None], config.per_atom // 2, generator)
            for half, mine in ((SELECT, selecting), (TEST, ~selecting))
        }
        silent = sample((coefficients == 0) & window & ~selecting[:, None], config.writes, generator)
        every = [*firings[SELECT], *firings[TEST], *silent]
        control = silent_atom(writes, every, atom, sae.config.n_atoms, generator)
        planner = _Planner(sae, writes, config, layer, head, atom, control, d_vocab, generator, trials)
        for half, places in firings.items():
            for place in places:
                planner.erase(half, place, float(coefficients[place]))
        natural = float(coefficients[fires].median())
        for place in silent:
            planner.write(place, {dose: dose * natural for dose in config.doses})
    return trials
