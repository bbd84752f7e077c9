"""The generation install (WriteSAE, arXiv:2605.12770; protocol 9): make a token appear by writing into one head's memory.

At three consecutive positions that end a prompt a rank-1 write is added in one cell (layer, head), of m times the norm of
the native write there, and the model goes on for twenty greedy tokens. Every direction has the same norm:

    fixed_native_key, fixed_next_query, fixed_atom_key   the paper's value side W_O[h] W_U[T] under three key sides
    lambda           the steepest rank-1 write of that norm: the top singular pair of the gradient Lambda
    lambda_refined   the same after some rounds of ascent, since such norms are far beyond where Lambda is linear
    random, random_value   random key and value sides; a random value side under the native key

and two controls are no writes, but vectors added to the residual stream behind the cell's block at the same positions, as long
as makes their collateral KL that of lambda_refined:

    steering            along W_U[T]
    steering_gradient   along the objective's own gradient there, which no rank-1 form and no head's norm confines
    steering_shorter, steering_gradient_shorter   of the lengths whose KL is at most that, the one best for the target, since
                        the length of equal KL can be far beyond it

Cells: "given" is the caller's. "auto" chooses one per target and prompt: of the `candidates` cells whose Lambda promises most
per native norm, the one in which a refined write gets furthest. "spread" writes into the `spread` most promising cells at
once, each with its share of the norm, so that the squares add up to that of one cell: a head whose read is normalised by
itself can say only so much, however loudly. Every condition of a trial uses the same cells.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.config import StrictConfig, require_positive
from writesae.config import require_at_least_zero, require_one_of
from writesae.evaluation.firings import CellWrites, check_cell, check_passages, encode_cell
from writesae.evaluation.installing.install_context import PLACES, STRATA, Context, Target, draw_targets, install_sites
from writesae.evaluation.installing.install_directions import Cells, atom_keys, fixed_directions, random_directions
from writesae.evaluation.installing.install_edits import Installs, Steering
from writesae.evaluation.installing.install_lambda import (
    OBJECTIVES,
    SPLITS,
    Climb,
    Slope,
    at_cells,
    furthest_cells,
    promising,
    refine,
    slope,
    steepest,
)
from writesae.evaluation.installing.install_measure import included, measure
from writesae.evaluation.installing.install_result import NATIVE, InstallResult
from writesae.evaluation.installing.install_steering import gradient_steering, match_collateral, unembedding_steering
from writesae.evaluation.result import Told
from writesae.sae.write_sae import WriteSAE

CELLS = ("given", "auto", "spread")
READINGS = ("in_recurrence", "cache")


@dataclass(frozen=True)
class InstallConfig(StrictConfig):
    """Which trials are made, and how the directions are found."""

    prompts: int = 30
    """Passages that give prompts (30 in the paper)."""
    positions: int = 5
    """Install positions per passage; each ends a prompt of its own (5 in the paper)."""
    per_stratum: int = 2
    """Targets of each of the four strata per prompt (2 in the paper, which had 8 in all)."""
    strata: tuple[str, ...] = STRATA
    """Which strata; see `install_context`."""
    magnitudes: tuple[float, ...] = (1.5, 3.0, 6.0)
    """Norms of an added write in units of the native write's at the same position and cell."""
    new_tokens: int = 20
    """Greedy tokens in which the target may appear."""
    middle: tuple[int, int] = (100, 1000)
    """First rank of the middle stratum, and first rank behind it."""
    cells: tuple[str, ...] = CELLS
    """Any of "given", "auto" and "spread", as rows of their own."""
    candidates: int = 16
    """How many of the most promising cells "auto" tries."""
    spread: int = 16
    """Into how many cells "spread" writes; all, where there are fewer."""
    objective: str = "greedy"
    """What Lambda is the gradient of; see `install_lambda.objective`."""
    objective_steps: int = 20
    """Steps of the native continuation over which the objective looks; "first" looks at one."""
    rounds: int = 8
    """Rounds of ascent behind lambda_refined."""
    split: str = "native"
    """How an edit's norm is split over the three positions by the Lambda directions: see `install_lambda.budget`."""
    reading: str = "in_recurrence"
    """Whether a position's own query reads what is added there ("in_recurrence") or only later ones ("cache")."""
    steering: bool = True
    """Whether the residual-stream controls are run, which take most of the time."""
    first_position: int = 16
    """Earliest install position."""
    seed: int = 2026
    """Seed of prompts, positions, targets and random directions."""

    def __post_init__(self) -> None:
        owner = "InstallConfig"
        require_positive(owner, prompts=self.prompts, positions=self.positions, per_stratum=self.per_stratum)
        require_positive(owner, new_tokens=self.new_tokens, candidates=self.candidates, spread=self.spread)
        require_positive(owner, objective_steps=self.objective_steps)
        require_at_least_zero(owner, rounds=self.rounds)
        require_one_of(owner, "objective", self.objective, OBJECTIVES)
        require_one_of(owner, "split", self.split, SPLITS)
        require_one_of(owner, "reading", self.reading, READINGS)
        for cell in self.cells:
            require_one_of(owner, "cells", cell, CELLS)
        for stratum in self.strata:
            require_one_of(owner, "strata", stratum, STRATA)
        if not self.cells or not self.magnitudes or min(self.magnitudes) <= 0:
            raise ValueError(f"{owner} needs cells and positive magnitudes, got {self.cells} and {self.magnitudes}")
        if not 0 < self.middle[0] < self.middle[1]:
            raise ValueError(f"{owner}.middle must be two rising ranks above 0, got {self.middle}")
        if self.objective_steps > self.new_tokens:
            raise ValueError(f"{owner}.objective_steps must be at most new_tokens={self.new_tokens}")
        if self.first_position < PLACES:
            raise ValueError(f"{owner}.first_position must be at least {PLACES}, got {self.first_position}")


