"""What adding an atom to one write does to later logits: predicted with nothing fitted, and measured.

At a firing of an atom at token t, eps A is added to the write at t of one head, and the raw logits of the baseline's most
likely tokens, and of one from its tail, are compared with the untouched run's at t + horizon (protocol section 6). A is the
atom that fires, a random one that does not, or a random rank-1 matrix where there is no dictionary of that head. eps is a
share of the native write's norm, or the natural firing amplitude, the atom's own coefficient. The predictors are those of
`logit_shift_predictors.py`; the null predicts with Lambda of another passage's context.

At an edit of 1% the shifts are some 1e-3 of logits near 10, of which float32 keeps 1e-6: everything is therefore computed in
float64, on a copy of the model, unless the config says otherwise.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel, WriteEdit
from hooked_recurrent.config import StrictConfig, require_positive
from hooked_recurrent.patching.forks import Trunk, run_edits
from writesae.evaluation.firings import (
    CellWrites,
    Firing,
    check_atoms,
    check_cell,
    check_passages,
    encode_cell,
    sample_firings,
)
from writesae.evaluation.predicting.logit_shift_context import Cell, Context
from writesae.evaluation.predicting.logit_shift_predictors import PREDICTORS, Added, first_order, predict, reach
from writesae.evaluation.predicting.logit_shift_result import NATURAL, NULL, LogitShiftResult
from writesae.evaluation.result import Told
from writesae.sae.write_sae import WriteSAE


@dataclass(frozen=True)
class LogitShiftConfig(StrictConfig):
    """Which edits are made where, and which logits are looked at."""

    atoms: tuple[int, ...] | None = None
    """Listed atoms; None lists every atom that fires."""
    per_atom: int = 2
    """Most firings of one atom."""
    total: int = 60
    """Most firings in all, each a context."""
    random_atoms: int = 1
    """Atoms that do not fire, or random matrices in a cell without dictionary, per context and cell."""
    cells: tuple[Sequence[int], ...] | None = None
    """Cells (layer, head) that are edited; None is the dictionary's own. Other cells get random rank-1 matrices."""
    fractions: tuple[float, ...] = (0.01, 0.1, 0.36, 1.0)
    """Sizes of the edits, as shares of the native write's norm; the natural amplitude comes on top."""
    horizons: tuple[int, ...] = (0, 1, 4, 16)
    """Positions after t at which logits are looked at."""
    top: int = 5
    """How many of the baseline's most likely tokens."""
    tail_rank: int = 50
    """Baseline rank of the token from the tail."""
    predictors: tuple[str, ...] = PREDICTORS
    """Which predictors are asked."""
    first_position: int = 8
    """Earliest t, so that the state holds something."""
    double: bool = True
    """Whether to compute in float64, on a copy of the model to which no functions are attached."""
    seed: int = 2026
    """Seed of the sample of firings and of the random atoms."""

    def __post_init__(self) -> None:
        name = "LogitShiftConfig"
        require_positive(name, per_atom=self.per_atom, total=self.total, top=self.top, tail_rank=self.tail_rank)
        require_positive(name, first_position=self.first_position)
        if self.cells is not None:
            object.__setattr__(self, "cells", tuple(tuple(cell) for cell in self.cells))  # JSON has lists
            if not self.cells or any(len(cell) != 2 for cell in self.cells):
                raise ValueError(f"{name}.cells must be pairs (layer, head), one at least, got {self.cells}")
        if self.random_atoms < 0 or not self.horizons or min(self.horizons) < 0:
            raise ValueError(
                f"{name} needs random_atoms >= 0 and horizons >= 0, got {self.random_atoms}, {self.horizons}"
            )
        for fraction in self.fractions:
            require_positive(name, fractions=fraction)
        for predictor in self.predictors:
            if predictor not in PREDICTORS:
                raise ValueError(f"{name}.predictors must be among {', '.join(PREDICTORS)}, got {predictor!r}")
        if self.tail_rank <= self.top:
            raise ValueError(f"{name}.tail_rank must lie behind the top {self.top}, got {self.tail_rank}")


