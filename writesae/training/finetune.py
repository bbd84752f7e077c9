"""A dictionary taught by what its atoms do: the KL of a substituted write, differentiated back to the atoms.

Every step takes passages and a position t, puts what the dictionary makes of the write there in its place (the most active atom
alone, as the replacement test does, or the `terms` most active ones together), lets the model read on to t + horizon from
a snapshot, and compares the output distribution with the untouched run's. The gradient goes back through the forked run,
whose weights stand still, to the factors of the write and from there to the dictionary.

Two losses, of the KL in nats A of the substitute and D of nothing at all (the write deleted):

    kl      mean of A over positions t .. t + horizon: the tokens where a write matters most count most
    share   mean of A / (A + D): where the replacement test only asks which of the two is smaller, every firing counts alike,
            and below 1/2 the atom wins; taken for t and for the mean over t + 1 .. t + horizon, and averaged
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel, WriteEdit
from hooked_recurrent.cache.backward import weights_apart
from hooked_recurrent.config import StrictConfig, require_positive
from hooked_recurrent.patching.forks import Trunk
from writesae.config import require_at_least_zero, require_one_of
from writesae.sae import WriteSAE
from writesae.stream.sources import Source, collect
from writesae.training.trainer import Line

LOSSES = ("share", "kl")
FLOOR = 1e-9
"""Nats that count as nothing: below the rounding of float32 logits a share would be one of noise."""


@dataclass(frozen=True)
class FinetuneConfig(StrictConfig):
    """How a dictionary is taught by the output distribution."""

    steps: int = 300
    """Optimiser steps."""
    rows: int = 64
    """Firings per step: as many passages, all at one position."""
    horizon: int = 4
    """Tokens after t over which the output distribution is compared."""
    terms: int = 1
    """Most active atoms that stand in for a write: 1 is the replacement test's, k the whole reconstruction."""
    loss: str = "share"
    """"share" or "kl", see the module's docstring."""
    lr: float = 2e-3
    """Adam's learning rate after the warm-up; it falls by a cosine to a tenth at the last step."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0 clips nothing."""
    first_position: int = 8
    """Earliest position of a firing."""
    steps_per_pass: int = 32
    """Steps, each at a position of its own, that use the snapshots of one plain pass over their passages."""
    log_every: int = 25
    """Steps between two lines of the log, which are means over the steps since the last one."""
    seed: int = 0
    """Seed of the choice of passages and positions."""

    def __post_init__(self) -> None:
        owner = "FinetuneConfig"
        require_positive(owner, steps=self.steps, rows=self.rows, horizon=self.horizon, terms=self.terms, lr=self.lr)
        require_positive(owner, steps_per_pass=self.steps_per_pass, log_every=self.log_every)
        require_at_least_zero(owner, warmup_steps=self.warmup_steps, grad_clip=self.grad_clip)
        require_at_least_zero(owner, first_position=self.first_position)
        require_one_of(owner, "loss", self.loss, LOSSES)


@dataclass(frozen=True)
class Firings:
    """The writes of one cell at one position of several passages, with all that it takes to run on from there."""

    model: HookedRecurrentModel
    trunk: Trunk
    layer: int
    head: int
    position: int
    key: Float[Tensor, "row d_k"]
    value: Float[Tensor, "row d_v"]

    def logits(self, edits: list[WriteEdit], horizon: int) -> Float[Tensor, "row pos d_vocab"]:
        """Logits at t .. t + horizon of a run that enters at the edited layer; differentiable in the edits' tensors."""
        here = slice(self.position, self.position + horizon + 1)
        return self.model.run_from(
            self.layer,
            self.trunk.inputs[self.layer][:, here],
            self.trunk.states[self.position],
            shared={name: tensor[:, here] for name, tensor in self.trunk.shared.items()},
            edits=edits,
        )

    def substituted(self, sae: WriteSAE, terms: int) -> list[WriteEdit]:
        """The edits that put the `terms` most active atoms at their coefficients in the place of the writes."""
        codes = sae.encode(self.key, self.value)
        edits: list[WriteEdit] = []
        for slot in range(min(terms, codes.values.shape[1])):
            atoms, values = codes.indices[:, slot], codes.values[:, slot, None]
            for rank in range(sae.config.rank):
                key = (sae.key_atoms[atoms, rank] * values)[:, None]
                value = sae.value_atoms[atoms, rank][:, None]
                place = self.layer, self.head, self.position
                edits.append(WriteEdit(*place, "add" if edits else "replace", key, value))
        return edits


def divergences(
    edited: Float[Tensor, "row pos d_vocab"], native: Float[Tensor, "row pos d_vocab"]
) -> Float[Tensor, "row reading"]:
    """KL(edited || native) in nats, in float64, at the first position and as the mean over the later ones."""
    after, before = edited.double().log_softmax(-1), native.double().log_softmax(-1)
    kl = (after.exp() * (after - before)).sum(-1)
    return torch.stack([kl[:, 0], kl[:, 1:].mean(1)], dim=1)