def install(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    tokens: Int[Tensor, "passage pos"],
    *,
    layer: int,
    head: int,
    config: InstallConfig | None = None,
    on_progress: Told | None = None,
) -> InstallResult:
    """Install tokens into greedy continuations, by every direction and control, and measure what else it does.

    Args:
        model: any HookedRecurrentModel.
        sae: a dictionary of this cell's writes, whose atoms are one of the key sides.
        tokens: held-out passages.
        layer, head: the given cell.
        config: which trials, objective, magnitudes, seeds.
        on_progress: told (prompts done, prompts in all).

    Raises:
        ValueError, IndexError: for a cell that does not exist or does not fit the dictionary, passages that are too short,
            and prompts without any target.
    """
    config = InstallConfig.given(config)
    check_passages(tokens)
    check_cell(model, sae, layer, head)
    if tokens.shape[1] <= config.first_position:
        raise ValueError(
            f"passages have {tokens.shape[1]} tokens; this test needs at least {config.first_position + 1}"
        )
    sites = install_sites(tokens, config.prompts, config.positions, config.first_position, config.seed)
    test = _Test(model, sae, tokens, (layer, head), config, encode_cell(model, sae, tokens, layer, head))
    rows: list[dict[str, Any]] = []
    for done, (passage, position) in enumerate(sites):
        rows += test.run(Context.open(model, tokens, passage, position, config.new_tokens))
        if on_progress is not None:
            on_progress(done + 1, len(sites))
    if not rows:
        raise ValueError("no prompt has a target of any stratum: widen InstallConfig.middle")
    return InstallResult(pd.DataFrame(rows), layer, head, config.to_dict())