def logit_shift(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    tokens: Int[Tensor, "passage pos"],
    *,
    layer: int,
    head: int,
    config: LogitShiftConfig | None = None,
    on_progress: Told | None = None,
) -> LogitShiftResult:
    """Predict and measure how adding atoms to single writes shifts logits (WriteSAE, arXiv:2605.12770, section 3).

    Args:
        model: any HookedRecurrentModel.
        sae: a WriteSAE of the cell's writes, whose atoms are outer products.
        tokens: held-out passages.
        layer, head: the dictionary's cell, where the firings are looked for.
        config: which edits, which logits.
        on_progress: called with (contexts done, contexts in all).

    Raises:
        ValueError, IndexError: for cells that do not exist or do not fit, passages too short for the horizon, a vocabulary
            smaller than the tail's rank, and when no listed atom fires.
    """
    config = LogitShiftConfig.given(config)
    check_passages(tokens)
    check_cell(model, sae, layer, head)
    check_atoms(sae, config.atoms or ())
    cells = tuple((at, which) for at, which in config.cells or ((layer, head),))
    _check(model, tokens, cells, config)
    writes = encode_cell(model, sae, tokens, layer, head)
    firings = sample_firings(
        writes,
        first=config.first_position,
        last=tokens.shape[1] - 1 - max(config.horizons),
        atoms=config.atoms,
        per_atom=config.per_atom,
        total=config.total,
        seed=config.seed,
    )
    if not firings:
        raise ValueError("no listed atom fires on these passages")
    if config.double:
        model = in_float64(model)
    test = _Test(model, sae, tokens.to(model.device), (layer, head), cells, config, writes)
    rows: list[dict[str, Any]] = []
    for index, measured in enumerate(test.run(firings)):
        rows += [{"context": index, **row} for row in measured]
        if on_progress is not None:
            on_progress(index + 1, len(firings))
    return LogitShiftResult(pd.DataFrame(rows), layer, head, config.to_dict())


def in_float64(model: HookedRecurrentModel) -> HookedRecurrentModel:
    """The same model in float64: a copy, without gradients and without the functions attached to the original."""
    copy = HookedRecurrentModel(model.cfg, model.tokenizer).to(device=model.device, dtype=torch.float64)
    copy.load_state_dict(model.state_dict())
    return copy.requires_grad_(False).eval()


@dataclass(frozen=True)
class _Planned:
    """One edit of a context: which matrix at which size."""

    cell: Cell
    atom: int
    source: str
    size: str
    amplitude: float
    key: Float[Tensor, "term d_k"]
    value: Float[Tensor, "term d_v"]


