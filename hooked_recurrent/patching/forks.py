"""Thousands of edits, each at the price of what it changes: the layers above it, from its position on.

An edit at (layer l, position t) leaves everything below l and before t as it was. So one plain pass over a text keeps the
inputs of the edited layers and the states before the edited positions; every edit then is a run that enters at layer l with
the state at t. Edits of one layer run side by side in a batch that shares this state, those of neighbouring positions too
where that costs less than running them by themselves. Nothing is approximated: the logits are those of a full pass with the
same edit, up to rounding.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, zip_longest
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module

from hooked_recurrent.display import OneLine
from hooked_recurrent.edits import Edit, WriteEdit
from hooked_recurrent.edits.activation import BLOCK
from hooked_recurrent.hooks import RecurrentHookPoint, reads_only
from hooked_recurrent.model import HookedRecurrentModel
from hooked_recurrent.state import RecurrentState
from hooked_recurrent.validation import check_edits, check_tokens

Intervention = tuple[Edit, ...]


@dataclass(frozen=True, repr=False)
class Fork(OneLine):
    """What one intervention made of its text."""

    index: int
    """Which of the interventions that were given."""
    row: int
    """The text it changed."""
    position: int
    """Its first edited position, which is that of logits[0]."""
    logits: Float[Tensor, "pos d_vocab"]
    """From that position to the horizon; with `last_only` at the horizon alone."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """Per hook of `keep` its activation [pos, ...], from that position to the horizon."""


@dataclass(frozen=True, repr=False)
class Trunk(OneLine):
    """What one plain pass over a text leaves for all forks of it; kept, it serves any number of calls of `run_edits`."""

    text: Int[Tensor, "one pos"]
    """What was read."""
    inputs: dict[int, Float[Tensor, "one pos d_model"]]
    """Per layer what comes to its hook_resid_pre, as it was before any function there, which every fork meets anew."""
    shared: dict[str, Tensor]
    """What layers leave for the layers above them, [one, pos, ...]."""
    states: dict[int, RecurrentState]
    """Per position the state before it."""

    @staticmethod
    @torch.no_grad()
    def grow(model: HookedRecurrentModel, text: Int[Tensor, "one pos"], positions: Collection[int]) -> "Trunk":
        """One plain pass over a text, keeping the inputs of all layers and the states at one or more positions."""
        if not positions:
            raise ValueError("a trunk needs the state at one position at least, got none")
        inputs: dict[int, Tensor] = {}
        depth = model.clock.depth + 1

        def keep(layer: int) -> Callable:
            def before_block(block: Module, given: tuple[Any, ...]) -> None:
                if model.clock.depth == depth:  # not in a call that a hook function makes
                    inputs[layer] = given[0]

            return before_block

        handles = [block.register_forward_pre_hook(keep(layer)) for layer, block in enumerate(model.blocks)]
        try:
            states = model.snapshots(text, positions)
        finally:
            for handle in handles:
                handle.remove()
        return Trunk(text, inputs, dict(model.last_call.shared), states)


@dataclass(frozen=True)
class _Job:
    index: int
    edits: Intervention
    row: int
    layer: int
    position: int


@dataclass(frozen=True)
class _Batch:
    """Jobs of one text and layer that run side by side from the state at `start`."""

    jobs: tuple[_Job, ...]
    end: int
    """The last job's text, or horizon, ends here."""
    alone: int
    """How many tokens the jobs would take one by one."""

    @property
    def start(self) -> int:
        return self.jobs[0].position

    @property
    def length(self) -> int:
        return self.end - self.start

    def joined(self, other: "_Batch") -> "_Batch":
        return _Batch((*self.jobs, *other.jobs), max(self.end, other.end), self.alone + other.alone)


# Their axes are query and key positions, of which a fork runs a few queries alone.
SQUARE = ("hook_attn_scores", "hook_pattern")
# A batch of fewer tokens than this waits for the weights to be read from memory, whatever it computes.
FREE_TOKENS = 32
# Running from an earlier position than its own costs a job tokens; a batch may have this share of them more than its jobs need.
SLACK = 0.25


