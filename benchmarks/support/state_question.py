"""What is the state S_t of layer l at position t? Four ways to ask, on a random four-layer hybrid.

    eager scan          transformer_lens's bridge scans the layer in Python and keeps every state of every head.
    compute_ssm_state   the bridge caches the layer's interior; then it scans again, keeps every state, hands out one.
    ours                the layer's factors are cached; `cache.state` runs the chunked scan over them for the heads asked for.
    ours, stopping      the same with `stop_at_layer`: nothing above the layer is run, which the bridge has no way to ask for.

The others run the whole text through the whole model once. t is the last position, so that no one could have stopped earlier.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel

from .hybrid import FULL, LINEAR, VOCABULARY, bridge_of, random_model, state_hook

KINDS = [LINEAR, LINEAR, LINEAR, FULL]
LAYER = 1
INTERIOR = ("hook_q", "hook_k", "hook_v", "hook_beta", "hook_log_decay")
ROLES = ("log_decay", "erase", "probe", "write_key", "write_value", "query")
Ask = Callable[[Tensor], Tensor]
"""Tokens [1, pos] to the state after the last of them, [head, d_k, d_v]."""


def ours(quick: bool, head: int | None = None, stop_at_layer: int | None = None) -> Ask:
    """Our way, for one head or all of them, through the whole model or no further than the layer."""
    model = HookedRecurrentModel.from_hf(random_model(KINDS, quick)).requires_grad_(False)
    names = [f"blocks.{LAYER}.mixer.hook_{role}" for role in ROLES]

    def ask(tokens: Tensor) -> Tensor:
        _, cache = model.run_with_cache(tokens, names_filter=names, stop_at_layer=stop_at_layer)
        heads = slice(None) if head is None else slice(head, head + 1)
        return cache.state(LAYER, heads, -1)[0]

    return ask


def eager_scan(quick: bool) -> Ask:
    """transformer_lens's scan in Python, whose states the cache keeps."""
    bridge = bridge_of(random_model(KINDS, quick))
    name = state_hook(bridge, LAYER)
    bridge.get_submodule(name.removesuffix(".hook_ssm_state")).eager_scan = True

    def ask(tokens: Tensor) -> Tensor:
        _, cache = bridge.run_with_cache(tokens, names_filter=name)
        return cache[name][0, -1]

    return ask


def compute_ssm_state(quick: bool) -> Ask:
    """transformer_lens's scan after the pass, from the layer's cached interior."""
    bridge = bridge_of(random_model(KINDS, quick))
    layer = state_hook(bridge, LAYER).removesuffix(".hook_ssm_state")
    names, component = [f"{layer}.{name}" for name in INTERIOR], bridge.get_submodule(layer)

    def ask(tokens: Tensor) -> Tensor:
        _, cache = bridge.run_with_cache(tokens, names_filter=lambda name: name in names, use_cache=False)
        return component.compute_ssm_state(cache, LAYER, time_step=tokens.shape[1] - 1)[0]

    return ask


WAYS: dict[str, Callable[[bool], Ask]] = {
    "ours, one head": lambda quick: ours(quick, head=0),
    "ours, all heads": ours,
    "ours, stopping above the layer": lambda quick: ours(quick, stop_at_layer=LAYER + 1),
    "transformer_lens, eager scan": eager_scan,
    "transformer_lens, compute_ssm_state": compute_ssm_state,
}
"""How to ask, by name: each makes its own model."""


def text(length: int) -> Tensor:
    """Random tokens [1, length]."""
    return torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