@dataclass(frozen=True)
class _Trials:
    """The trials of one context and one way to choose the cells: targets by magnitudes."""

    tokens: Int[Tensor, " trial"]
    of_target: Int[Tensor, " trial"]
    magnitude: Tensor
    cells: Cells
    """A trial's, one after the other."""
    together: int
    norms: Tensor
    """[row, place]: the magnitude times the native norm, shared among a trial's cells."""

    @staticmethod
    def of(context: Context, targets: list[Target], cells: Cells, magnitudes: tuple[float, ...]) -> "_Trials":
        """Magnitude by magnitude, all targets; `cells` are those of the targets, equally many each."""
        device, together = context.text.device, len(cells) // len(targets)
        of_target = torch.arange(len(targets)).repeat(len(magnitudes))
        magnitude = torch.tensor(magnitudes, dtype=torch.float64).repeat_interleave(len(targets))
        tokens = torch.tensor([target.token for target in targets], device=device)[of_target.to(device)]
        native = torch.stack([context.native_norms(layer)[:, head] for layer, head in cells]).repeat(len(magnitudes), 1)
        share = magnitude.to(native).repeat_interleave(together) / together**0.5
        return _Trials(tokens, of_target, magnitude, cells * len(magnitudes), together, native * share[:, None])


@dataclass(frozen=True)
class _Test:
    model: HookedRecurrentModel
    sae: WriteSAE
    tokens: Tensor
    cell: tuple[int, int]
    config: InstallConfig
    writes: CellWrites

    @property
    def climb(self) -> Climb:
        return Climb(self.config.objective, self.config.objective_steps, self.config.reading, self.config.split)  # type: ignore[arg-type]

    def run(self, context: Context) -> list[dict[str, Any]]:
        """Every trial of one prompt: a row per condition."""
        config = self.config
        targets = draw_targets(
            context,
            self.tokens,
            per_stratum=config.per_stratum,
            strata=config.strata,
            middle=config.middle,
            seed=config.seed,
            is_word=self._is_word if self.model.tokenizer is not None else None,
        )
        if not targets:
            return []
        wanted = torch.tensor([target.token for target in targets], device=context.text.device)
        start = slope(self.model, context, wanted, [], self.climb, self.model.cfg.recurrent_layers)
        rows = list(self._native(context, targets, wanted))
        for how in config.cells:
            cells = self._cells(context, wanted, start, how)
            trials = _Trials.of(context, targets, cells, config.magnitudes)
            rows += self._conditions(context, targets, trials, start, how)
        return rows

    def _is_word(self, token: int) -> bool:
        text = str(self.model.to_string(torch.tensor([token]))).strip()
        return len(text) > 3 and text.isalpha()

    def _native(self, context: Context, targets: list[Target], wanted: Tensor) -> Iterator[dict[str, Any]]:
        appears = (context.continuation[None] == wanted[:, None]).any(-1)
        for target, inside in zip(targets, appears.tolist(), strict=True):
            untouched = {"logprob": float(context.log_probs[0, target.token]), "rank": float(target.rank)}
            nothing = {"magnitude": 0.0, "norm": 0.0, "collateral_kl": 0.0, "collateral_kl_reverse": 0.0}
            about = {**self._about(context, target), "condition": NATIVE, "cell": "any", "layer": -1, "head": -1}
            yield {**about, **nothing, **untouched, "included": inside, "delta_logprob": 0.0, "rank_improvement": 0.0}

    def _about(self, context: Context, target: Target) -> dict[str, Any]:
        described = {"target": target.token, "stratum": target.stratum, "initial_rank": target.rank}
        return {"passage": context.passage, "position": context.position, **described}

    def _cells(self, context: Context, wanted: Tensor, start: Slope, how: str) -> Cells:
        if how == "auto":
            return self._choose(context, wanted, start)
        if how == "spread":
            return tuple(cell for mine in promising(context, start.writes, self.config.spread) for cell in mine)
        return (self.cell,) * len(wanted)

    def _choose(self, context: Context, wanted: Tensor, start: Slope) -> Cells:
        """Per target the cell in which a refined write of the middle magnitude gets furthest."""
        config = self.config
        magnitude = sorted(config.magnitudes)[len(config.magnitudes) // 2]
        options = {"candidates": config.candidates, "rounds": config.rounds // 2}
        return furthest_cells(self.model, context, wanted, start, self.climb, magnitude, **options)

    def _conditions(
        self, context: Context, targets: list[Target], trials: _Trials, start: Slope, how: str
    ) -> list[dict[str, Any]]:
        model, first, reading = self.model, context.first, self.climb.reading
        edits = self._directions(context, trials, start, how)
        together = _joined(list(edits.values()))
        tokens = trials.tokens.repeat(len(edits))
        measured = measure(model, context, together.single(first, reading), tokens)
        batch = together.batched(first, reading)
        blocks = {name: {key: found[rows] for key, found in measured.items()} for name, rows in _slices(edits)}
        norms = {name: edit.total_norms for name, edit in edits.items()}
        if self.config.steering:
            wanted = blocks["lambda_refined"]["collateral_kl"]
            for name, steering in self._steering(context, trials, start, wanted).items():
                blocks[name] = measure(model, context, steering.single(first), trials.tokens)
                norms[name] = steering.vector.norm(dim=(-1, -2))
                batch += steering.batched(first, start=len(tokens))
                tokens = torch.cat([tokens, trials.tokens])
        inside = included(model, context, batch, tokens, self.config.new_tokens).view(len(blocks), -1)
        return [
            row
            for (name, block), appears in zip(blocks.items(), inside, strict=True)
            for row in self._rows(context, targets, trials, how, name, {**block, "norm": norms[name]}, appears)
        ]

    def _directions(self, context: Context, trials: _Trials, start: Slope, how: str) -> dict[str, Installs]:
        cells, norms, config, together = trials.cells, trials.norms, self.config, trials.together
        given = atom_keys(self.sae, self.writes, context.passage, context.places) if how == "given" else None
        tokens = trials.tokens.repeat_interleave(together)
        edits = fixed_directions(self.model, context, tokens, cells, norms, given, together)
        gradient = {layer: found[trials.of_target.to(found.device)] for layer, found in start.writes.items()}
        steep = steepest(cells, at_cells(gradient, cells, together), norms, config.split, together)
        refined, _ = refine(self.model, context, trials.tokens, steep, norms, self.climb, config.rounds)
        edits |= {"lambda": steep, "lambda_refined": refined}
        return edits | random_directions(context, cells, norms, trials.of_target, config.seed, together)

    def _steering(self, context: Context, trials: _Trials, start: Slope, wanted: Tensor) -> dict[str, Steering]:
        layers = tuple(layer for layer, _ in trials.cells[:: trials.together])  # behind the most promising cell
        residual = {layer: found[trials.of_target.to(found.device)] for layer, found in start.residual.items()}
        vectors = {
            "steering": unembedding_steering(self.model, trials.tokens, layers),
            "steering_gradient": gradient_steering(residual, layers),
        }
        found: dict[str, Steering] = {}
        for name, vector in vectors.items():
            matched, shorter = match_collateral(self.model, context, vector, trials.tokens, wanted)
            found |= {name: matched, f"{name}_shorter": shorter}
        return found

    def _rows(
        self,
        context: Context,
        targets: list[Target],
        trials: _Trials,
        how: str,
        name: str,
        measured: dict[str, Tensor],
        appears: Tensor,
    ) -> Iterator[dict[str, Any]]:
        for trial, (layer, head) in enumerate(trials.cells[:: trials.together]):
            target = targets[int(trials.of_target[trial])]
            numbers = {key: float(found[trial]) for key, found in measured.items()}
            change = {
                "delta_logprob": numbers["logprob"] - float(context.log_probs[0, target.token]),
                "rank_improvement": target.rank - numbers["rank"],
                "included": bool(appears[trial]),
            }
            where = {"condition": name, "cell": how, "layer": layer, "head": head}
            magnitude = {"magnitude": float(trials.magnitude[trial])}
            yield {**self._about(context, target), **where, **magnitude, **numbers, **change}


def _joined(edits: list[Installs]) -> Installs:
    cells = tuple(cell for edit in edits for cell in edit.cells)
    key, value = torch.cat([edit.key for edit in edits]), torch.cat([edit.value for edit in edits])
    return Installs(cells, key, value, edits[0].together)


def _slices(edits: dict[str, Installs]) -> Iterator[tuple[str, slice]]:
    start = 0
    for name, edit in edits.items():
        yield name, slice(start, start + len(edit))
        start += len(edit)
