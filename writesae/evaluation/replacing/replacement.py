"""The replacement test (WriteSAE, arXiv:2605.12770, section 2 and appendix J): put an atom in the place of a native write.

At a firing of an atom at token t the model's own write of one head is replaced by each of the conditions of
`substitutes.py`, and the output distribution is compared with the untouched run's. The atom wins where its KL is lower
than that of deleting the write. Three readings (protocol decision D4):

    in_recurrence   the write itself is replaced, before it is read: logits at t
    cache           the state is edited after t has been read: logits at t + 1, through one more decay and erase
    horizon         the write itself is replaced: mean over the logits at t + 1 .. t + horizon

The dictionary may be one of additive writes, of net writes, or of states (the paper's: an atom fires on S_t and is put in
the write's place); `firings.py` encodes each. The untouched run is one plain forward pass over the passage, and the forks
start from a snapshot before t (`exchange.py`), so the KL of substituting the native write for itself is the numerical floor
of the whole procedure; it is always reported. KL is in nats, from float64 log-softmax of the model's logits; `kl_*` is
KL(edited || native), `kl_reverse_*` KL(native || edited).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, get_args

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.config import StrictConfig, require_positive
from hooked_recurrent.edits import Form
from hooked_recurrent.files import plain
from writesae.config import require_one_of
from writesae.evaluation.firings import (
    CellWrites,
    Firing,
    check_atoms,
    check_cell,
    check_passages,
    encode_cell,
    sample_firings,
    trained_on,
)
from writesae.evaluation.low_rank import LowRank
from writesae.evaluation.replacing.exchange import READINGS, Exchanges, columns
from writesae.evaluation.replacing.replacement_result import ReplacementResult
from writesae.evaluation.replacing.substitutes import DENSE, NATIVE, Others, Substitutes, check_others
from writesae.sae.write_sae import WriteSAE


class NoFirings(ValueError):
    """No listed atom fires on the passages: there is nothing to replace."""


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
    form: str | None = None
    """What the native write is: "additive" k v^T (the paper's), or "net", with the erase (protocol decision D1); None takes
    what the dictionary was trained on, "additive" for one of states."""
    readings: tuple[str, ...] = READINGS
    """Which of "in_recurrence", "cache" and "horizon" are measured; without the horizon a firing costs a few tokens."""
    dense_atoms: str = "leading"
    """What stands for an atom that is a whole matrix: its "leading" singular pair, or the "whole" matrix."""
    memory: int = 2**28
    """About how many bytes the logits and activations of one batch may take."""
    seed: int = 2026
    """Seed of the sample of firings and of the random controls."""

    def __post_init__(self) -> None:
        require_positive("ReplacementConfig", per_atom=self.per_atom, total=self.total, horizon=self.horizon)
        require_positive("ReplacementConfig", first_position=self.first_position, memory=self.memory)
        if self.form is not None and self.form not in get_args(Form):
            raise ValueError(f"ReplacementConfig.form must be 'additive' or 'net', got {self.form!r}")
        if not self.readings:
            raise ValueError(f"ReplacementConfig.readings must name one of {', '.join(READINGS)} at least")
        for reading in self.readings:
            require_one_of("ReplacementConfig", "readings", reading, READINGS)
        require_one_of("ReplacementConfig", "dense_atoms", self.dense_atoms, DENSE)


@torch.no_grad()
def replacement(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    tokens: Int[Tensor, "passage pos"],
    *,
    layer: int,
    head: int,
    config: ReplacementConfig | None = None,
    others: Others | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ReplacementResult:
    """Replace native writes of one cell by single atoms, and measure what it does to the output distribution.

    Args:
        model: any HookedRecurrentModel.
        sae: a dictionary of the cell's writes, net writes or states, with atoms of any kind.
        tokens: held-out passages.
        layer, head: the cell.
        config: which firings, which form of the write, which readings, seeds.
        others: further conditions by name, measured beside the built-in ones in columns kl_{name} and so on: from a firing the
            matrix that stands in the write's place. What they draw at random must follow from the firing alone.
        on_progress: called with (firings done, firings in all).

    Raises:
        ValueError, IndexError: for a cell that does not exist or does not fit, passages too short for the horizon, and a
            name of a further condition that is taken.
        NoFirings: where no listed atom fires.
    """
    config, others = ReplacementConfig.given(config), others or {}
    check_passages(tokens)
    check_cell(model, sae, layer, head)
    check_atoms(sae, config.atoms or ())
    check_others(others)
    last = tokens.shape[1] - 2 - config.horizon  # the token after the last one read must be known
    if last < config.first_position:
        need = config.first_position + config.horizon + 2
        raise ValueError(f"passages have {tokens.shape[1]} tokens; this test needs at least {need}")
    config = replace(config, form=config.form or trained_on(sae, layer, head).form)
    writes = encode_cell(model, sae, tokens, layer, head, net=config.form == "net")
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
        raise NoFirings("no listed atom fires on these passages")
    substitutes = Substitutes(sae, writes, config.seed, config.dense_atoms, others)
    test = _Test(model, tokens, layer, head, config, writes, substitutes, writes.rates(sae.config.n_atoms).tolist())
    rows: list[dict[str, Any]] = []
    for index, measured in enumerate(test.run(firings)):
        rows += [{"firing_id": index, **measured_row} for measured_row in measured]
        if on_progress is not None:
            on_progress(index + 1, len(firings))
    return ReplacementResult(pd.DataFrame(rows), layer, head, plain(config.to_dict()))


@dataclass(frozen=True)
class _Test:
    model: HookedRecurrentModel
    tokens: Tensor
    layer: int
    head: int
    config: ReplacementConfig
    writes: CellWrites
    substitutes: Substitutes
    rates: list[float]

    def run(self, firings: list[Firing]) -> Iterator[list[dict[str, Any]]]:
        """The rows of every firing, passage by passage: one plain pass and one trunk of forks serve a whole passage."""
        config = self.config
        form: Any = config.form
        forks = Exchanges(self.model, self.layer, self.head, form, config.readings, config.horizon, config.memory)
        for passage, group in groupby(firings, key=lambda firing: firing.passage):
            mine = list(group)
            natives = [self.writes.native(passage, firing.position, form) for firing in mine]
            drawn = [self.substitutes.draw(*pair) for pair in zip(mine, natives, strict=True)]
            text = self.tokens[passage : passage + 1].to(self.model.device)
            chosen = [list(one.values()) for one in drawn]
            found: list[dict[str, dict[str, Any]]] = [{} for _ in mine]
            for entry, reading, measured in forks.measure(text, [firing.position for firing in mine], chosen):
                found[entry][reading] = {"reading": reading, **columns(measured, list(drawn[entry]))}
                if len(found[entry]) == len(config.readings):
                    shared = self._describe(mine[entry], natives[entry], drawn[entry])
                    yield [{**shared, **found[entry][name]} for name in READINGS if name in config.readings]
                    found[entry].clear()

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
            "rate": self.rates[firing.atom],
            "rate_dominant": self.rates[firing.dominant],
        }
        return described | {f"norm_{name}": substitute.norm() for name, substitute in chosen.items() if name != NATIVE}
