"""Who reads an atom's writes: what deleting them does to the output of every later head (protocol 11.6).

At a firing of an atom at t the native write of its cell is deleted, and the output of every head of every LATER layer (hook_z,
just before W_O) is compared with the native run's at t .. t + horizon:

    change = |z_edited - z_native| / |z_native|          norms over these positions and the head's width

A head's change depends on the position as much as on the write, so each firing is paired with a control: the write of the same
cell, in the same passage, at a random position where the atom is silent, whose norm comes nearest to the firing's. The
`ratio` of a reader is the geometric mean over pairs of change at the firing / change at the control; 1 means that the head does
not care whether the write was the atom's. Heads below the edit, or beside it in its layer, cannot read it and are left out:
the correlational measure of the WriteSAE paper names readers that lie before the write.

`specificity` is the ratio over the geometric mean of the ratios of all later heads, pair by pair: an atom whose firings carry
writes that matter more to everything has large ratios everywhere, and a specificity of 1.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel, WriteEdit
from hooked_recurrent.config import StrictConfig, require_positive
from hooked_recurrent.edits import Form
from hooked_recurrent.patching import run_edits
from writesae.config import require_one_of
from writesae.evaluation.acting.atom_edits import chosen_atoms
from writesae.evaluation.acting.readers_result import ReadersResult
from writesae.evaluation.describing.contexts import atom_coefficients
from writesae.evaluation.firings import CellWrites, check_passages, encode_cell
from writesae.evaluation.result import Told
from writesae.sae.write_sae import WriteSAE

_Z = re.compile(r"blocks\.(\d+)\.(?:mixer|attn)\.hook_z")
NATIVE, FIRING, CONTROL = "native", "firing", "control"


@dataclass(frozen=True)
class ReadersConfig(StrictConfig):
    """Whose readers are sought, and over how many firings and tokens."""

    atoms: tuple[int, ...] | None = None
    """Listed atoms; None takes those that fire most often."""
    count: int = 8
    """How many atoms are taken where none are listed."""
    per_atom: int = 40
    """Most firings of an atom."""
    horizon: int = 16
    """Tokens after t over which the outputs of heads are compared."""
    first_position: int = 8
    """Earliest position, so that the state holds something."""
    form: str = "additive"
    """What deletion takes: "additive" k v^T (the paper's native write), or "net", with the erase (protocol decision D1)."""
    seed: int = 2026
    """Seed of the choice of firings, and of the order in which controls are looked for."""

    def __post_init__(self) -> None:
        require_positive("ReadersConfig", count=self.count, per_atom=self.per_atom, horizon=self.horizon)
        require_positive("ReadersConfig", first_position=self.first_position)
        require_one_of("ReadersConfig", "form", self.form, get_args(Form))


@dataclass(frozen=True)
class _Deletion:
    pair: int
    kind: str
    atom: int
    passage: int
    position: int
    norm: float


@torch.no_grad()
def readers(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    tokens: Int[Tensor, "passage pos"],
    *,
    layer: int,
    head: int,
    config: ReadersConfig | None = None,
    on_progress: Told | None = None,
) -> ReadersResult:
    """Measure how much every later head's output changes when an atom's writes are deleted, against matched other writes.

    Args:
        model: any HookedRecurrentModel; softmax layers of hybrids are readers like any other.
        sae: a WriteSAE that fits the cell.
        tokens: held-out passages.
        layer, head: the cell.
        config: which atoms, how many firings, horizon, seed.
        on_progress: told (deletions done, deletions in all).

    Raises:
        ValueError, IndexError: for a cell that does not exist, does not fit or has no layer above it, passages too short, and
            listed atoms that do not fire in two passages.
    """
    config = ReadersConfig.given(config)
    check_passages(tokens)
    last = tokens.shape[1] - 1 - config.horizon
    if last < config.first_position:
        need = config.first_position + config.horizon + 1
        raise ValueError(f"passages have {tokens.shape[1]} tokens; this test needs at least {need}")
    writes = encode_cell(model, sae, tokens, layer, head)
    hooks = later_heads(model, layer)
    window = {"first": config.first_position, "last": last}
    atoms = chosen_atoms(writes, sae.config.n_atoms, atoms=config.atoms, count=config.count, **window)
    deletions = [one for atom in atoms for one in _pairs(writes, atom, config, **window)]
    if not deletions:
        raise ValueError("every atom fires at every position of its passages, so that no control is left")
    rows: list[dict[str, Any]] = []
    for done, some in enumerate(_measure(model, tokens, writes, deletions, hooks, layer, head, config)):
        rows += some
        if on_progress is not None:
            on_progress(done + 1, len(deletions))
    table = pd.DataFrame(rows).sort_values(["pair", "kind", "layer", "head"], kind="stable", ignore_index=True)
    return ReadersResult(table, layer, head, config.to_dict())


def later_heads(model: HookedRecurrentModel, layer: int) -> dict[str, int]:
    """The hook_z of every layer above this one, each with its layer; `ValueError` where there is none."""
    found = {name: int(match[1]) for name in model.hook_dict if (match := _Z.fullmatch(name)) and int(match[1]) > layer}
    if not found:
        raise ValueError(f"layer {layer} is the last of {model.cfg.n_layers}: no head lies above it to read its writes")
    return found


def _pairs(writes: CellWrites, atom: int, config: ReadersConfig, *, first: int, last: int) -> Iterator[_Deletion]:
    """A random choice of the atom's firings, each with its control, and the first of each passage with a native stand-in.

    A control serves once, unless its passage has fewer silent positions than firings.
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + atom)
    norms, coefficients = writes.norms.cpu(), atom_coefficients(writes, atom).cpu()
    fires = (coefficients > 0).nonzero()
    fires = fires[(fires[:, 1] >= first) & (fires[:, 1] <= last)]
    chosen = fires[torch.randperm(len(fires), generator=generator)[: config.per_atom]].tolist()
    used: set[tuple[int, int]] = set()
    for index, (passage, t) in enumerate(sorted(chosen)):
        silent = (coefficients[passage, first : last + 1] == 0).nonzero()[:, 0] + first
        free = [s for s in silent.tolist() if (passage, s) not in used] or silent.tolist()
        if not free:
            continue
        shuffled = torch.tensor(free)[torch.randperm(len(free), generator=generator)]
        distance = (norms[passage, shuffled].clamp_min(1e-30).log() - norms[passage, t].clamp_min(1e-30).log()).abs()
        control = int(shuffled[distance.argmin()])
        used.add((passage, control))
        pair = atom * 1_000_000 + index
        yield _Deletion(pair, FIRING, atom, passage, t, float(norms[passage, t]))
        yield _Deletion(pair, CONTROL, atom, passage, control, float(norms[passage, control]))
        yield _Deletion(pair, NATIVE, atom, passage, t, float(norms[passage, t]))


def _measure(
    model: HookedRecurrentModel,
    tokens: Tensor,
    writes: CellWrites,
    deletions: list[_Deletion],
    hooks: dict[str, int],
    layer: int,
    head: int,
    config: ReadersConfig,
) -> Iterator[list[dict[str, Any]]]:
    """The rows of every deletion, one per later head, in the order in which forks come."""
    edits = [_edit(writes, one, layer, head, config.form) for one in deletions]
    row, native = -1, {}
    forks = run_edits(model, tokens, edits, horizon=config.horizon, last_only=True, keep=list(hooks))
    for fork in forks:
        if fork.row != row:
            row = fork.row
            _, cache = model.run_with_cache(tokens[row : row + 1], names_filter=list(hooks), return_type=None)
            native = {name: cache[name][0] for name in hooks}
        one, t = deletions[fork.index], fork.position
        found = []
        for name, above in hooks.items():
            plain = native[name][t : t + config.horizon + 1]
            changes = relative_change(fork.kept[name], plain).tolist()
            shared = {"pair": one.pair, "kind": one.kind, "atom": one.atom, "passage": one.passage, "position": t}
            shared |= {"write_norm": one.norm, "layer": above}
            found += [{**shared, "head": index, "change": change} for index, change in enumerate(changes)]
        yield found


def _edit(writes: CellWrites, one: _Deletion, layer: int, head: int, form: str) -> WriteEdit:
    if one.kind != NATIVE:
        return WriteEdit(layer, head, one.position, "delete", batch=one.passage, form=form)  # type: ignore[arg-type]
    key, value = (side[one.passage, one.position] for side in (writes.key, writes.value))
    return WriteEdit(layer, head, one.position, "replace", key, value, batch=one.passage)


def relative_change(edited: Float[Tensor, "pos head d"], native: Float[Tensor, "pos head d"]) -> Float[Tensor, " head"]:
    """Norm of the change over the norm of what was there, per head, over positions and width, in float64."""
    before = native.double()
    size = before.square().sum((0, 2)).sqrt()
    return (edited.double() - before).square().sum((0, 2)).sqrt() / size.clamp_min(torch.finfo(torch.float64).tiny)
