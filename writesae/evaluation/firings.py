"""Where atoms fire: the writes of one head over a text, their codes, and a seeded sample of firings to test.

A firing is an atom that is active in the code of a token. What has a code is what the dictionary was trained on: the token's
additive write, its net write (protocol decision D1), or, as in the paper, the state S_t after the write. What the
experiments then edit is in every case the write.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.display import OneLine
from writesae.evaluation.low_rank import LowRank
from writesae.sae.codes import Codes
from writesae.sae.samples import Factored, Matrices, Samples
from writesae.sae.states import StateSequences, formed_states
from writesae.sae.write_sae import WriteSAE
from writesae.stream.sources import STATE, Record, Source, collect, with_terms


@dataclass(frozen=True, repr=False)
class CellWrites(OneLine):
    """The native writes of one cell (layer, head) over passages, with the code of each token."""

    key: Float[Tensor, "passage pos d_k"]
    """Key sides of the additive writes."""
    value: Float[Tensor, "passage pos d_v"]
    """Value sides of the additive writes."""
    codes: Codes
    """Active atoms per token: indices and values [passage, pos, k], of what the dictionary was trained on."""
    net_key: Float[Tensor, "passage pos term d_k"] | None = None
    """Key sides of the net writes, where asked for: one term, or two where the erase has a key of its own (RWKV-7)."""
    net_value: Float[Tensor, "passage pos term d_v"] | None = None
    """Their value sides, which hold what the erase took away."""

    @property
    def norms(self) -> Float[Tensor, "passage pos"]:
        """Frobenius norm of every additive write."""
        return self.key.norm(dim=-1) * self.value.norm(dim=-1)

    def native(self, passage: int, position: int, form: str = "additive") -> LowRank:
        """One native write, "additive" or "net"; `ValueError` for net writes that were not kept."""
        if form == "additive":
            return LowRank(self.key[passage, position][None], self.value[passage, position][None])
        if self.net_key is None or self.net_value is None:
            raise ValueError("the net writes were not kept: ask encode_cell for them with net=True")
        return LowRank(self.net_key[passage, position], self.net_value[passage, position])

    def rates(self, n_atoms: int) -> Float[Tensor, " n_atoms"]:
        """The share of the tokens at which each atom fires."""
        fired = torch.bincount(self.codes.indices[self.codes.active], minlength=n_atoms)
        return fired.double() / self.codes.indices.shape[:-1].numel()


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


def trained_on(sae: WriteSAE, layer: int, head: int) -> Source:
    """What the dictionary's codes are codes of, at this cell: additive writes, net writes or states.

    A dictionary that does not say counts as one of additive writes. Raises `ValueError` for one of vectors.
    """
    hook, form = sae.provenance.get("hook") or "hook_write", sae.provenance.get("form") or "additive"
    kind = hook.rpartition("hook_")[2]
    if kind not in ("write", "state"):
        raise ValueError(f"the dictionary was trained on {hook}; this test needs one of writes or states")
    return Source(f"blocks.{layer}.mixer.hook_{kind}", head, form if kind == "write" else "additive")


def require_cell(model: HookedRecurrentModel, layer: int, head: int) -> None:
    """Raise `IndexError` unless the layer has a matrix memory and the head exists; both are counted from 0."""
    cfg = model.cfg
    if layer not in cfg.recurrent_layers:
        raise IndexError(f"layer {layer} has no writes: the recurrent layers are {cfg.recurrent_layers}")
    if not 0 <= head < cfg.n_heads:
        raise IndexError(f"head {head} is out of range: the layer has heads 0 to {cfg.n_heads - 1}")


def check_passages(tokens: object) -> None:
    """Raise unless these are passages of tokens: `TypeError` for another kind of thing, `ValueError` for another shape."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens must be a tensor [passage, pos], got {type(tokens).__name__}: passages(...).tokens is one")
    if tokens.is_floating_point():
        raise TypeError(f"tokens must be integers, got {tokens.dtype}")
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens must be [passage, pos] with a passage or more, got shape {tuple(tokens.shape)}")