def run_edits(
    model: HookedRecurrentModel,
    tokens: Int[Tensor, "row pos"],
    interventions: Sequence[Edit | Sequence[Edit]],
    *,
    horizon: int | None = 1,
    memory: int = 2**30,
    trunk: Trunk | None = None,
    last_only: bool = False,
    keep: Collection[str] = (),
    done: Collection[int] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[Fork]:
    """Run every intervention on its own, as cheaply as it can be done exactly. No gradient reaches the logits.

    Args:
        model: any HookedRecurrentModel; hooks attached to it fire, with the positions of what runs. Attach none, and take none
            away, before the last fork is there: a text's plain pass would be that of other hooks.
        tokens: the texts [row, pos].
        interventions: an edit of any kind, or several that act together. `batch` says which row of `tokens` it changes (an int;
            None only where there is one row).
        horizon: how many positions after an intervention's first one are wanted: 0 for the logits at t, 1 for t and t + 1, None
            for the whole rest of the text.
        memory: about how many bytes the activations of one batch, and the kept states, may take each.
        trunk: the kept pass of the one text in `tokens`; grown here when left out. States that it lacks are made anew, from
            the last one before them.
        last_only: keep only the logits at the horizon's end, which saves most of the unembedding.
        keep: names of hooks whose activations every fork brings along, as functions attached to them left them.
        done: indices to leave out, for instance because an earlier run measured them.
        on_progress: told (how many are done, how many there are) after every batch.

    Yields:
        One `Fork` per intervention, row by row, in an order that depends on the arguments alone.

    Raises:
        ValueError, IndexError, TypeError: before anything runs, for tokens that are none, an intervention without edits, one
            whose rows differ or are missing, a hook outside the blocks, a site that does not exist or lies behind the
            horizon, a hook to keep that lies below an intervention, or a trunk of another text.
        KeyError: for a hook to keep that the model does not have, with the nearest names.
    """
    if horizon is not None and horizon < 0:
        raise ValueError(f"horizon must be at least 0, got {horizon}")
    if isinstance(interventions, Edit):
        raise TypeError(
            f"interventions must be several, got a single {type(interventions).__name__}: put it into a list"
        )
    tokens = check_tokens(tokens, model.cfg.d_vocab).to(model.device)
    jobs = [_job(model, tokens, index, given, horizon) for index, given in enumerate(interventions)]
    kept = _hooks_to_keep(model, keep, jobs)
    if trunk is not None:
        earliest = min(trunk.states)
        if len(tokens) != 1:
            raise ValueError(f"the trunk holds one text, not {len(tokens)}")
        if not torch.equal(trunk.text.to(tokens), tokens):
            raise ValueError("the trunk was grown from another text")
        for job in jobs:
            if job.position < earliest:
                raise ValueError(f"the trunk holds no state at or before {job.position}; its first is at {earliest}")
    in_order = sorted(jobs, key=lambda job: (job.row, job.position, job.index))
    plan = _Plan(model, tokens, horizon, memory, last_only, kept, frozenset(done))
    return plan.run(in_order, trunk, on_progress)


def _job(model: HookedRecurrentModel, tokens: Tensor, index: int, given: object, horizon: int | None) -> _Job:
    try:
        edits: Intervention = (given,) if isinstance(given, Edit) else check_edits(given)
    except TypeError as error:
        raise TypeError(f"intervention {index} is no edit and no list of edits: {error}") from None
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
    length = tokens.shape[1]
    for edit in edits:
        edit.check(model, length)
        if edit.layer is None:
            raise ValueError(f"intervention {index} edits {edit.where}, outside the blocks: a fork enters at a block")
    first = min(edit.first_position for edit in edits)
    last = max(length - 1 if edit.last_position is None else edit.last_position for edit in edits)
    if first >= length:
        raise IndexError(f"intervention {index} begins at position {first}: the text ends before position {length}")
    if horizon is not None and last > first + horizon:
        raise ValueError(f"intervention {index} edits position {last}, behind its horizon {first} + {horizon}")
    layer = min(edit.layer for edit in edits if edit.layer is not None)
    return _Job(index, tuple(edit.in_rows(None) for edit in edits), row, layer, first)


def _hooks_to_keep(model: HookedRecurrentModel, keep: Collection[str], jobs: Sequence[_Job]) -> tuple[str, ...]:
    """The names without repetition, or an error for one that some job never comes by."""
    if isinstance(keep, str):
        raise TypeError(f"keep must be several names of hooks, got a single one: put {keep!r} into a list")
    names = tuple(dict.fromkeys(model.checked_hook_name(name) for name in keep))
    for name in names:
        if name.endswith(SQUARE):
            raise ValueError(f"{name} cannot be kept: its axes are query and key positions")
        block = BLOCK.match(name)
        if block is None and not name.startswith("ln_final."):
            raise ValueError(f"{name} cannot be kept: a fork enters at a block, above it")
        for job in jobs:
            if block is not None and int(block[1]) < job.layer:
                raise ValueError(f"{name} cannot be kept: intervention {job.index} enters at layer {job.layer}, above it")
    return names


@dataclass(frozen=True)
class _Plan:
    """How the jobs of a call become batches, and what runs them."""

    model: HookedRecurrentModel
    tokens: Tensor
    horizon: int | None
    memory: int
    last_only: bool
    keep: tuple[str, ...]
    done: frozenset[int]

    def run(
        self, jobs: list[_Job], trunk: Trunk | None, on_progress: Callable[[int, int], None] | None
    ) -> Iterator[Fork]:
        """Text by text, and in a text as many positions at a time as `memory` holds the states of.

        What is done takes its place in the batches all the same, so that the rest runs in the same company, and gives the same
        numbers to the last bit, whenever it runs; a batch that is done as a whole is left out.
        """
        finished, total = 0, sum(job.index not in self.done for job in jobs)
        for row, of_row in groupby(jobs, key=lambda job: job.row):
            mine = list(of_row)
            if self.done.issuperset(job.index for job in mine):
                continue
            text = self.tokens[row : row + 1]
            kept = trunk or Trunk.grow(self.model, text, [mine[0].position])
            for states, here in self._stretches(text, mine, kept):
                for batch in self._batches(here):
                    wanted = sum(job.index not in self.done for job in batch.jobs)
                    if not wanted:
                        continue
                    yield from self._side_by_side(batch, states[batch.start], kept)
                    finished += wanted
                    if on_progress is not None:
                        on_progress(finished, total)

    def _stretches(
        self, text: Tensor, jobs: list[_Job], trunk: Trunk
    ) -> Iterator[tuple[Mapping[int, RecurrentState], list[_Job]]]:
        """The states before some positions of a text, with the jobs there.

        Those that the trunk lacks are taken on the way on from the last one that is there.
        """
        groups = [(position, list(here)) for position, here in groupby(jobs, key=lambda job: job.position)]
        state = trunk.states[max(position for position in trunk.states if position <= groups[0][0])]
        several = max(1, self.memory // max(1, _bytes(state)))
        for now in (groups[i : i + several] for i in range(0, len(groups), several)):
            taken, positions = trunk.states, [position for position, _ in now]
            if not taken.keys() >= set(positions):
                start, last = state.position, positions[-1]
                taken = {start: state}
                if last > start:
                    with torch.no_grad():  # here and not around the generator, whose consumer keeps its own mode
                        taken = self.model.snapshots(text[:, start:last], positions, state=state)
            yield taken, [job for _, here in now for job in here]
            state = taken[positions[-1]]

    def _batches(self, jobs: list[_Job]) -> Iterator[_Batch]:
        """Layer by layer; a batch takes in later positions as long as that is cheap, and as many jobs as `memory` holds."""
        for _, at_layer in groupby(sorted(jobs, key=lambda job: (job.layer, job.position)), key=lambda job: job.layer):
            batch = None
            for job in at_layer:
                single = _Batch((job,), self._end(job), self._end(job) - job.position)
                grown = single if batch is None else batch.joined(single)
                if batch is not None and not self._fits(grown):
                    yield batch
                    grown = single
                batch = grown
            if batch is not None:
                yield batch

    def _fits(self, batch: _Batch) -> bool:
        cheap = len(batch.jobs) * batch.length <= max(FREE_TOKENS, (1 + SLACK) * batch.alone)
        return cheap and len(batch.jobs) * self._bytes_per_row(batch.length) <= self.memory

    def _end(self, job: _Job) -> int:
        length = self.tokens.shape[1]
        return length if self.horizon is None else min(length, job.position + self.horizon + 1)

    def _bytes_per_row(self, length: int) -> int:
        """About what one more row of a batch needs: logits, a layer's activations, and that layer's state before and after."""
        cfg = self.model.cfg
        activations = length * (16 * cfg.d_model + 4 * (cfg.d_mlp or 0))
        logits = cfg.d_vocab * (1 if self.last_only else length)
        matrix, vector = cfg.n_heads * cfg.d_k * cfg.d_v, max(cfg.d_model, cfg.n_heads * max(cfg.d_k, cfg.d_v))
        kept = length * sum(matrix if name.endswith(("hook_write", "hook_state")) else vector for name in self.keep)
        return (activations + logits + kept + 2 * matrix) * self.model.W_E.element_size()

    def _side_by_side(self, batch: _Batch, state: RecurrentState, trunk: Trunk) -> Iterator[Fork]:
        """One batch: a row per job, all from the same state."""
        edits = [edit for slot in zip_longest(*(job.edits for job in batch.jobs)) for edit in _merged(slot)]
        ends = torch.tensor([self._end(job) for job in batch.jobs]) - batch.start
        first = ends - 1 if self.last_only else torch.tensor([job.position for job in batch.jobs]) - batch.start
        count = int((ends - first).max())
        layer, here = batch.jobs[0].layer, slice(batch.start, batch.end)
        kept: dict[str, list[Tensor]] = {name: [] for name in self.keep}
        with torch.no_grad(), self.model.hooks(fwd_hooks=[(name, self._keeper(kept)) for name in self.keep]):
            logits = self.model.run_from(
                layer,
                trunk.inputs[layer][:, here],
                state,
                rows=len(batch.jobs),
                shared={name: tensor[:, here] for name, tensor in trunk.shared.items()},
                edits=edits,
                at=(first[:, None] + torch.arange(count)).clamp(max=batch.length - 1).to(self.tokens.device),
            )
        # a function that edits hook_state has it fire once per position
        activations = {name: torch.cat(parts, dim=1) for name, parts in kept.items()}
        for row, (job, made, length) in enumerate(zip(batch.jobs, logits, (ends - first).tolist(), strict=True)):
            if job.index not in self.done:
                span = slice(job.position - batch.start, int(ends[row]))
                mine = {name: whole[row, span] for name, whole in activations.items()}
                yield Fork(job.index, job.row, job.position, made[:length], mine)

    def _keeper(self, kept: dict[str, list[Tensor]]) -> Callable:
        depth = self.model.clock.depth + 1

        def keep(tensor: Tensor, hook: RecurrentHookPoint) -> None:
            if self.model.clock.depth == depth:  # not in a call that a hook function makes
                kept[str(hook.name)].append(tensor)

        return reads_only(keep)


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
            yield first.in_rows(torch.tensor(rows))
            continue
        key, value = (torch.stack([getattr(edit, side) for edit in several])[:, None] for side in ("key", "value"))
        yield replace(first, batch=torch.tensor(rows), key=key, value=value)


def _bytes(state: RecurrentState) -> int:
    return sum(tensor.nbytes for layer in state.layers for tensor in layer.tensors().values())
