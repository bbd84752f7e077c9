"""What the tests of a mixer by hand share: tiny models with other options of their mixers, and layer 0 as its hooks show it."""

from dataclasses import replace

import torch

from hooked_recurrent import HookedRecurrentModel
from tests.hooked_recurrent.models import tiny_config

PREFIX = "blocks.0.mixer.hook_"
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def model_with(rule, **options):
    """Two layers of a rule with other options of their mixers, every weight random; 4 heads, 2 where heads are grouped."""
    cfg = tiny_config((rule, rule))
    torch.manual_seed(1)
    model = HookedRecurrentModel(replace(cfg, mixer=replace(cfg.mixer, **options))).double().requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(std=weight.shape[-1] ** -0.5 if weight.ndim == 2 else 1.0)
    return model


def cached(model, tokens, names):
    """What layer 0's mixer reads, and what its hooks of these names show."""
    _, cache = model.run_with_cache(tokens)
    return cache["blocks.0.ln1.hook_normalized"], {name: cache[PREFIX + name] for name in names}
