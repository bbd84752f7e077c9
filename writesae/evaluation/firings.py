"""Where atoms fire: the writes of one head over a text, their codes, and a seeded sample of firings to test."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from writesae.sae.codes import Codes
from writesae.sae.write_sae import WriteSAE
from writesae.stream.sources import Source, collect


@dataclass(frozen=True)
class CellWrites:
    """The writes of one cell (layer, head) over passages, with the code of each."""

    key: Float[Tensor, "passage pos d_k"]
    """Key sides."""
    value: Float[Tensor, "passage pos d_v"]
    """Value sides."""
    codes: Codes
    """Active atoms per write: indices and values [passage, pos, k]."""

    @property
    def norms(self) -> Float[Tensor, "passage pos"]:
        """Frobenius norm of every write."""
        return self.key.norm(dim=-1) * self.value.norm(dim=-1)


@dataclass(frozen=True)
class Firing:
    """One atom active at one token."""

    passage: int
    """Row of the tokens."""
    position: int
    """Position within the passage."""
    atom: int
    """The atom that fires (the listed one)."""
    coefficient: float
    """Its coefficient there."""
    dominant: int
    """The atom with the largest coefficient there; may be the same."""
    dominant_coefficient: float
    """The coefficient of the dominant atom."""


def check_cell(model: HookedRecurrentModel, sae: WriteSAE, layer: int, head: int) -> None:
    """Raise unless (layer, head) is a recurrent cell of the model whose writes the SAE knows and its atoms can replace.

    IndexError for a layer or head without writes; ValueError for atoms of another shape, dense atoms, and a dictionary that
    was trained on something else than additive writes: its codes of writes would mean nothing.
    """
    cfg, origin = model.cfg, sae.provenance
    hook, form = origin.get("hook") or "hook_write", origin.get("form") or "additive"
    if not hook.endswith("hook_write") or form != "additive":
        came = f"{form} writes of {hook}" if hook.endswith("hook_write") else hook
        raise ValueError(f"the dictionary was trained on {came}; this test needs one of additive writes (hook_write)")
    if sae.config.decoder == "dense":
        raise ValueError("the dictionary's atoms are dense matrices; this test puts outer products in a write's place")
    if layer not in cfg.recurrent_layers:
        raise IndexError(f"layer {layer} has no writes: the recurrent layers are {cfg.recurrent_layers}")
    if not 0 <= head < cfg.n_heads:
        raise IndexError(f"head {head} is out of range: the layer has heads 0 to {cfg.n_heads - 1}")
    if (sae.config.d_k, sae.config.d_v) != (cfg.d_k, cfg.d_v):
        atoms, writes = (sae.config.d_k, sae.config.d_v), (cfg.d_k, cfg.d_v)
        raise ValueError(
            f"the SAE's atoms are {atoms[0]} x {atoms[1]}, but the model's writes are {writes[0]} x {writes[1]}"
        )


@torch.no_grad()
def encode_cell(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    tokens: Int[Tensor, "passage pos"],
    layer: int,
    head: int,
    batch: int = 8,
) -> CellWrites:
    """Run the passages and encode every write of the cell."""
    check_cell(model, sae, layer, head)
    source = Source(f"blocks.{layer}.mixer.hook_write", head)
    records = [collect(model, rows, [source])[source] for rows in tokens.split(batch)]
    key, value = (torch.cat([record[side] for record in records]) for side in ("key", "value"))
    return CellWrites(key, value, sae.encode(key, value))


def sample_firings(
    writes: CellWrites, *, first: int, last: int, atoms: tuple[int, ...] | None, per_atom: int, total: int, seed: int
) -> list[Firing]:
    """A seeded sample of firings at positions first..last, at most `per_atom` of an atom and `total` in all.

    Atoms are taken in random order (of the listed ones, or of all that fire), each with a random choice of its firings,
    until the total is reached. The result is sorted by passage and position.
    """
    indices, values = writes.codes.indices, writes.codes.values
    window = torch.zeros(values.shape[:2], dtype=torch.bool)
    window[:, first : last + 1] = True
    passage, position, slot = ((values > 0) & window[..., None]).nonzero().unbind(1)
    fired = indices[passage, position, slot]
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(fired), generator=generator)
    alive = torch.unique(fired)
    if atoms is not None:
        alive = alive[torch.isin(alive, torch.tensor(atoms))]
    chosen: list[int] = []
    for atom in alive[torch.randperm(len(alive), generator=generator)].tolist():
        mine = shuffled[fired[shuffled] == atom][:per_atom]
        chosen += mine.tolist()[: total - len(chosen)]
        if len(chosen) >= total:
            break
    firings = [_firing(writes, int(passage[i]), int(position[i]), int(slot[i])) for i in chosen]
    return sorted(firings, key=lambda firing: (firing.passage, firing.position, firing.atom))


def _firing(writes: CellWrites, passage: int, position: int, slot: int) -> Firing:
    indices, values = writes.codes.indices[passage, position], writes.codes.values[passage, position]
    top = int(values.argmax())
    return Firing(passage, position, int(indices[slot]), float(values[slot]), int(indices[top]), float(values[top]))
