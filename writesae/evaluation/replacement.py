"""The replacement test (WriteSAE, arXiv:2605.12770, section 2 and appendix J): put an atom in the place of a native write.

At a firing of an atom at token t the model's own write of one head is replaced by each of the conditions of
`substitutes.py`, and the output distribution is compared with the untouched run's. The atom wins where its KL is lower
than that of deleting the write. Three readings (protocol decision D4):

    in_recurrence   the write itself is replaced, before it is read: logits at t
    cache           the state is edited after t has been read: logits at t + 1, through one more decay and erase
    horizon         the write itself is replaced: mean over the logits at t + 1 .. t + horizon

The untouched run is one plain forward pass over the passage, and the forks start from a snapshot before t, so the KL of
substituting the native write for itself is the numerical floor of the whole procedure; it is always reported. KL is in
nats, from float64 log-softmax of the model's logits; `kl_*` is KL(edited || native), `kl_reverse_*` KL(native || edited).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel, RecurrentState, WriteEdit
from hooked_recurrent.config import StrictConfig, require_positive
from hooked_recurrent.edits import Form
from writesae.evaluation.firings import CellWrites, Firing, encode_cell, sample_firings
from writesae.evaluation.low_rank import LowRank
from writesae.evaluation.outputs import compare
from writesae.evaluation.replacement_result import ReplacementResult
from writesae.evaluation.substitutes import NATIVE, Substitutes
from writesae.sae.write_sae import WriteSAE

READINGS = ("in_recurrence", "cache", "horizon")


@dataclass(frozen=True)
class ReplacementConfig(StrictConfig):
    """Which firings are tested, and how."""

    atoms: tuple[int, ...] | None = None
    """Listed atoms; None lists every atom that fires."""
    per_atom: int = 5
    """Most firings of one atom."""
    total: int = 600
    """Most firings in all."""
    horizon: int = 16
    """Tokens after t over which the horizon reading averages."""
    first_position: int = 8
    """Earliest position of a firing, so that the state holds something."""
    form: str = "additive"
    """What the native write is: "additive" k v^T (the paper's), or "net", with the erase (protocol decision D1)."""
    seed: int = 2026
    """Seed of the sample of firings and of the random controls."""

    def __post_init__(self) -> None:
        require_positive("ReplacementConfig", per_atom=self.per_atom, total=self.total, horizon=self.horizon)
        require_positive("ReplacementConfig", first_position=self.first_position)
        if self.form not in get_args(Form):
            raise ValueError(f"ReplacementConfig.form must be 'additive' or 'net', got {self.form!r}")


@torch.no_grad()
def replacement(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    tokens: Int[Tensor, "passage pos"],
    *,
    layer: int,
    head: int,
    config: ReplacementConfig | None = None,
    others: Mapping[str, Callable[[Firing], LowRank]] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ReplacementResult:
    """Replace native writes of one cell by single atoms, and measure what it does to the output distribution.

    Args:
        model: any HookedRecurrentModel.
        sae: a WriteSAE whose atoms have the shape of the cell's writes.
        tokens: held-out passages.
        layer, head: the cell.
        config: which firings, which form of the write, seeds.
        others: further conditions by name, measured beside the rest in columns kl_<name> and so on.
        on_progress: called with (firings done, firings in all).

    Raises:
        ValueError, IndexError: for a cell that does not exist or does not fit, and passages too short for the horizon.
    """
    config = config or ReplacementConfig()
    last = tokens.shape[1] - 2 - config.horizon  # the token after the last one read must be known
    if last < config.first_position:
        need = config.first_position + config.horizon + 2
        raise ValueError(f"passages have {tokens.shape[1]} tokens; this test needs at least {need}")
    writes = encode_cell(model, sae, tokens, layer, head)
    firings = sample_firings(
        writes,
        first=config.first_position,
        last=last,
        atoms=config.atoms,
        per_atom=config.per_atom,
        total=config.total,
        seed=config.seed,
    )
    if not firings:
        raise ValueError("no listed atom fires on these passages")
    test = _Test(model, tokens, layer, head, config, writes, Substitutes(sae, writes, config.seed), others or {})
    rows: list[dict[str, Any]] = []
    for index, measured in enumerate(test.run(firings)):
        rows += [{"firing_id": index, **measured_row} for measured_row in measured]
        if on_progress is not None:
            on_progress(index + 1, len(firings))
    return ReplacementResult(pd.DataFrame(rows), layer, head, config.to_dict())


@dataclass(frozen=True)
class _Test:
    model: HookedRecurrentModel
    tokens: Tensor
    layer: int
    head: int
    config: ReplacementConfig
    writes: CellWrites
    substitutes: Substitutes
    others: Mapping[str, Callable[[Firing], LowRank]] = field(default_factory=dict)

    def run(self, firings: list[Firing]) -> Iterator[list[dict[str, Any]]]:
        """Firing by firing, passage by passage: one plain pass and one set of snapshots serve a whole passage."""
        for passage, group in groupby(firings, key=lambda firing: firing.passage):
            mine = list(group)
            text = self.tokens[passage : passage + 1]
            plain = self.model(text)[0]
            moments = {firing.position + offset for firing in mine for offset in (0, 1)}
            snapshots = self.model.snapshots(text, moments)
            for firing in mine:
                yield self._measure(firing, text, plain, snapshots)

    def _measure(
        self, firing: Firing, text: Tensor, plain: Tensor, snapshots: dict[int, RecurrentState]
    ) -> list[dict[str, Any]]:
        t, horizon = firing.position, self.config.horizon
        native = self._native(firing, snapshots[t])
        chosen = self.substitutes.draw(firing, native)
        chosen |= {name: other(firing) for name, other in self.others.items()}
        replaced = self._replace(text[:, t : t + horizon + 1], snapshots[t], list(chosen.values()), t)
        patched = self._patch(text[:, t + 1 : t + 2], snapshots[t + 1], native, list(chosen.values()))
        targets = text[0, 1:]
        at_t = compare(replaced[:, :1], plain[t : t + 1], targets[t : t + 1])
        after = compare(replaced[:, 1:], plain[t + 1 : t + 1 + horizon], targets[t + 1 : t + 1 + horizon])
        later = compare(patched, plain[t + 1 : t + 2], targets[t + 1 : t + 2])
        shared = self._describe(firing, native, chosen)
        readings = zip(READINGS, (at_t, later, after), strict=True)
        return [{**shared, "reading": reading, **_columns(measured, chosen)} for reading, measured in readings]

    def _native(self, firing: Firing, before: RecurrentState) -> LowRank:
        """The native write; in net form with the erase as a second term, erase (probe^T S_{t-1})."""
        key = self.writes.key[firing.passage, firing.position][None]
        value = self.writes.value[firing.passage, firing.position][None]
        if self.config.form == "additive":
            return LowRank(key, value)
        token = self.tokens[firing.passage, firing.position].reshape(1, 1)
        prefix = f"blocks.{self.layer}.mixer.hook_"
        if f"{prefix}erase" not in self.model.hook_dict:
            return LowRank(key, value)
        names = [f"{prefix}erase", f"{prefix}probe"]
        _, cache = self.model.run_with_cache(token, names_filter=names, state=before, return_type=None)
        matrix = before.layers[self.layer].matrix
        assert matrix is not None  # the cell was checked to be recurrent
        erase, probe = (cache[name][0, :, self.head] for name in names)
        erased = probe.to(matrix) @ matrix[0, self.head]
        return LowRank(torch.cat([key, erase]), torch.cat([value, erased.to(value)]))

    def _replace(self, text: Tensor, before: RecurrentState, chosen: list[LowRank], t: int) -> Tensor:
        """Logits [condition, t .. t + horizon, d_vocab] with the write at t replaced before it is read."""
        rows = len(chosen)
        state = before.fork(rows)
        key, value = stack_terms(chosen)
        edits = []
        for term in range(key.shape[1]):
            op = "replace" if term == 0 else "add"
            form = self.config.form if term == 0 else "additive"
            edits.append(
                WriteEdit(self.layer, self.head, t, op, key[:, None, term], value[:, None, term], form=form)  # type: ignore[arg-type]
            )
        return self.model(text.expand(rows, -1), state=state, edits=edits)

    def _patch(self, text: Tensor, after: RecurrentState, native: LowRank, chosen: list[LowRank]) -> Tensor:
        """Logits [condition, t + 1, d_vocab] from a state in which the write was exchanged after t had been read."""
        state = after.fork(len(chosen))
        matrix = state.layers[self.layer].matrix
        assert matrix is not None  # the cell was checked to be recurrent
        key, value = (side.to(matrix) for side in stack_terms(chosen))
        own_key, own_value = native.key.to(matrix), native.value.to(matrix)
        changed = matrix.clone()
        changed[:, self.head] += torch.einsum("rmk,rmv->rkv", key, value) - own_key.mT @ own_value
        return self.model(text.expand(len(chosen), -1), state=state.with_matrix(self.layer, changed))

    def _describe(self, firing: Firing, native: LowRank, chosen: dict[str, LowRank]) -> dict[str, Any]:
        described: dict[str, Any] = {
            "atom": firing.atom,
            "dominant": firing.dominant,
            "passage": firing.passage,
            "position": firing.position,
            "token": int(self.tokens[firing.passage, firing.position]),
            "coefficient": firing.coefficient,
            "dominant_coefficient": firing.dominant_coefficient,
            "write_norm": native.norm(),
            "cosine": chosen["atom_listed_norm"].cosine(native),
            "cosine_dominant": chosen["atom_dominant_norm"].cosine(native),
        }
        return described | {f"norm_{name}": substitute.norm() for name, substitute in chosen.items() if name != NATIVE}


def stack_terms(chosen: list[LowRank]) -> tuple[Float[Tensor, "row term d_k"], Float[Tensor, "row term d_v"]]:
    """The factors of several matrices in one tensor each, padded with zero terms."""
    terms = max(len(matrix.key) for matrix in chosen)

    def padded(side: Tensor) -> Tensor:
        return torch.cat([side, side.new_zeros(terms - len(side), side.shape[1])])

    return torch.stack([padded(m.key) for m in chosen]), torch.stack([padded(m.value) for m in chosen])


def _columns(measured: dict[str, Tensor], chosen: Iterable[str]) -> dict[str, float]:
    return {
        f"{quantity}_{condition}": float(values[row])
        for quantity, values in measured.items()
        for row, condition in enumerate(chosen)
    }
