"""Sweeps: one change at every place of a text, layer and head, each run exactly, by the fork engine.

    activation_patching   what stood there in a clean run, put into a corrupted one
    attribution_patching  what that would do, to first order, from one backward pass: an estimate, no run of its own
    ablation              nothing, the mean, or what stood somewhere else, put there; or the write deleted

All give a `Sweep`: the metric of every changed run on named axes, as a tensor, a DataFrame and a heat map. A metric is a
function from the logits of one text [1, pos, d_vocab] to a number. With `record` a killed sweep goes on where it stopped.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from hooked_recurrent.cache import RecurrentCache
from hooked_recurrent.model import HookedRecurrentModel
from hooked_recurrent.patching.plan import Metric, SweepOptions, SweepPlan, Text, digest, plan_sweep
from hooked_recurrent.patching.result import Sweep
from hooked_recurrent.patching.sites import Values

__all__ = ["SweepOptions", "ablation", "activation_patching", "attribution_patching"]
How = Literal["zero", "mean", "resample", "delete"]


def activation_patching(
    model: HookedRecurrentModel,
    corrupted: Text,
    clean: Text,
    metric: Metric | Sequence[Metric],
    site: str = "resid_pre",
    *,
    attribution: bool = False,
    **options: Any,
) -> Sweep:
    """Put what stood at a site in the clean run into the corrupted one, place by place (denoising).

    Args:
        model: any HookedRecurrentModel.
        corrupted, clean: texts of one shape [row, pos]; several rows give a row axis, see `Sweep.mean`.
        metric: from the logits of one text to a number; or one function per row.
        site: "resid_pre", "mixer_out", "resid_mid", "mlp_out", "resid_post"; by head "q", "k", "v", "query", "read", "z",
            "write" (the two factors of the write; the erase stays the corrupted run's), "state" (S_t, carried on).
        attribution: also estimate every effect from one backward pass (Nanda 2023, "Attribution patching"), in
            `Sweep.estimate`. The metric must be differentiable then.
        **options: the fields of `SweepOptions`.

    Raises:
        ValueError, IndexError, TypeError: before anything runs, for texts, a site, axes or numbers that do not fit.
    """
    plan, cache = _pair(model, corrupted, clean, metric, site, options)
    attributed = cache if attribution else None
    return plan.sweep(lambda layer, row: plan.site.read(cache, layer, row), attributed)


def attribution_patching(
    model: HookedRecurrentModel,
    corrupted: Text,
    clean: Text,
    metric: Metric | Sequence[Metric],
    site: str = "resid_pre",
    **options: Any,
) -> Sweep:
    """What `activation_patching` would find, to first order: one backward pass for all places (Nanda 2023).

    Takes the same arguments; `memory`, `record` and `progress` have nothing to do. `Sweep.values` are baseline + estimate.

    Raises:
        ValueError, IndexError, TypeError: as `activation_patching`; also for a metric that is not differentiable.
    """
    plan, cache = _pair(model, corrupted, clean, metric, site, options)
    with torch.no_grad():
        baseline = plan.unchanged(plan.tokens)
    estimate = plan.first_order(cache)
    found = plan.result(estimate, baseline, estimate)
    kind = f"{found.kind}, to first order"
    return replace(found, kind=kind, values=found.per_row(baseline) + estimate)


def ablation(
    model: HookedRecurrentModel,
    tokens: Text,
    metric: Metric | Sequence[Metric],
    site: str = "write",
    how: How = "zero",
    *,
    reference: Text | None = None,
    seed: int = 0,
    **options: Any,
) -> Sweep:
    """Take away what stands at a site, place by place.

    Args:
        model: any HookedRecurrentModel.
        tokens: the text [row, pos]; several rows give a row axis, see `Sweep.mean`.
        metric: from the logits of one text to a number; or one function per row.
        site: as in `activation_patching`.
        how: "zero" puts zero there; "delete" says the same of a write or a state; "mean" puts the mean over all positions
            and rows of `reference` (of writes the mean matrix, which is no single write); "resample" what stands at a
            random position of `reference`, drawn for every position of the text and the same for all layers and heads.
        reference: texts to take means and samples from; the text itself by default.
        seed: of the draws.
        **options: the fields of `SweepOptions`.

    Raises:
        ValueError, IndexError, TypeError: before anything runs, for texts, a site, axes or numbers that do not fit.
    """
    if how not in ("zero", "mean", "resample", "delete"):
        raise ValueError(f"unknown ablation {how!r}; expected one of zero, mean, resample, delete")
    if how == "delete" and site not in ("write", "state"):
        raise ValueError(f"only a write or a state can be deleted, not {site!r}: how='zero' puts zero there")
    plan = plan_sweep(model, tokens, metric, site, options)
    source = plan.tokens if reference is None else plan.tokens_of(reference)
    settings = {"how": how, "seed": seed}
    plan = replace(plan, kind=f"{site} ablated ({how})", settings=settings, source=digest(source))
    if how in ("zero", "delete"):
        return plan.sweep(lambda layer, row: None)
    with torch.no_grad():
        _, cache = model.run_with_cache(source, names_filter=plan.site.names(model, plan.layers), return_type=None)
    if how == "mean":
        return plan.sweep(lambda layer, row: plan.site.mean(cache, layer).same_everywhere(plan.tokens.shape[1]))
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(source.numel(), plan.tokens.shape, generator=generator)

    def sampled(layer: int, row: int) -> Values:
        rows = [plan.site.read(cache, layer, other) for other in range(len(source))]
        pooled = {
            name: torch.cat([getattr(v, name) for v in rows]) for name, t in vars(rows[0]).items() if t is not None
        }
        return Values(**{name: tensor[draws[row]] for name, tensor in pooled.items()})

    return plan.sweep(sampled)


def _pair(
    model: HookedRecurrentModel, corrupted: Text, clean: Text, metric: Any, site: str, options: dict[str, Any]
) -> tuple[SweepPlan, RecurrentCache]:
    """A checked sweep of the corrupted text, and what the clean one leaves at the site."""
    plan = plan_sweep(model, corrupted, metric, site, options)
    source = plan.tokens_of(clean)
    if source.shape != plan.tokens.shape:
        raise ValueError(f"the clean text is {tuple(source.shape)} tokens, the corrupted {tuple(plan.tokens.shape)}")
    with torch.no_grad():
        target = plan.unchanged(source)
        names = plan.site.names(model, plan.layers)
        _, cache = model.run_with_cache(source, names_filter=names, return_type=None)
    kind = f"clean {site} in the corrupted run"
    return replace(plan, kind=kind, target=target, source=digest(source)), cache
