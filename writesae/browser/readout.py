"""Which tokens an atom promotes, predicted in closed form from the untouched run, with nothing fitted.

At a firing at token t the head's query reads a A^T q_t of what the atom (coefficient a) put there. That is carried through the
head's own read-out, W_O, the final norm and the unembedding, each by its local Jacobian in the untouched run: the "in_layer"
prediction of `writesae.evaluation.predicting`, at the token itself. What the layers above would make of it is left out. The
numbers are means over the atom's sampled firings, in nats of logit, and relative to the mean over all tokens, since only
differences of logits matter. What is unembedded is the mean, so the vocabulary is met once per atom, not once per firing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import jvp
from torch.utils._pytree import tree_map_only

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.mixers.base import Call
from hooked_recurrent.state import LayerState
from writesae.sae.write_sae import WriteSAE

_PASSAGES, _FIRINGS = 8, 256
_LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Sampled:
    """Firings, in order of their passages."""

    atom: Int[Tensor, " firing"]
    """Which atom."""
    passage: Int[Tensor, " firing"]
    """Row of the text."""
    position: Int[Tensor, " firing"]
    """Position in it."""
    coefficient: Float[Tensor, " firing"]
    """The atom's coefficient there."""

    def take(self, rows: Tensor) -> "Sampled":
        """Some of them."""
        return Sampled(self.atom[rows], self.passage[rows], self.position[rows], self.coefficient[rows])


@torch.no_grad()
def mean_change(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    tokens: Int[Tensor, "passage pos"],
    sampled: Sampled,
    *,
    layer: int,
    head: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "atom d_model"]:
    """Per atom the mean change of what is unembedded, over its sampled firings; zero for an atom without any."""
    device = model.device
    total = torch.zeros(sae.config.n_atoms, model.cfg.d_model, dtype=torch.float64, device=device)
    for begin in range(0, len(tokens), _PASSAGES):
        mine = (sampled.passage >= begin) & (sampled.passage < begin + _PASSAGES)
        here = sampled.take(mine.nonzero()[:, 0])
        if len(here.atom):
            native = _native(model, tokens[begin : begin + _PASSAGES].to(device), layer)
            for part in torch.arange(len(here.atom)).split(_FIRINGS):
                some = here.take(part)
                place = (some.passage - begin).to(device), some.position.to(device)
                change = _through(model, sae, native, place, some, layer, head)
                total.index_add_(0, some.atom.to(device), change.double())
        if on_progress is not None:
            on_progress(min(begin + _PASSAGES, len(tokens)), len(tokens))
    counts = torch.bincount(sampled.atom, minlength=len(total)).to(device)
    return total / counts.clamp_min(1)[:, None]


@dataclass(frozen=True)
class _Native:
    read: Float[Tensor, "batch pos head d_v"]
    query: Float[Tensor, "batch pos head d_k"]
    last: Float[Tensor, "batch pos d_model"]
    beside: Any


def _native(model: HookedRecurrentModel, tokens: Tensor, layer: int) -> _Native:
    """One plain pass over some passages, and the layer's own projections for what its read-out needs besides."""
    normalized, last = f"blocks.{layer}.ln1.hook_normalized", f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    read, query = (f"blocks.{layer}.mixer.hook_{name}" for name in ("read", "query"))
    _, cache = model.run_with_cache(tokens, return_type=None, names_filter=[normalized, read, query, last])
    call = Call(model.clock, shared=dict(model.last_call.shared))
    with model.clock.running(0, tokens.shape[1]):
        _, beside, _ = model.blocks[layer].mixer.project(cache[normalized], LayerState(), call)
    return _Native(cache[read], cache[query], cache[last], beside)


def _through(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    native: _Native,
    place: tuple[Tensor, Tensor],
    some: Sampled,
    layer: int,
    head: int,
) -> Float[Tensor, "firing d_model"]:
    """The change of the final norm's output per firing, which stands at its own position of a text of one token."""

    def at(tensor: Tensor) -> Tensor:
        return tensor[place][:, None]

    mixer, read = model.blocks[layer].mixer, at(native.read)
    beside = tree_map_only(Tensor, at, native.beside)
    change = atoms_read(sae, some.atom, native.query[place][:, head])
    tangent = torch.zeros_like(read)
    tangent[:, 0, head] = (some.coefficient.to(change)[:, None] * change).to(tangent)
    with model.clock.running(0, 1):
        _, z = jvp(lambda given: mixer.read_out(given, beside), (read.clone(),), (tangent,))
        mixed = torch.einsum("fphv,hvm->fpm", z, mixer.W_O.to(z))
        last = at(native.last).clone()
        _, normed = jvp(model.ln_final, (last,), (mixed.to(last),))
    return normed[:, 0]


def atoms_read(
    sae: WriteSAE, atom: Int[Tensor, " firing"], query: Float[Tensor, "firing d_k"]
) -> Float[Tensor, "firing d_v"]:
    """A^T q: what each query reads of one atom at coefficient 1."""
    query, atom = query.to(sae.input_scale), atom.to(sae.input_scale.device)
    if sae.config.decoder == "dense":
        return torch.einsum("fkv,fk->fv", sae.decoder.atoms[atom], query)
    match = torch.einsum("frk,fk->fr", sae.key_atoms[atom], query)
    return torch.einsum("fr,frv->fv", match, sae.value_atoms[atom])


@torch.no_grad()
def extreme_tokens(
    change: Float[Tensor, "atom d_model"], unembedding: Float[Tensor, "d_model d_vocab"], count: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Blocks of atoms: (promoted tokens, by how much, suppressed tokens, by how much), each [atom, count], best first."""
    if unembedding.element_size() < 4:
        unembedding = unembedding.float()  # sixteen bits would tie many of the extremes
    count, at_once = min(count, unembedding.shape[1]), max(1, _LOGITS_AT_ONCE // unembedding.shape[1])
    for block in change.to(unembedding).split(at_once):
        logits = block @ unembedding
        logits = logits - logits.mean(1, keepdim=True)
        most, least = logits.topk(count, dim=1), (-logits).topk(count, dim=1)
        yield most.indices, most.values, least.indices, -least.values
