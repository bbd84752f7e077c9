"""The scan under edits of states: the edited positions are stepped, what lies between them runs on any backend.

A `StateEdit` of position t changes S_t inside its step, before hook_state shows it and the query reads it; an edit with
reading "cache" changes it after that, in what the next position starts from. Nothing else is stepped, so an edited state
costs two cuts of the scan.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent.edits import MemoryEdit, Moment
from hooked_recurrent.factors import Before, Factors, Read, State, state_dtype
from hooked_recurrent.scan.dispatch import scan
from hooked_recurrent.scan.step import StateHook, step_scan

Due = list[tuple[MemoryEdit, Tensor]]
"""The edits of one position in their order, each with the index of that position among its own."""


class Edited(NamedTuple):
    """What an edited scan gives."""

    read: Read
    """o_t of every position."""
    seen: State | None
    """The state that the last query read; None where it is not wanted."""
    carried: State | None
    """The state that goes on, which differs from `seen` where an edit with reading "cache" changed the last position."""


def edited_scan(
    factors: Factors,
    initial_state: Before | None,
    edits: Sequence[MemoryEdit],
    positions: Int[Tensor, "pos"],
    *,
    writes: Float[Tensor, "batch pos head d_k d_v"] | None = None,
    on_state: StateHook | None = None,
    backend: str = "auto",
    want_state: bool = True,
) -> Edited:
    """As `scan`, with edits of stage "state" and "carried" of this layer.

    Args:
        factors: the six roles over one position at least.
        initial_state: S_0, zero by default.
        edits: in the order in which they act; those of other positions are passed over.
        positions: the absolute position of each one in `factors`.
        writes, on_state, backend, want_state: as in `scan`; an edited position is stepped, whatever the backend.

    Raises:
        ValueError, IndexError: as `scan`, and for an edit whose rows or shapes do not fit.
    """
    due = _due(edits, positions)
    reads: list[Tensor] = []
    seen = state = initial_state
    start = 0
    for index in [*sorted(due), factors.length]:
        if index > start:
            stretch = slice(start, index)
            dense = None if writes is None else writes[:, stretch]
            read, state = scan(
                factors.at(stretch),
                state,
                writes=dense,
                on_state=_shifted(on_state, start),
                backend=backend,
                want_state=want_state or index < factors.length,
            )
            seen = state
            reads.append(read)
        if index in due:
            stretch = slice(index, index + 1)
            dense = None if writes is None else writes[:, stretch]
            read, seen, state = _step(factors.at(stretch), state, due[index], dense, _shifted(on_state, index))
            reads.append(read)
        start = index + 1
    return Edited(reads[0] if len(reads) == 1 else torch.cat(reads, dim=1), seen, state)


def _step(
    factors: Factors, before: Before | None, due: Due, writes: Tensor | None, on_state: StateHook | None
) -> Edited:
    """One position, with its edits before and after the query reads the state."""
    before = factors.zero_state() if before is None else before.to(state_dtype(factors.query.dtype))
    moment = Moment(before, before, factors, writes)

    def change(state: Tensor, index: int) -> Tensor:
        if any(edit.stage == "state" for edit, _ in due):
            state = _acted(moment, state[:, 0], due, "state")[:, None]
        return state if on_state is None else on_state(state, index)

    read, seen = step_scan(factors, before, writes=writes, on_state=change)
    carried = _acted(moment, seen, due, "carried") if any(edit.stage == "carried" for edit, _ in due) else seen
    return Edited(read, seen, carried)


def _acted(moment: Moment, state: State, due: Due, stage: str) -> State:
    """A copy of the state, changed by the edits of one stage."""
    moment.state = state.clone()
    for edit, chosen in due:
        if edit.stage == stage:
            edit.act(moment, chosen)
    return moment.state


def _due(edits: Sequence[MemoryEdit], positions: Int[Tensor, "pos"]) -> dict[int, Due]:
    """The edits of every position that has some."""
    due: dict[int, Due] = {}
    for edit in edits:
        here, chosen = edit.local(positions)
        for place, index in enumerate(here.tolist()):
            due.setdefault(index, []).append((edit, chosen[place : place + 1]))
    return due


def _shifted(on_state: StateHook | None, start: int) -> StateHook | None:
    """The same function for a stretch that begins at `start`."""
    if on_state is None:
        return None
    return lambda state, index: on_state(state, start + index)
