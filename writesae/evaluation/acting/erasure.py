"""Erasing what an atom wrote, and writing it where the model did not (WriteSAE, arXiv:2605.12770, cache erasure).

The preferred token of an atom is the one that loses most when the atom's writes are deleted: the argmax over tokens of the sum
over firings of log p_native - log p_delete. Choosing it and testing it on the same firings would find an effect in noise, so it
is chosen on the firings of one half of the passages ("select") and tested on those of the other ("test"); the circular number
stands beside it, named "same_half". Three tests, each a row of `test` in the table:

    erase   at firings: the native write goes ("delete"), or the atom's contribution alone does, S - a_i A_i ("atom")
    write   at positions where the atom is silent: S + m a* A_i, with a* the atom's median coefficient ("atom")
    floor   at firings: the native write is put back in its place ("native")

The null is the same with another atom and with another token. "random_atom" takes away (or adds) one atom, drawn per atom
under study, that is silent at all these positions, at the same norm; where it is taken away, its own preferred token is chosen
on the same half in the same way (`token_kind` "own"), so that whatever the choice itself brings about is in it too. And the
atom's own conditions are read out at random tokens as well ("random"), one drawn per position.

`delta` is the change of the log-probability of the token, edited minus native, in nats; `rank` counts the likelier tokens.
Readings as in the replacement test (protocol decision D4): in_recurrence (logits at t), cache (the state is edited after t was
read: logits at t + 1), horizon (mean over t + 1 .. t + horizon).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.config import StrictConfig, require_positive
from hooked_recurrent.edits import Form
from hooked_recurrent.patching import run_edits
from writesae.config import require_one_of
from writesae.evaluation.acting.atom_edits import chosen_atoms
from writesae.evaluation.acting.erasure_plan import Trial, plan_trials
from writesae.evaluation.acting.erasure_result import ErasureResult
from writesae.evaluation.firings import check_passages, encode_cell
from writesae.evaluation.outputs import compare
from writesae.evaluation.result import Told
from writesae.sae.write_sae import WriteSAE

READINGS = ("in_recurrence", "cache", "horizon")


@dataclass(frozen=True)
class ErasureConfig(StrictConfig):
    """Which atoms are erased and written, where, and how it is read out."""

    atoms: tuple[int, ...] | None = None
    """Listed atoms; None takes those that fire most often."""
    count: int = 8
    """How many atoms are taken where none are listed."""
    per_atom: int = 100
    """Most firings of an atom, both halves together."""
    writes: int = 40
    """Most silent positions at which an atom is written, all in the half that tests."""
    doses: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
    """Multiples m of the median coefficient at which it is written there; the slope is fitted over all of them."""
    readings: tuple[str, ...] = READINGS
    """Which read-outs are measured."""
    horizon: int = 16
    """Tokens after t over which the horizon reading averages."""
    first_position: int = 8
    """Earliest position, so that the state holds something."""
    form: str = "additive"
    """What deletion takes: "additive" k v^T (the paper's native write), or "net", with the erase (protocol decision D1)."""
    seed: int = 2026
    """Seed of halves, firings, silent positions, random atoms and random tokens."""

    def __post_init__(self) -> None:
        require_positive("ErasureConfig", count=self.count, writes=self.writes, horizon=self.horizon)
        require_positive("ErasureConfig", first_position=self.first_position)
        if self.per_atom < 2:
            raise ValueError(f"ErasureConfig.per_atom must be at least 2, one firing a half, got {self.per_atom}")
        if not self.doses or any(not dose > 0 for dose in self.doses) or len(set(self.doses)) < len(self.doses):
            raise ValueError(f"ErasureConfig.doses must be different numbers greater than 0, got {self.doses}")
        if not self.readings:
            raise ValueError("ErasureConfig.readings is empty; a test needs at least one read-out")
        for reading in self.readings:
            require_one_of("ErasureConfig", "readings", reading, READINGS)
        require_one_of("ErasureConfig", "form", self.form, get_args(Form))


@torch.no_grad()
def erasure(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    tokens: Int[Tensor, "passage pos"],
    *,
    layer: int,
    head: int,
    config: ErasureConfig | None = None,
    on_progress: Told | None = None,
) -> ErasureResult:
    """Erase atoms of one cell where they fire, write them where they do not, and follow their preferred tokens.

    Args:
        model: any HookedRecurrentModel.
        sae: a WriteSAE that fits the cell.
        tokens: held-out passages, four at least.
        layer, head: the cell.
        config: which atoms and positions, doses, readings, seed.
        on_progress: told (interventions done, interventions in all).

    Raises:
        ValueError, IndexError: for a cell that does not exist or does not fit, passages too short or too few, and listed atoms
            that do not fire in both halves.
    """
    config = ErasureConfig.given(config)
    check_passages(tokens)
    last = tokens.shape[1] - 2 - config.horizon
    if last < config.first_position:
        need = config.first_position + config.horizon + 2
        raise ValueError(f"passages have {tokens.shape[1]} tokens; this test needs at least {need}")
    writes = encode_cell(model, sae, tokens, layer, head)
    window = {"first": config.first_position, "last": last}
    atoms = chosen_atoms(writes, sae.config.n_atoms, atoms=config.atoms, count=config.count, least=4, **window)
    trials = plan_trials(sae, writes, atoms, config, layer=layer, head=head, d_vocab=model.cfg.d_vocab, **window)
    study = _Study(model, tokens, config, len(trials), on_progress)
    preferred = study.choose([trial for trial in trials if trial.selects])
    rows = study.measure(trials, preferred)
    return ErasureResult(pd.DataFrame(rows), layer, head, config.to_dict())


class _Study:
    """Runs planned trials: once over those that choose the tokens, then over all to measure them."""

    def __init__(
        self, model: HookedRecurrentModel, tokens: Tensor, config: ErasureConfig, total: int, told: Told | None
    ):
        self.model, self.tokens, self.config, self.told = model, tokens, config, told
        calls = ("in_recurrence", "cache") if "cache" in config.readings else ("in_recurrence",)
        # horizon and in_recurrence are read off one fork
        self.calls = calls if {"in_recurrence", "horizon"} & set(config.readings) else ("cache",)
        self.total, self.done = total * len(self.calls), 0

    def choose(self, trials: list[Trial]) -> dict[tuple[int, str, str], int]:
        """Per atom, condition and reading the token whose log-probability falls most, summed over the trials."""
        self.total += len(trials) * len(self.calls)
        lost: dict[tuple[int, str, str], Tensor] = {}
        for trial, reading, edited, plain in self._runs(trials):
            fall = (plain.double().log_softmax(-1) - edited.double().log_softmax(-1)).mean(0)
            place = (trial.atom, trial.condition, reading)
            lost[place] = lost[place] + fall if place in lost else fall
        return {place: int(fall.argmax()) for place, fall in lost.items()}

    def measure(self, trials: list[Trial], preferred: dict[tuple[int, str, str], int]) -> list[dict[str, Any]]:
        """A row per trial, reading and token, in the order of the trials whatever order they ran in."""
        found: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for trial, reading, edited, plain in self._runs(trials):
            wanted = {"preferred": preferred[trial.atom, "delete", reading], "random": trial.random_token}
            if trial.condition == "random_atom":
                own = preferred[trial.atom, "random_atom", reading]
                wanted = {"own": own} if trial.test == "erase" else {"preferred": wanted["preferred"]}
            rows = [
                {
                    **trial.columns(),
                    "reading": reading,
                    "token_kind": kind,
                    "token": token,
                    **_read(edited, plain, token),
                }
                for kind, token in wanted.items()
            ]
            found[trial.index, READINGS.index(reading)] = rows
        return [row for place in sorted(found) for row in found[place]]

    def _runs(
        self, trials: list[Trial]
    ) -> Iterator[tuple[Trial, str, Float[Tensor, "pos d_vocab"], Float[Tensor, "pos d_vocab"]]]:
        """Every trial in every reading: the edited logits and the native ones at the positions of the reading."""
        for call in self.calls:
            horizon = {"cache": 1, "in_recurrence": self.config.horizon if "horizon" in self.config.readings else 0}[
                call
            ]
            interventions = [trial.edits[call] for trial in trials]
            row, plain = -1, torch.empty(0)
            for fork in run_edits(self.model, self.tokens, interventions, horizon=horizon, last_only=call == "cache"):
                if fork.row != row:
                    row, plain = fork.row, self.model(self.tokens[fork.row : fork.row + 1])[0]
                trial, t = trials[fork.index], fork.position
                if call == "cache":
                    yield trial, "cache", fork.logits, plain[t + 1 : t + 2]
                if call == "in_recurrence" and "in_recurrence" in self.config.readings:
                    yield trial, "in_recurrence", fork.logits[:1], plain[t : t + 1]
                if call == "in_recurrence" and "horizon" in self.config.readings:
                    yield trial, "horizon", fork.logits[1:], plain[t + 1 : t + 1 + horizon]
                self.done += 1
                if self.told is not None:
                    self.told(self.done, self.total)


def _read(edited: Float[Tensor, "pos d_vocab"], plain: Float[Tensor, "pos d_vocab"], token: int) -> dict[str, float]:
    """What became of one token, and of the whole distribution, averaged over positions."""
    target = torch.full((len(plain),), token, device=plain.device)
    after, before = compare(edited[None], plain, target), compare(plain[None], plain, target)
    return {
        "logprob_native": float(before["logprob"]),
        "logprob": float(after["logprob"]),
        "delta": float(after["logprob"] - before["logprob"]),
        "rank_native": float(before["rank"]),
        "rank": float(after["rank"]),
        "kl": float(after["kl"]),
        "kl_reverse": float(after["kl_reverse"]),
    }
