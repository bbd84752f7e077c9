"""Pairs of models on the same random weights, ours and theirs, and what is asked of both."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.mixers.base import Call
from hooked_recurrent.model import next_token_loss
from hooked_recurrent.state import LayerState
from hooked_recurrent.zoo.recipes import RECIPES

from .plain import Mamba2Config, Mamba2ForCausalLM, Qwen3_5ForCausalLM

CHUNKS = (256, 128, 64, 32)
"""transformers' default chunk of Mamba-2 first, then those that its user might try."""
MAMBA2_370M = {"hidden_size": 1024, "num_heads": 32, "head_dim": 64, "state_size": 128}
MAMBA2_SMALL = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 16}
TRAINED_VOCABULARY = 2048


class Theirs:
    """Another library's model as a function of tokens to logits; for Mamba-2 at a chunk size that is set before every call."""

    def __init__(self, model: nn.Module, chunk_size: int | None = None):
        self.model, self.chunk_size = model, chunk_size

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits [batch, pos, d_vocab] of a whole text."""
        if self.chunk_size is not None:
            for layer in self.model.backbone.layers:
                layer.mixer.chunk_size = self.chunk_size
        return self.model(input_ids=tokens, use_cache=False).logits


def at_chunks(model: Mamba2ForCausalLM) -> dict[str, Theirs]:
    """transformers' Mamba-2 at its default chunk and at others."""
    return {f"transformers, chunk {size}": Theirs(model, size) for size in CHUNKS}


def mamba2_pair(quick: bool) -> tuple[HookedRecurrentModel, dict[str, Theirs]]:
    """Two layers of mamba2-370m's shape with a vocabulary of 1,000, tied."""
    torch.manual_seed(0)
    shape = MAMBA2_SMALL if quick else MAMBA2_370M
    config = Mamba2Config(num_hidden_layers=2, vocab_size=1000, n_groups=1, tie_word_embeddings=True, **shape)
    model = Mamba2ForCausalLM(config).eval()
    return HookedRecurrentModel.from_hf(model), at_chunks(model)


def recipe_sides(name: str, folder: Path) -> tuple[HookedRecurrentModel, dict[str, Theirs]]:
    """A random model of a bundled model's shape, saved by us and loaded by the library whose layout that is.

    Its vocabulary is 2,048, and RWKV-7's unembedding is its own, since rwkv7-hf ties none.
    """
    torch.manual_seed(0)
    config = RECIPES[name].config
    untied = {"tied_embeddings": False} if name == "tiny-rwkv7" else {}
    ours = HookedRecurrentModel(replace(config, d_vocab=TRAINED_VOCABULARY, **untied))
    ours.save_pretrained(folder)
    if name == "tiny-mamba2":
        return ours, at_chunks(Mamba2ForCausalLM.from_pretrained(folder))
    if name == "tiny-gated-deltanet":
        return ours, {"transformers": Theirs(Qwen3_5ForCausalLM.from_pretrained(folder))}
    from rwkv7_hf import RWKV7ForCausalLM

    return ours, {"rwkv7-hf": Theirs(RWKV7ForCausalLM.from_pretrained(folder))}


def mixer_alone(model: HookedRecurrentModel, x: Tensor) -> Tensor:
    """What the mixer of our first layer adds to the residual stream, from an empty memory and without a final state."""
    with model.clock.running(0, x.shape[1]):
        return model.blocks[0].mixer(x, LayerState(), Call(model.clock))[0]


Loss = tuple[nn.Module, Callable[[], Tensor]]
"""A model and its loss on fixed tokens."""


def losses_of(ours: HookedRecurrentModel, theirs: dict[str, Theirs], tokens: Tensor) -> dict[str, Loss]:
    """The mean next-token loss of every side, all by one function of the logits."""

    def loss(run: Callable[[Tensor], Any]) -> Callable[[], Tensor]:
        return lambda: next_token_loss(run(tokens), tokens)

    found: dict[str, Loss] = {"ours": (ours, loss(ours))}
    return found | {name: (side.model, loss(side)) for name, side in theirs.items()}


def parameter_gradients(side: Loss) -> Tensor:
    """Forward and backward: gradients of all weights, of which that of the embedding is returned to be compared."""
    model, loss = side
    weights = list(model.parameters())
    embedding = model.embed.weight if isinstance(model, HookedRecurrentModel) else model.get_input_embeddings().weight
    gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
    return next(found for weight, found in zip(weights, gradients, strict=True) if weight is embedding)