def substitution_loss(
    sae: WriteSAE, firings: Firings, config: FinetuneConfig
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """The loss of these firings, differentiable in the dictionary, and what it is made of.

    `kl` and `kl_delete` are means in nats over positions; `win_rate` is the share of firings and readings (at t, after t) where
    the substitute moves the output less than deletion does.
    """
    edit = WriteEdit(firings.layer, firings.head, firings.position, "delete")
    with torch.no_grad():
        native = firings.logits([], config.horizon)
        deleted = divergences(firings.logits([edit], config.horizon), native)
    found = divergences(firings.logits(firings.substituted(sae, config.terms), config.horizon), native)
    counted = found.new_tensor([1.0, config.horizon]) / (config.horizon + 1)
    kl = (found * counted).sum(1).mean()
    loss = kl if config.loss == "kl" else ((found + FLOOR) / (found + deleted + 2 * FLOOR)).mean()
    numbers = {
        "loss": loss.item(),
        "kl": kl.item(),
        "kl_delete": (deleted * counted).sum(1).mean().item(),
        "win_rate": (found < deleted).double().mean().item(),
    }
    return loss, numbers


def firings_of(
    model: HookedRecurrentModel,
    tokens: Int[Tensor, "passage pos"],
    layer: int,
    head: int,
    config: FinetuneConfig,
) -> Iterator[Firings]:
    """The firings of every step without end: random passages, a plain pass, and several random positions of it."""
    generator = torch.Generator().manual_seed(config.seed)
    source = Source(f"blocks.{layer}.mixer.hook_write", head)
    span = tokens.shape[1] - config.horizon - config.first_position
    while True:
        chosen = torch.randperm(len(tokens), generator=generator)[: config.rows]
        places = torch.randperm(span, generator=generator)[: config.steps_per_pass] + config.first_position
        text = tokens[chosen.to(tokens.device)]
        trunk = Trunk.grow(model, text, places.tolist())
        record = collect(model, text, [source])[source]
        for t in places.tolist():
            yield Firings(model, trunk, layer, head, t, record["key"][:, t], record["value"][:, t])


def finetune(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    tokens: Int[Tensor, "passage pos"],
    *,
    layer: int,
    head: int,
    config: FinetuneConfig | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Line]:
    """Teach `sae` in place on training passages; returns the log: step, loss, kl, kl_delete, win_rate, lr, grad_norm, seconds.

    Which atoms are active gets no gradient, their coefficients and both factors do. Atoms keep the norms that they came with.
    The result follows from the dictionary, the tokens and `config.seed`.

    Raises:
        ValueError: dense atoms, an encoder of another width, passages too short, a loss that is not finite.
        IndexError: a layer or head without writes.
    """
    config = FinetuneConfig.given(config)
    _check(model, sae, tokens, layer, head, config)
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.lr)
    norms = sae.atom_norms().detach()
    log: list[Line] = []
    since: list[dict[str, float]] = []
    started = time.perf_counter()
    sae.eval()
    steps = zip(range(config.steps), firings_of(model, tokens, layer, head, config), strict=False)
    for step, firings in steps:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, config)
        optimizer.zero_grad()
        with weights_apart(model):
            loss, numbers = substitution_loss(sae, firings, config)
            if not math.isfinite(numbers["loss"]):
                raise ValueError(f"the loss is {numbers['loss']} at step {step}: lower lr={config.lr}")
            loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), config.grad_clip or math.inf)
        optimizer.step()
        _rescale_(sae, norms)
        since.append(numbers)
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            means = {name: sum(one[name] for one in since) / len(since) for name in numbers}
            more = {"lr": _learning_rate(step, config), "grad_norm": grad_norm.item()}
            log.append({"step": step, **means, **more, "seconds": time.perf_counter() - started})
            since = []
        if on_progress is not None:
            on_progress(step + 1, config.steps)
    return log


def _learning_rate(step: int, config: FinetuneConfig) -> float:
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    return config.lr * warm * (0.55 + 0.45 * math.cos(math.pi * step / config.steps))


@torch.no_grad()
def _rescale_(sae: WriteSAE, norms: Float[Tensor, " n_atoms"]) -> None:
    factor = (norms / sae.atom_norms().clamp_min(torch.finfo(norms.dtype).tiny)).sqrt()[:, None, None]
    sae.key_atoms.mul_(factor)
    sae.value_atoms.mul_(factor)


def _check(
    model: HookedRecurrentModel, sae: WriteSAE, tokens: Tensor, layer: int, head: int, config: FinetuneConfig
) -> None:
    if sae.config.decoder == "dense":
        raise ValueError("the dictionary's atoms are dense matrices; finetune puts outer products in a write's place")
    if layer not in model.cfg.recurrent_layers:
        raise IndexError(f"layer {layer} has no writes: the recurrent layers are {model.cfg.recurrent_layers}")
    if not 0 <= head < model.cfg.n_heads:
        raise IndexError(f"head {head} is out of range: the layer has heads 0 to {model.cfg.n_heads - 1}")
    if (sae.config.d_k, sae.config.d_v) != (model.cfg.d_k, model.cfg.d_v):
        came, expected = (sae.config.d_k, sae.config.d_v), (model.cfg.d_k, model.cfg.d_v)
        raise ValueError(f"the dictionary's atoms are of (d_k, d_v) = {came}, but the model's writes of {expected}")
    hook, form = sae.provenance.get("hook") or "hook_write", sae.provenance.get("form") or "additive"
    if not hook.endswith("hook_write") or form != "additive":
        what = f"{form} writes" if hook.endswith("hook_write") else hook.rpartition(".")[2]
        raise ValueError(f"the dictionary was trained on {what}; finetune needs one of additive writes (hook_write)")
    need = config.first_position + config.horizon + 1
    if len(tokens) == 0 or tokens.shape[1] < need:
        raise ValueError(f"finetune needs passages of at least {need} tokens, got shape {tuple(tokens.shape)}")
