"""Thousands of edits, each at the price of what it changes: the layers above it, from its position on.

An edit at (layer l, position t) leaves everything below l and before t as it was. So one plain pass over a text keeps the
inputs of the edited layers and the states before the edited positions; every edit then is a run that enters at layer l with
the state at t, and edits of the same layer and position run side by side in one batch. Nothing is approximated: the logits are
those of a full pass with the same edit, up to rounding.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, zip_longest

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent.edits import Edit, WriteEdit
from hooked_recurrent.hooks import reads_only
from hooked_recurrent.model import HookedRecurrentModel
from hooked_recurrent.state import RecurrentState

Intervention = tuple[Edit, ...]


@dataclass(frozen=True)
class Fork:
    """What one intervention made of its text."""

    index: int
    """Which of the interventions that were given."""
    row: int
    """The text it changed."""
    position: int
    """Its first edited position, which is that of logits[0]."""
    logits: Float[Tensor, "pos d_vocab"]
    """From that position to the horizon."""


@dataclass(frozen=True)
class Trunk:
    """What one plain pass over a text leaves for all forks of it; kept, it serves any number of calls of `run_edits`."""

    inputs: dict[int, Float[Tensor, "one pos d_model"]]
    """Per layer what its hook_resid_pre shows."""
    shared: dict[str, Tensor]
    """What layers leave for the layers above them, [one, pos, ...]."""
    states: dict[int, RecurrentState]
    """Per position the state before it."""

    @staticmethod
    def grow(model: HookedRecurrentModel, text: Int[Tensor, "one pos"], positions: Collection[int]) -> "Trunk":
        """One plain pass over a text, keeping the inputs of all layers and the states at these positions."""
        inputs: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable:
            return reads_only(lambda tensor, hook: inputs.__setitem__(layer, tensor.detach()))

        hooks = [(f"blocks.{layer}.hook_resid_pre", keep(layer)) for layer in range(model.cfg.n_layers)]
        with model.hooks(fwd_hooks=hooks):
            states = model.snapshots(text, positions)
        return Trunk(inputs, dict(model.last_call.shared), states)


@dataclass(frozen=True)
class _Job:
    index: int
    edits: Intervention
    row: int
    layer: int
    position: int

    @property
    def place(self) -> tuple[int, int, int]:
        return self.row, self.position, self.layer


def run_edits(
    model: HookedRecurrentModel,
    tokens: Int[Tensor, "row pos"],
    interventions: Sequence[Edit | Sequence[Edit]],
    *,
    horizon: int | None = 1,
    memory: int = 2**30,
    trunk: Trunk | None = None,
    done: Collection[int] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[Fork]:
    """Run every intervention on its own, as cheaply as it can be done exactly.

    Args:
        model: any HookedRecurrentModel; hooks attached to it fire, with the positions of what runs.
        tokens: the texts [row, pos].
        interventions: an edit of any kind, or several that act together. `batch` says which row of `tokens` it changes (an int;
            None only where there is one row).
        horizon: how many positions after an intervention's first one are wanted: 0 for the logits at t, 1 for t and t + 1, None
            for the whole rest of the text.
        memory: about how many bytes the states and activations of one batch, and the kept states, may take each.
        trunk: the kept pass of the one text in `tokens`, with the states of all edited positions; grown here when left out.
        done: indices to leave out, for instance because an earlier run measured them.
        on_progress: told (how many are done, how many there are) after every batch.

    Yields:
        One `Fork` per intervention, by row, then position, then layer: the same order at every call.

    Raises:
        ValueError, IndexError: before anything runs, for an intervention without edits, one whose rows differ or are missing,
            a hook outside the blocks, or a site that does not exist or lies behind the horizon.
    """
    if horizon is not None and horizon < 0:
        raise ValueError(f"horizon must be at least 0, got {horizon}")
    jobs = [_job(model, tokens, index, given, horizon) for index, given in enumerate(interventions)]
    if trunk is not None:
        missing = {job.position for job in jobs} - set(trunk.states)
        if len(tokens) != 1 or missing:
            what = f"no state at {min(missing)}" if missing else f"one text, not {len(tokens)}"
            raise ValueError(f"the trunk holds {what}")
    wanted = sorted((job for job in jobs if job.index not in set(done)), key=lambda job: (*job.place, job.index))
    return _run(model, tokens, wanted, horizon, memory, trunk, on_progress)


def _job(model: HookedRecurrentModel, tokens: Tensor, index: int, given: object, horizon: int | None) -> _Job:
    edits: Intervention = (given,) if isinstance(given, Edit) else tuple(given)  # type: ignore[arg-type]
    if not edits:
        raise ValueError(f"intervention {index} has no edits")
    rows = {0 if edit.batch is None and len(tokens) == 1 else edit.batch for edit in edits}
    row = rows.pop()
    if rows or not isinstance(row, int):
        raise ValueError(
            f"intervention {index} must name one row of the {len(tokens)} texts: give the edit's batch an int"
        )
    if not 0 <= row < len(tokens):
        raise IndexError(f"row {row} of intervention {index} is out of range: there are {len(tokens)} texts")
    everywhere = torch.arange(tokens.shape[1])
    hit = [edit.local(everywhere)[0] for edit in edits]
    for edit in edits:
        edit.check(model, tokens.shape[1])
        if edit.layer is None:
            raise ValueError(f"intervention {index} edits {edit.where}, outside the blocks: a fork enters at a block")
    places = torch.cat([everywhere[places] for places in hit])
    first, last = int(places.min()), int(places.max())
    if horizon is not None and last > first + horizon:
        raise ValueError(f"intervention {index} edits position {last}, behind its horizon {first} + {horizon}")
    layer = min(edit.layer for edit in edits if edit.layer is not None)
    return _Job(index, tuple(replace(edit, batch=None) for edit in edits), row, layer, first)


def _run(
    model: HookedRecurrentModel,
    tokens: Tensor,
    jobs: list[_Job],
    horizon: int | None,
    memory: int,
    trunk: Trunk | None,
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[Fork]:
    finished = 0
    for row, of_row in groupby(jobs, key=lambda job: job.row):
        mine = list(of_row)
        text = tokens[row : row + 1]
        kept = trunk or Trunk.grow(model, text, [mine[0].position])
        for state, here in _states(model, text, mine, memory, kept):
            for layer, at_layer in groupby(here, key=lambda job: job.layer):
                group = list(at_layer)
                start, stop = state.position, text.shape[1]
                stop = stop if horizon is None else min(stop, start + horizon + 1)
                resid = kept.inputs[layer][:, start:stop]
                beside = {name: tensor[:, start:stop] for name, tensor in kept.shared.items()}
                size = max(1, memory // _bytes_per_row(model, state, layer, stop - start))
                for batch in (group[i : i + size] for i in range(0, len(group), size)):
                    logits = _side_by_side(model, layer, resid, state, beside, batch)
                    finished += len(batch)
                    if on_progress is not None:
                        on_progress(finished, len(jobs))
                    for job, made in zip(batch, logits, strict=True):
                        yield Fork(job.index, row, job.position, made)


def _states(
    model: HookedRecurrentModel, text: Tensor, jobs: list[_Job], memory: int, trunk: Trunk
) -> Iterator[tuple[RecurrentState, list[_Job]]]:
    """The state before every edited position of a text, with the jobs there; as many at a time as `memory` holds.

    The trunk has the first one at least; those that it lacks are taken on the way on from there.
    """
    groups = [(position, list(here)) for position, here in groupby(jobs, key=lambda job: job.position)]
    state = trunk.states[groups[0][0]]
    several = max(1, memory // max(1, _state_bytes(state)))
    for now in (groups[i : i + several] for i in range(0, len(groups), several)):
        taken, positions = trunk.states, [position for position, _ in now]
        if not taken.keys() >= set(positions):
            start, last = state.position, positions[-1]
            taken = {start: state}
            if last > start:
                taken = model.snapshots(text[:, start:last], positions, state=state)
        for position, here in now:
            yield taken[position], here
        state = taken[positions[-1]]


def _side_by_side(
    model: HookedRecurrentModel,
    layer: int,
    resid: Tensor,
    state: RecurrentState,
    shared: dict[str, Tensor],
    jobs: list[_Job],
) -> Float[Tensor, "row pos d_vocab"]:
    """One batch: a row per job, all from the same state."""
    rows = len(jobs)
    edits = [edit for slot in zip_longest(*(job.edits for job in jobs)) for edit in _merged(slot)]
    beside = {name: tensor.expand(rows, *tensor.shape[1:]) for name, tensor in shared.items()}
    return model.run_from(layer, resid.expand(rows, -1, -1), state.fork(rows), shared=beside, edits=edits)


def _merged(slot: Sequence[Edit | None]) -> Iterator[Edit]:
    """The edits of a batch, one per row at most; write edits of the same site and kind as one: each of them costs a copy."""
    alike: dict[tuple, list[int]] = {}
    for row, edit in enumerate(slot):
        if edit is not None:
            kind: tuple = (row,)
            if isinstance(edit, WriteEdit) and isinstance(edit.position, int):
                if edit.key is None or edit.key.ndim == edit.value.ndim == 1:  # type: ignore[union-attr]
                    kind = (edit.layer, edit.head, edit.position, edit.op, edit.form, edit.scale, edit.reading)
            alike.setdefault(kind, []).append(row)
    for rows in alike.values():
        first, several = slot[rows[0]], [slot[row] for row in rows]
        assert first is not None
        if len(rows) == 1 or first.key is None:  # type: ignore[attr-defined]
            yield replace(first, batch=torch.tensor(rows))
            continue
        key, value = (torch.stack([getattr(edit, side) for edit in several])[:, None] for side in ("key", "value"))
        yield replace(first, batch=torch.tensor(rows), key=key, value=value)


def _state_bytes(state: RecurrentState, first: int = 0) -> int:
    return sum(t.nbytes for layer in state.layers[first:] for t in layer.tensors().values())


def _bytes_per_row(model: HookedRecurrentModel, state: RecurrentState, layer: int, length: int) -> int:
    """About what one more row of a batch needs: its states twice (before and after), its logits, a layer's activations."""
    width = model.cfg.d_vocab + 16 * model.cfg.d_model + 4 * (model.cfg.d_mlp or 0)
    return 2 * _state_bytes(state, layer) + length * width * model.W_E.element_size()