@dataclass(frozen=True)
class _Test:
    model: HookedRecurrentModel
    sae: WriteSAE
    tokens: Tensor
    own: Cell
    cells: tuple[Cell, ...]
    config: LogitShiftConfig
    writes: CellWrites

    def run(self, firings: list[Firing]) -> Iterator[list[dict[str, Any]]]:
        """Context by context; one plain pass serves a whole passage, one backward pass all cells and edits of a context."""
        drawn = self._draw(firings)
        stranger: dict[Cell, Tensor] = {}  # Lambda of the last context of the passage before
        for passage, group in groupby(zip(firings, drawn, strict=True), key=lambda pair: pair[0].passage):
            mine = list(group)
            trunk = Trunk.grow(
                self.model, self.tokens[passage : passage + 1], sorted({firing.position for firing, _ in mine})
            )
            latest: dict[Cell, Tensor] = {}
            for firing, matrices in mine:
                context = self._context(trunk, firing.position)
                planned = [edit for cell in self.cells for edit in self._plan(context, cell, firing, matrices[cell])]
                yield self._measure(context, firing, planned, stranger)
                latest = {cell: context.lambdas(cell) for cell in self.cells}
            stranger = latest

    def _context(self, trunk: Trunk, position: int) -> Context:
        config = self.config
        layers = {layer for layer, _ in self.cells}
        options = {"horizons": config.horizons, "top": config.top, "tail_rank": config.tail_rank}
        return Context.run(self.model, trunk, position, layers, **options)  # type: ignore[arg-type]

    def _draw(self, firings: list[Firing]) -> list[dict[Cell, list[tuple[int, Tensor, Tensor]]]]:
        """Everything random, before anything runs: per context and cell (atom or -1, unit matrix's key and value sides)."""
        generator, cfg = torch.Generator().manual_seed(self.config.seed), self.model.cfg
        drawn = []
        for firing in firings:
            silent = torch.ones(self.sae.config.n_atoms, dtype=torch.bool)
            codes = self.writes.codes
            silent[codes.indices[firing.passage, firing.position][codes.active[firing.passage, firing.position]]] = (
                False
            )
            here: dict[Cell, list[tuple[int, Tensor, Tensor]]] = {}
            for cell in self.cells:
                if cell == self.own:
                    others = silent.nonzero()[:, 0]
                    picked = others[torch.randperm(len(others), generator=generator)[: self.config.random_atoms]]
                    here[cell] = [(atom, *self._unit(atom)) for atom in [firing.atom, *picked.tolist()]]
                    continue
                sides = [
                    [torch.randn(1, width, generator=generator, dtype=torch.float64) for width in (cfg.d_k, cfg.d_v)]
                    for _ in range(max(1, self.config.random_atoms))
                ]
                here[cell] = [(-1, key / key.norm(), value / value.norm()) for key, value in sides]
            drawn.append(here)
        return drawn

    def _unit(self, atom: int) -> tuple[Tensor, Tensor]:
        """The atom's sides, at Frobenius norm 1."""
        key, value = (side[atom].detach().double() for side in (self.sae.key_atoms, self.sae.value_atoms))
        return key, value / self._norm(atom)

    def _norm(self, atom: int) -> float:
        return float(self.sae.atom_norms()[atom].detach())

    def _plan(
        self, context: Context, cell: Cell, firing: Firing, matrices: list[tuple[int, Tensor, Tensor]]
    ) -> list[_Planned]:
        """The edits of one cell: every matrix at every size; a silent atom's natural size is that of the one that fires."""
        native, planned = context.write_norm(cell), []
        for atom, key, value in matrices:
            source = "gaussian" if atom < 0 else ("firing" if atom == firing.atom else "silent")
            sizes = {str(fraction): fraction * native for fraction in self.config.fractions}
            if source != "gaussian":
                sizes[NATURAL] = firing.coefficient * self._norm(firing.atom)
            dtype, device = self.model.dtype, self.model.device
            for size, amplitude in sizes.items():
                sides = key.to(device, dtype), (value * amplitude).to(device, dtype)
                planned.append(_Planned(cell, atom, source, size, amplitude, *sides))
        return planned

    def _measure(
        self, context: Context, firing: Firing, planned: list[_Planned], stranger: dict[Cell, Tensor]
    ) -> list[dict[str, Any]]:
        measured, predicted = self._shifts(context, planned), self._predictions(context, planned, stranger)
        targets = context.targets
        which = {"horizon": targets.horizon.tolist(), "rank": targets.rank.tolist(), "token": targets.token.tolist()}
        rows = []
        for index, edit in enumerate(planned):
            shared: dict[str, Any] = {
                "passage": firing.passage,
                "position": firing.position,
                "layer": edit.cell[0],
                "head": edit.cell[1],
                "atom": edit.atom,
                "source": edit.source,
                "size": edit.size,
                "amplitude": edit.amplitude,
                "fraction": edit.amplitude / context.write_norm(edit.cell),
            }
            for row, kind in enumerate(targets.kind):
                target = {name: values[row] for name, values in which.items()} | {"tokens": kind}
                made = {name: float(values[index, row]) for name, values in predicted.items()}
                rows.append({**shared, **target, "measured": float(measured[index, row]), **made})
        return rows

    def _shifts(self, context: Context, planned: list[_Planned]) -> Float[Tensor, "edit row"]:
        """What every edit truly did to the targets' logits."""
        edits = [
            [WriteEdit(*edit.cell, context.position, "add", k, v) for k, v in zip(edit.key, edit.value, strict=True)]
            for edit in planned
        ]
        trunk, made = context.trunk, torch.empty(len(planned), len(context.native), dtype=self.model.dtype)
        for fork in run_edits(self.model, trunk.text, edits, horizon=context.length - 1, trunk=trunk):
            made[fork.index] = (context.targets.of(fork.logits[None])[0] - context.native).cpu()
        return made

    def _predictions(
        self, context: Context, planned: list[_Planned], stranger: dict[Cell, Tensor]
    ) -> dict[str, Float[Tensor, "edit row"]]:
        """Every predictor, the null, and how far the edit reaches; cell by cell, in the order of the plan."""
        per_cell = []
        for cell, group in groupby(planned, key=lambda edit: edit.cell):
            edits = list(group)
            added = Added(torch.stack([edit.key for edit in edits]), torch.stack([edit.value for edit in edits]))
            made = predict(context, cell, added, self.config.predictors)
            made |= reach(context, cell, added)
            unknown = torch.full((len(edits), len(context.native)), float("nan"))
            made[NULL] = first_order(stranger[cell], added) if cell in stranger else unknown
            per_cell.append(made)
        return {name: torch.cat([made[name].cpu() for made in per_cell]) for name in per_cell[0]}


def _check(model: HookedRecurrentModel, tokens: Tensor, cells: tuple[Cell, ...], config: LogitShiftConfig) -> None:
    """Raise for what would only fail after some work."""
    cfg = model.cfg
    for layer, head in cells:
        if layer not in cfg.recurrent_layers or not 0 <= head < cfg.n_heads:
            raise IndexError(
                f"there is no cell ({layer}, {head}): the recurrent layers are {cfg.recurrent_layers}, with heads 0 to "
                f"{cfg.n_heads - 1}"
            )
    need = config.first_position + max(config.horizons) + 1
    if tokens.shape[1] < need:
        raise ValueError(f"passages have {tokens.shape[1]} tokens; this experiment needs at least {need}")
    if config.tail_rank > cfg.d_vocab:
        raise ValueError(f"tail_rank is {config.tail_rank}, but the vocabulary has {cfg.d_vocab} tokens")
