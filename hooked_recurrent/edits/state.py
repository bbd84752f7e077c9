"""Edits of whole states: what to put in the place of S_t, the memory after the write at t."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent.edits.base import Rows, Stage
from hooked_recurrent.edits.memory import MemoryEdit, Moment, Op, Reading
from hooked_recurrent.edits.positions import Position


@dataclass(frozen=True, eq=False, repr=False)
class StateEdit(MemoryEdit):
    """One change to the matrix memory of one head, after the write at t.

    replace puts `matrix` in its place; add adds it; delete empties the memory; scale multiplies all of it by `scale`. A
    function on hook_state that does the same gives the same numbers, but has its layer stepped token by token; here only
    the edited positions are.
    """

    layer: int
    """Which block; it must be recurrent."""
    head: int
    """Which (value) head."""
    position: Position
    """Absolute positions: an int, a slice, or a tensor of ints, counted from the first token the state has seen."""
    op: Op = "replace"
    """What happens to the state."""
    matrix: Float[Tensor, "*rows_pos d_k d_v"] | None = None
    """For replace and add: [d_k, d_v], or anything that broadcasts to [rows, positions, d_k, d_v]."""
    scale: float | None = None
    """Factor for scale."""
    batch: Rows = None
    """Batch rows to edit; None edits all."""
    reading: Reading = "in_recurrence"
    """Whether the query of t reads the changed state ("in_recurrence"), or still the native one ("cache")."""

    def __post_init__(self) -> None:
        self._check_op()
        self._check_tensor("matrix", "d_k", "d_v", wanted=self.op in ("replace", "add"))

    @property
    def stage(self) -> Stage:
        """On the state before it is read, or on the one that is carried on."""
        return "state" if self.reading == "in_recurrence" else "carried"

    def check(self, model: Any, end: int | None) -> None:
        """Raise if the site does not exist in this model, or lies at or after position `end` (None: anywhere)."""
        super().check(model, end)
        self._check_width("matrix", model.cfg.d_k, model.cfg.d_v)

    def act(self, moment: Moment, chosen: Int[Tensor, "one"]) -> None:
        """Change S_t in place."""
        state = moment.state
        site = (self.rows(state.shape[0]), self.head)
        if self.op in ("replace", "add"):
            matrix = self.spread("matrix", state, state.shape[-2:], len(site[0]), chosen)[:, 0]
            state[site] = matrix if self.op == "replace" else state[site] + matrix
        elif self.op == "scale":
            assert self.scale is not None  # __post_init__ checked it
            state[site] = state[site] * self.scale
        else:
            state[site] = 0.0
