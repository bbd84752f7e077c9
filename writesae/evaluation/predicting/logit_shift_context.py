"""One context of the logit experiment: the untouched run from t on, its target logits, and their gradients.

Everything that a predictor may know is here: what the model computed without any edit, and one backward pass of it. The
targets (a token at t + horizon each) are rows of one batch, so that one pass gives the gradient of every one of them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel, RecurrentState
from hooked_recurrent.cache import RecurrentCache
from hooked_recurrent.mixers.base import Call
from hooked_recurrent.patching.forks import Trunk

TOP, TAIL = "top", "tail"
Cell = tuple[int, int]
"""(layer, head)."""


@dataclass(frozen=True)
class Targets:
    """The logits that are looked at, each a row."""

    horizon: Int[Tensor, " row"]
    """Positions after t."""
    token: Int[Tensor, " row"]
    """Whose logit."""
    rank: Int[Tensor, " row"]
    """The token's rank in the untouched run's distribution there, from 1."""

    @property
    def kind(self) -> list[str]:
        """Per row whether its token is one of the most likely or the one from the tail."""
        most = int(self.rank.max())
        return [TAIL if rank == most else TOP for rank in self.rank.tolist()]

    def of(self, logits: Float[Tensor, "edit pos d_vocab"]) -> Float[Tensor, "edit row"]:
        """The targets' logits out of those of a segment that begins at t."""
        return logits[:, self.horizon, self.token]

    @staticmethod
    def choose(logits: Float[Tensor, "pos d_vocab"], horizons: Sequence[int], top: int, tail_rank: int) -> "Targets":
        """At every horizon the `top` most likely tokens, and the one of rank `tail_rank`."""
        ranks = [*range(1, top + 1), tail_rank]
        order = logits[list(horizons)].argsort(dim=-1, descending=True, stable=True)
        token = order[:, [rank - 1 for rank in ranks]].flatten()
        horizon = torch.tensor(horizons).repeat_interleave(len(ranks))
        return Targets(horizon.to(token.device), token, torch.tensor(ranks).repeat(len(horizons)).to(token.device))


@dataclass(frozen=True)
class Layer:
    """What an edited layer computes by itself over the segment, without the edit."""

    normalized: Float[Tensor, "one pos d_model"]
    """What the mixer reads."""
    read: Float[Tensor, "one pos head d_v"]
    """What the queries read."""
    beside: Any
    """What the read-out needs besides."""


@dataclass(frozen=True)
class Context:
    """The untouched run over t .. t + longest horizon, in a model of any rule."""

    model: HookedRecurrentModel
    """The model."""
    trunk: Trunk
    """The plain pass over the whole text."""
    position: int
    """t."""
    length: int
    """Tokens of the segment."""
    targets: Targets
    """What is looked at."""
    native: Float[Tensor, " row"]
    """The targets' logits."""
    cache: RecurrentCache
    """Activations, a batch row per target (alike), and the gradients of every target, a batch row each."""

    @staticmethod
    def run(
        model: HookedRecurrentModel,
        trunk: Trunk,
        position: int,
        layers: Collection[int],
        *,
        horizons: Sequence[int],
        top: int,
        tail_rank: int,
    ) -> "Context":
        """Run the segment once to choose the targets, and once forward and backward with a row per target."""
        length = max(horizons) + 1
        text, state = trunk.text[:, position : position + length], trunk.states[position]
        with torch.no_grad():
            logits = model(text, state=state)
        targets = Targets.choose(logits[0], horizons, top, tail_rank)
        rows = len(targets.token)
        per_row = torch.arange(rows, device=logits.device)
        _, cache = model.run_with_cache(
            text.expand(rows, -1),
            state=state.fork(rows),
            incl_bwd=True,
            metric=lambda made: made[per_row, targets.horizon, targets.token].sum(),
            names_filter=_wanted(model, layers),
        )
        return Context(model, trunk, position, length, targets, targets.of(logits)[0], cache)

    @property
    def state(self) -> RecurrentState:
        """The state before t."""
        return self.trunk.states[self.position]

    @property
    def segment(self) -> slice:
        """The absolute positions."""
        return slice(self.position, self.position + self.length)

    @property
    def shared(self) -> dict[str, Tensor]:
        """What the lowest layers leave for those above them, over the segment."""
        return {name: tensor[:, self.segment] for name, tensor in self.trunk.shared.items()}

    def role(self, cell: Cell, name: str) -> Float[Tensor, "pos *width"] | None:
        """One of the six roles of a head over the segment; None where the rule has no such role."""
        layer, head = cell
        hook = f"blocks.{layer}.mixer.hook_{name}"
        return self.cache[hook][0, :, head] if hook in self.model.hook_dict else None

    def write_norm(self, cell: Cell) -> float:
        """Frobenius norm of the native write at t."""
        key, value = self.role(cell, "write_key"), self.role(cell, "write_value")
        assert key is not None and value is not None  # every rule writes
        return float(key[0].norm() * value[0].norm())

    def gradient(self, name: str) -> Float[Tensor, "row pos d_model"]:
        """Of every target with respect to an activation."""
        return self.cache[f"{name}_grad"]

    def lambdas(self, cell: Cell) -> Float[Tensor, "row d_k d_v"]:
        """Lambda_t of every target."""
        return self.cache.write_grad(*cell, 0)

    @cached_property
    def last_resid(self) -> Float[Tensor, "one pos d_model"]:
        """What the final norm reads."""
        return self.cache[_last(self.model)][:1]

    def layer(self, layer: int) -> Layer:
        """The native inputs of a layer's read-out, from its own projections."""
        normalized = self.cache[f"blocks.{layer}.ln1.hook_normalized"][:1]
        call = Call(self.model.clock, shared=self.shared)
        with torch.no_grad(), self.model.clock.running(self.position, self.length):
            _, beside, _ = self.model.blocks[layer].mixer.project(normalized, self.state.layers[layer], call)
        return Layer(normalized, self.cache[f"blocks.{layer}.mixer.hook_read"][:1], beside)


def _last(model: HookedRecurrentModel) -> str:
    return f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"


def _wanted(model: HookedRecurrentModel, layers: Collection[int]) -> list[str]:
    """The hooks whose activations or gradients the predictors use."""
    names = [_last(model), "ln_final.hook_scale"]
    roles = ("log_decay", "erase", "probe", "write_key", "write_value", "query", "read")
    for layer in layers:
        names += [f"blocks.{layer}.hook_mixer_out", f"blocks.{layer}.ln1.hook_normalized"]
        names += [f"blocks.{layer}.mixer.hook_{role}" for role in roles]
    return [name for name in dict.fromkeys(names) if name in model.hook_dict]
