"""The shipped models and how each is trained: one size, one text, one number of steps, so that they can be compared."""

from dataclasses import dataclass
from difflib import get_close_matches

from hooked_recurrent.config import ModelConfig
from hooked_recurrent.mixers.gated_delta_net import GatedDeltaNetConfig
from hooked_recurrent.mixers.mamba2 import Mamba2Config
from hooked_recurrent.mixers.rwkv7 import RWKV7Config


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run: the same recipe on the same text gives the same stream of batches."""

    config: ModelConfig
    """The model."""
    steps: int = 20_000
    """Optimiser steps in all; the schedule is stretched over them."""
    seed: int = 0
    """Seeds the initial weights and the choice of windows."""
    seq_len: int = 1024
    """Predictions per window."""
    batch: int = 4
    """Windows per step."""
    muon_lr: float = 0.02
    """Peak learning rate of the block matrices (orthogonalised updates)."""
    adam_lr: float = 3e-3
    """Peak learning rate of everything else."""
    weight_decay: float = 0.01
    """Decoupled weight decay of the block matrices; the rest has none."""
    warmup: int = 100
    """Steps of linear warm-up."""
    cooldown: float = 0.4
    """Fraction of the steps, at the end, over which the rate falls to zero."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""


RECIPES: dict[str, Recipe] = {
    "tiny-gated-deltanet": Recipe(
        ModelConfig(
            d_model=128,
            d_vocab=4096,
            d_mlp=384,
            layer_types=("gated_delta_net",) * 4,
            mixer=GatedDeltaNetConfig(n_heads=4, n_key_heads=4, d_k=32, d_v=32),
            tied_embeddings=True,
            n_ctx=1024,
            model_name="tiny-gated-deltanet",
        ),
        steps=3800,
    ),
    "tiny-mamba2": Recipe(
        ModelConfig(
            d_model=128,
            d_vocab=4096,
            d_mlp=None,
            layer_types=("mamba2",) * 8,  # no MLPs, so twice the layers for about as many parameters
            mixer=Mamba2Config(n_heads=4, n_groups=1, d_k=32, d_v=64),
            norm_eps=1e-5,
            norm_offset=0.0,
            residual_in_fp32=True,
            tied_embeddings=True,
            n_ctx=1024,
            model_name="tiny-mamba2",
        ),
        steps=3800,
    ),
    "tiny-rwkv7": Recipe(
        ModelConfig(
            d_model=128,
            d_vocab=4096,
            d_mlp=512,
            mlp="channel_mix",
            layer_types=("rwkv7",) * 4,
            mixer=RWKV7Config(
                n_heads=4,
                d_k=32,
                d_v=32,
                decay_rank=16,
                iclr_rank=16,
                value_rank=16,
                gate_rank=32,
                norm_eps=32e-5,
            ),
            norm="layer",
            norm_eps=1e-5,
            embed_norm=True,
            tied_embeddings=True,
            n_ctx=1024,
            model_name="tiny-rwkv7",
        ),
        steps=3800,
    ),
}


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`; `ValueError` with the nearest name when there is none."""
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no recipe called {name!r}: the recipes are {', '.join(RECIPES)}{hint}")
    return RECIPES[name]
