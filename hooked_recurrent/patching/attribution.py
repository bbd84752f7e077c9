"""Attribution patching: what every activation patch would do, to first order, from one backward pass.

The metric moves by <clean - corrupted, gradient> when a small part of the way to the clean activation is gone (Nanda 2023,
"Attribution patching"). Of a write that is k'^T Lambda v' - k^T Lambda v, with the gradient
Lambda of the metric with respect to the write, which is never written out as a matrix per position.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent.cache import RecurrentCache
from hooked_recurrent.model import HookedRecurrentModel
from hooked_recurrent.patching.sites import ROLES, Site
from hooked_recurrent.scan.dispatch import scan


def first_order(
    model: HookedRecurrentModel,
    corrupted: Int[Tensor, "row pos"],
    clean: RecurrentCache,
    metrics: Sequence[Any],
    site: Site,
    layers: list[int],
    axes: Sequence[str],
) -> Float[Tensor, "row layer *places"]:
    """The first-order effect of every patch on the metric, summed over what one patch changes, in float64.

    Args:
        model: any HookedRecurrentModel.
        corrupted: the texts that are patched.
        clean: a cache of the clean ones that kept `site.names`.
        metrics: per row a differentiable function from logits [1, pos, d_vocab] to a scalar.
        site, layers: what is patched.
        axes: ("layer", "position"), ("layer", "head") or ("layer", "head", "position").

    Returns:
        One number per row, layer, and head and position as the axes say.
    """
    names = [site.hook_name(layer) for layer in layers]
    if site.name in ("write", "state"):
        roles = [f"blocks.{layer}.mixer.hook_{role}" for layer in layers for role in (*ROLES, "read")]
        names = [name for name in roles if name in model.hook_dict]

    def total(logits: Tensor) -> Tensor:
        found = [metric(logits[row : row + 1]) for row, metric in enumerate(metrics)]
        if not all(isinstance(number, Tensor) for number in found):
            raise TypeError("attribution differentiates the metric, which must give a tensor then, and no plain number")
        return torch.stack([number.reshape(()) for number in found]).sum()

    _, cache = model.run_with_cache(corrupted, names_filter=names, incl_bwd=True, metric=total)
    per_layer = []
    for layer in layers:
        effect = _EFFECTS.get(site.name, _of_activation)(cache, clean, site, layer, "position" not in axes)
        if "head" not in axes and site.by_head:
            effect = effect.sum(2)
        if "position" not in axes:
            effect = effect.sum(1)
        per_layer.append(effect.movedim(1, -1) if len(axes) == 3 else effect)
    return torch.stack(per_layer, dim=1).double()


def _of_activation(
    cache: RecurrentCache, clean: RecurrentCache, site: Site, layer: int, everywhere: bool
) -> Float[Tensor, "row pos *head"]:
    name = site.hook_name(layer)
    return ((clean[name] - cache[name]) * cache[f"{name}_grad"]).sum(-1)


def _of_write(
    cache: RecurrentCache, clean: RecurrentCache, site: Site, layer: int, everywhere: bool
) -> Float[Tensor, "row pos head"]:
    pairs = [[one[f"blocks.{layer}.mixer.hook_write_{side}"] for side in ("key", "value")] for one in (clean, cache)]
    there, here = (cache.write_effect(layer, key, value) for key, value in pairs)
    return there - here


def _of_state(
    cache: RecurrentCache, clean: RecurrentCache, site: Site, layer: int, everywhere: bool
) -> Float[Tensor, "row pos head"]:
    """<S'_t - S_t, Lambda_t>; where the states of all positions are patched at once, each is only read, and not carried on."""
    if everywhere:
        name = f"blocks.{layer}.mixer.hook_read"
        factors = clean.factors(layer)
        read, _ = scan(type(factors)(**{**vars(factors), "query": cache.factors(layer).query}))
        return ((read - cache[name]) * cache[f"{name}_grad"]).sum(-1)
    effects = []
    for head in cache.heads:  # a head at a time: states and gradients are matrices per position
        change = clean.state(layer, head, slice(None)) - cache.state(layer, head, slice(None))
        effects.append((change * cache.write_grad(layer, head, slice(None))).sum((-1, -2)))
    return torch.stack(effects, dim=2)


_EFFECTS = {"write": _of_write, "state": _of_state}