def check_atoms(sae: WriteSAE, atoms: Iterable[int]) -> None:
    """Raise `IndexError` for a number that no atom of the dictionary has."""
    for atom in atoms:
        if not 0 <= atom < sae.config.n_atoms:
            raise IndexError(f"atom {atom} is outside this dictionary of {sae.config.n_atoms} atoms")


def check_cell(model: HookedRecurrentModel, sae: WriteSAE, layer: int, head: int) -> None:
    """Raise unless (layer, head) is a recurrent cell of the model whose writes or states the dictionary's atoms fit.

    IndexError for a layer or head without writes; ValueError for atoms of another shape, and a dictionary of vectors.
    """
    if not isinstance(model, HookedRecurrentModel):
        raise TypeError(f"model must be a HookedRecurrentModel, got {type(model).__name__}")
    if not isinstance(sae, WriteSAE):
        raise TypeError(f"sae must be a WriteSAE, got {type(sae).__name__}: WriteSAE.load(folder) reads a saved one")
    cfg = model.cfg
    trained_on(sae, layer, head)
    require_cell(model, layer, head)
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
    net: bool = False,
) -> CellWrites:
    """Run the passages, keep every write of the cell, and encode what the dictionary was trained on at every token.

    States under one decay per head are encoded by running sums; under a decay per key channel (RWKV-7) they are formed, those
    of one passage at a time.

    Args:
        model, sae, tokens: as everywhere.
        layer, head: the cell.
        batch: passages per forward pass.
        net: whether to keep the net writes too.

    Raises:
        ValueError, IndexError: as `check_cell` says.
    """
    check_cell(model, sae, layer, head)
    coded, written = trained_on(sae, layer, head), Source(f"blocks.{layer}.mixer.hook_write", head)
    whole = Source(written.hook, head, "net")
    wanted = {coded, written, whole} if net else {coded, written}
    keys, values, codes, net_keys, net_values = [], [], [], [], []
    for rows in tokens.split(batch):
        records = collect(model, rows, wanted)
        keys.append(records[written]["key"])
        values.append(records[written]["value"])
        codes += [
            sae.encode_samples(part.to(device=sae.input_scale.device)) for part in _samples(coded, records[coded])
        ]
        if net:
            net_keys.append(_with_axis(records[whole]["key"]))
            net_values.append(_with_axis(records[whole]["value"]))
    key, value = torch.cat(keys), torch.cat(values)
    found = Codes.concatenate(codes).reshape(key.shape[:2])
    if not net:
        return CellWrites(key, value, found)
    return CellWrites(key, value, found, torch.cat(with_terms(net_keys)), torch.cat(with_terms(net_values)))


def _samples(source: Source, record: Record) -> Iterable[Samples]:
    """What a record holds, in pieces whose matrices, where they have to be formed, fit in memory."""
    if not source.hook.endswith(STATE):
        key, value = record["key"].flatten(0, 1), record["value"].flatten(0, 1)
        return [Factored(key, value)]
    log_decay, key, value = record["log_decay"], _with_axis(record["key"]), _with_axis(record["value"])
    if log_decay.ndim == 2:
        return [StateSequences(log_decay, key, value, record.get("squared_norm"))]
    passages = zip(log_decay.split(1), key.split(1), value.split(1), strict=True)
    return (Matrices(formed_states(*passage).flatten(0, 1)) for passage in passages)


def _with_axis(side: Tensor) -> Tensor:
    """With an axis of terms."""
    return side[:, :, None] if side.ndim == 3 else side


def sample_firings(
    writes: CellWrites, *, first: int, last: int, atoms: tuple[int, ...] | None, per_atom: int, total: int, seed: int
) -> list[Firing]:
    """A seeded sample of firings at positions first..last, at most `per_atom` of an atom and `total` in all.

    Atoms are taken in random order (of the listed ones, or of all that fire), each with a random choice of its firings,
    until the total is reached. The result is sorted by passage and position.
    """
    indices, values = writes.codes.indices, writes.codes.values
    window = torch.zeros(values.shape[:2], dtype=torch.bool, device=values.device)
    window[:, first : last + 1] = True
    passage, position, slot = ((values > 0) & window[..., None]).nonzero().unbind(1)
    fired = indices[passage, position, slot].cpu()
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
