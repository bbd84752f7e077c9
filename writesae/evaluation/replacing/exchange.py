"""Exchanging one write for another matrix, and measuring many such exchanges of one text through the fork engine.

All exchanges of a passage run in one call of `run_edits` per reading, side by side where their positions are close, so a
thousand of them cost a few hundred short passes through the layers above the cell.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel, StateEdit, WriteEdit
from hooked_recurrent.edits import Edit, Form
from hooked_recurrent.edits.memory import Reading
from hooked_recurrent.patching.forks import Trunk, run_edits
from writesae.evaluation.low_rank import LowRank
from writesae.evaluation.outputs import compare

READINGS = ("in_recurrence", "cache", "horizon")
MOST_TERMS = 4
"""A sum of more outer products than this is put in as a matrix: every term of an edit is another axis of the whole scan."""

Measured = dict[str, Float[Tensor, " condition"]]
"""Per quantity (`outputs.compare`) a number for every condition."""


def exchange(
    layer: int, head: int, position: int, new: LowRank, form: Form = "additive", reading: Reading = "in_recurrence"
) -> list[Edit]:
    """The edits that put `new` in the place of one native write (or, in net form, of all that the token did)."""
    site = (layer, head, position)
    if len(new.key) > MOST_TERMS:
        return [
            WriteEdit(*site, "delete", form=form, reading=reading),
            StateEdit(*site, "add", new.matrix(), reading=reading),
        ]
    edits: list[Edit] = [WriteEdit(*site, "replace", new.key[0], new.value[0], form=form, reading=reading)]
    terms = zip(new.key[1:], new.value[1:], strict=True)
    return edits + [WriteEdit(*site, "add", key, value, reading=reading) for key, value in terms]


@dataclass(frozen=True)
class Exchanges:
    """How the writes of one cell are exchanged, and where the output is read."""

    model: HookedRecurrentModel
    """The language model."""
    layer: int
    """The cell's layer."""
    head: int
    """Its head."""
    form: Form
    """What the native write is."""
    readings: tuple[str, ...]
    """Which of `READINGS` are measured."""
    horizon: int
    """Tokens after t over which the horizon reading averages."""
    memory: int
    """About how many bytes the logits and activations of one batch may take, and the kept states likewise."""

    def measure(
        self, text: Int[Tensor, "one pos"], positions: Sequence[int], chosen: Sequence[Sequence[LowRank]]
    ) -> Iterator[tuple[int, str, Measured]]:
        """Exchange the write at every position for every one of its substitutes, each by itself.

        Args:
            text: the passage; the token after the last one that is read must be in it.
            positions: where, in rising order; a position may come again.
            chosen: per entry of `positions` the substitutes, one per condition.

        Yields:
            (entry, reading, measurements), every entry once per reading; the numbers of an entry come from its own forks alone.
        """
        with torch.no_grad():
            plain = self.model(text)[0]
        trunk = Trunk.grow(self.model, text, self._kept(positions))
        before = self.horizon if "horizon" in self.readings else 0
        if {"in_recurrence", "horizon"} & set(self.readings):
            for entry, rows in self._forks(text, positions, chosen, trunk, "in_recurrence", before):
                t = positions[entry]
                if "in_recurrence" in self.readings:
                    yield entry, "in_recurrence", self._compared([row[:1] for row in rows], plain, text, t)
                if "horizon" in self.readings:
                    yield entry, "horizon", self._compared([row[1:] for row in rows], plain, text, t + 1)
        if "cache" in self.readings:
            for entry, rows in self._forks(text, positions, chosen, trunk, "cache", 1):
                yield entry, "cache", self._compared(rows, plain, text, positions[entry] + 1)

    def _forks(
        self,
        text: Tensor,
        positions: Sequence[int],
        chosen: Sequence[Sequence[LowRank]],
        trunk: Trunk,
        reading: Reading,
        horizon: int,
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Entry by entry the logits of its conditions, from t on, or at t + 1 alone in the cache reading."""
        owners = [(entry, place) for entry, matrices in enumerate(chosen) for place in range(len(matrices))]
        edits = [
            exchange(self.layer, self.head, positions[entry], chosen[entry][place], self.form, reading)
            for entry, place in owners
        ]
        options: dict = {"horizon": horizon, "memory": self.memory, "trunk": trunk, "last_only": reading == "cache"}
        waiting: dict[int, dict[int, Tensor]] = {}
        for fork in run_edits(self.model, text, edits, **options):
            entry, place = owners[fork.index]
            rows = waiting.setdefault(entry, {})
            rows[place] = fork.logits
            if len(rows) == len(chosen[entry]):
                yield entry, [rows[place] for place in range(len(rows))]
                del waiting[entry]

    def _compared(self, rows: list[Tensor], plain: Tensor, text: Tensor, first: int) -> Measured:
        """Every row against the plain logits from position `first` on, in float64, a few rows at a time."""
        window = slice(first, first + len(rows[0]))
        target = text[0, first + 1 : first + 1 + len(rows[0])]
        at_once = max(1, self.memory // (32 * rows[0].numel()))  # four float64 tensors of a row's size
        parts = [
            compare(torch.stack(rows[start : start + at_once]), plain[window], target)
            for start in range(0, len(rows), at_once)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _kept(self, positions: Sequence[int]) -> list[int]:
        """Where the trunk keeps a state: wherever a run begins, so that no reading makes them anew, if `memory` holds them."""
        cfg, starts = self.model.cfg, sorted(set(positions))
        one = len(cfg.recurrent_layers) * cfg.n_heads * cfg.d_k * cfg.d_v * self.model.W_E.element_size()
        return starts if len(starts) * one <= self.memory else starts[:1]


def columns(measured: Measured, conditions: Sequence[str]) -> Mapping[str, float]:
    """Measurements as the columns of one row: {quantity}_{condition}."""
    return {
        f"{quantity}_{condition}": value
        for quantity, values in measured.items()
        for condition, value in zip(conditions, values.tolist(), strict=True)
    }
