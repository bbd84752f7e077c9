"""Sweeps: one change at every place of a text, layer and head, each run exactly, by the fork engine.

    activation_patching   what stood there in a clean run, put into a corrupted one
    attribution_patching  what that would do, to first order, from one backward pass: an estimate, no run of its own
    ablation              nothing, the mean, or what stood somewhere else, put there; or the write deleted

All give a `Sweep`: the metric of every changed run on named axes, as a tensor, a DataFrame and a heat map. A metric is a
function from the logits of one text [1, pos, d_vocab] to a number. With `record` a killed sweep goes on where it stopped.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import index as whole
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from rich.progress import Progress
from torch import Tensor

from hooked_recurrent.cache import RecurrentCache
from hooked_recurrent.edits import Edit
from hooked_recurrent.edits.write import Form
from hooked_recurrent.model import HookedRecurrentModel
from hooked_recurrent.patching.attribution import first_order
from hooked_recurrent.patching.forks import Trunk, run_edits
from hooked_recurrent.patching.record import Record
from hooked_recurrent.patching.result import Sweep
from hooked_recurrent.patching.sites import Site, Values, site_named

Metric = Callable[[Float[Tensor, "one pos d_vocab"]], Any]
Text = Int[Tensor, "row pos"] | str | list[str]
How = Literal["zero", "mean", "resample", "delete"]
AXES = (("layer", "position"), ("layer", "head"), ("layer", "head", "position"))


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What every sweep takes besides its texts, metric and site; given as keywords."""

    axes: Sequence[str] = ("layer", "position")
    """What is changed in one run: all heads at a position, a head at all positions, or a head at a position."""
    layers: Iterable[int] | None = None
    """Which layers; None for all that have the site."""
    heads: Iterable[int] | None = None
    """Which heads, at a site that has some; None for all."""
    positions: Iterable[int] | None = None
    """Which positions; None for all."""
    logits: Literal["all", "last"] = "all"
    """What the metric is given: the logits of all positions, or [1, 1, d_vocab] of the last one, which is cheaper."""
    form: Form = "additive"
    """For site "write": whether the write is the additive term, or the token's net change with its erase."""
    memory: int = 2**30
    """About how many bytes the activations of one batch, and the kept states, may take each."""
    record: Any = None
    """A file that keeps every measured run, so that the same call goes on after a kill; None keeps nothing on disk. Give each
    model and metric its own: those of the unchanged runs are compared, nothing else of a metric can be."""
    progress: bool = False
    """Whether to show a progress bar."""


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
    estimate = plan.first_order(cache) if attribution else None
    return plan.sweep(lambda layer, row: plan.site.read(cache, layer, row), estimate)


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
    plan = _plan(model, tokens, metric, site, options)
    source = plan.tokens if reference is None else plan.tokens_of(reference)
    settings = {"how": how, "seed": seed}
    plan = replace(plan, kind=f"{site} ablated ({how})", settings=settings, source=_digest(source))
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
) -> "tuple[_Plan, RecurrentCache]":
    """A checked sweep of the corrupted text, and what the clean one leaves at the site."""
    plan = _plan(model, corrupted, metric, site, options)
    source = plan.tokens_of(clean)
    if source.shape != plan.tokens.shape:
        raise ValueError(f"the clean text is {tuple(source.shape)} tokens, the corrupted {tuple(plan.tokens.shape)}")
    with torch.no_grad():
        target = plan.unchanged(source)
        names = plan.site.names(model, plan.layers)
        _, cache = model.run_with_cache(source, names_filter=names, return_type=None)
    kind = f"clean {site} in the corrupted run"
    return replace(plan, kind=kind, target=target, source=_digest(source)), cache


def _plan(model: HookedRecurrentModel, tokens: Text, metric: Any, site: str, options: dict[str, Any]) -> "_Plan":
    """Check everything that can be checked before a run."""
    given = SweepOptions(**options)
    chosen, axes = site_named(site), tuple(given.axes)
    if axes not in AXES:
        expected = " or ".join(map(str, AXES))
        raise ValueError(f"unknown axes {axes}; expected {expected}")
    if given.logits not in ("all", "last"):
        raise ValueError(f"logits must be 'all' or 'last', got {given.logits!r}")
    if "head" in axes and not chosen.by_head:
        raise ValueError(f"site {site!r} has no head axis: use axes ('layer', 'position')")
    if given.heads is not None and not chosen.by_head:
        raise ValueError(f"site {site!r} has no head axis: leave heads out")
    checked = model._tokens(tokens)
    metrics = (metric,) * len(checked) if callable(metric) else tuple(metric or ())
    if not all(map(callable, metrics)):
        raise TypeError("a metric must be a function of the logits, or several such functions")
    if len(metrics) != len(checked):
        raise ValueError(f"{len(metrics)} metrics for {len(checked)} rows: give one for all, or one per row")
    there = chosen.layers(model)
    if not there:
        raise ValueError(f"this model has no site {site!r} in any layer")
    layers = _numbers("layer", given.layers, there)
    heads = _numbers("head", given.heads, list(range(model.cfg.n_heads))) if chosen.by_head else None
    if axes == ("layer", "head") and given.positions is not None:
        raise ValueError("axes ('layer', 'head') change all positions: leave positions out")
    positions = _numbers("position", given.positions, list(range(checked.shape[1])))
    return _Plan(model, checked, metrics, chosen, replace(given, axes=axes), layers, heads, positions)


def _numbers(word: str, wanted: Iterable[int] | None, there: list[int]) -> list[int]:
    """The wanted numbers, each of them there."""
    if wanted is None:
        return there
    try:
        numbers = [whole(number) for number in wanted]
    except TypeError:
        raise TypeError(f"{word}s must be a list of whole numbers, got {wanted!r}") from None
    for number in numbers:
        if number not in there:
            gaps = "" if there == list(range(there[0], there[-1] + 1)) else f": {there}"
            raise IndexError(f"there is no {word} {number} to sweep; there are {there[0]} to {there[-1]}{gaps}")
    if len(set(numbers)) != len(numbers) or not numbers:
        raise ValueError(f"{word}s must be one or more different numbers, got {numbers}")
    return numbers


def _shown(metric: Metric, what: str, logits: Float[Tensor, "one pos d_vocab"]) -> Any:
    """A metric of the logits that `SweepOptions.logits` says."""
    return metric(logits if what == "all" else logits[:, -1:])


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class _Plan:
    """A checked sweep."""

    model: HookedRecurrentModel
    tokens: Int[Tensor, "row pos"]
    metrics: tuple[Metric, ...]
    site: Site
    options: SweepOptions
    layers: list[int]
    heads: list[int] | None
    positions: list[int]
    kind: str = ""
    target: tuple[float, ...] | None = None
    source: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def axes(self) -> dict[str, tuple[int, ...]]:
        along = {"layer": tuple(self.layers), "head": tuple(self.heads or ()), "position": tuple(self.positions)}
        rows = {"row": tuple(range(len(self.tokens)))} if len(self.tokens) > 1 else {}
        return rows | {name: along[name] for name in self.options.axes}

    def tokens_of(self, text: Text) -> Int[Tensor, "row pos"]:
        return self.model._tokens(text)

    def unchanged(self, tokens: Int[Tensor, "row pos"]) -> tuple[float, ...]:
        """The metric of each row of a plain run."""
        shown = self.model(tokens, last_only=self.options.logits == "last")
        return tuple(self.number(row, shown[row : row + 1]) for row in range(len(tokens)))

    def number(self, row: int, logits: Float[Tensor, "one pos d_vocab"]) -> float:
        """The metric of one text as a finite number."""
        found = self.metrics[row](logits)
        if isinstance(found, Tensor) and found.numel() != 1:
            raise ValueError(f"a metric gives one number per text, got a tensor of shape {tuple(found.shape)}")
        try:
            number = float(found)
        except (TypeError, ValueError):
            raise TypeError(f"a metric gives a number, got {type(found).__name__}") from None
        if not math.isfinite(number):
            raise ValueError(f"the metric is {'NaN' if math.isnan(number) else 'Inf'}")
        return number

    def first_order(self, clean: RecurrentCache) -> Float[Tensor, "*axes"]:
        """The first-order effect of every change, on this sweep's axes."""
        metrics = [partial(_shown, metric, self.options.logits) for metric in self.metrics]
        axes = self.options.axes
        return self.on_axes(first_order(self.model, self.tokens, clean, metrics, self.site, self.layers, axes))

    def result(self, values: Tensor, baseline: tuple[float, ...], estimate: Tensor | None) -> Sweep:
        """What was found, with its names."""
        settings = {**self.settings, "form": self.options.form, "logits": self.options.logits}
        return Sweep(self.kind, self.site.name, self.axes, values, baseline, self.target, estimate, settings)

    def on_axes(self, full: Float[Tensor, "*full"]) -> Float[Tensor, "*axes"]:
        """A table over all heads and positions of the swept layers, cut to those that are swept."""
        full = full.cpu()
        places = {"layer": list(range(len(self.layers))), "head": self.heads, "position": self.positions}
        for axis, name in enumerate(self.options.axes, start=1):
            full = full.index_select(axis, torch.tensor(places[name]))
        return full if len(self.tokens) > 1 else full[0]

    @torch.no_grad()
    def sweep(self, values: Callable[[int, int], Values | None], estimate: Tensor | None = None) -> Sweep:
        """Run every change; `values(layer, row)` says what is put there, None that nothing is left there."""
        baseline = self.unchanged(self.tokens)
        axes = self.axes
        about: dict[str, Any] = {
            "kind": self.kind,
            "site": self.site.name,
            "axes": {n: list(a) for n, a in axes.items()},
        }
        about |= {"tokens": _digest(self.tokens), "source": self.source, **self.settings}
        about |= {"form": self.options.form, "logits": self.options.logits, "model": self.model.cfg.model_name}
        about |= {"heads": self.heads}
        record = Record(self.options.record, about, {"unchanged": baseline, "clean": self.target})
        shape = [len(along) for along in axes.values()]
        numbering = torch.arange(torch.Size(shape).numel()).reshape(len(self.tokens), len(self.layers), -1)
        with Progress(disable=not self.options.progress) as bar:
            task = bar.add_task(self.kind, total=numbering.numel(), completed=len(record.values))
            for row in range(len(self.tokens)):
                self._one_text(
                    row, values, numbering[row], record, lambda: bar.update(task, completed=len(record.values))
                )
        found = torch.tensor([record.values[index] for index in range(numbering.numel())], dtype=torch.float64)
        return self.result(found.reshape(shape), baseline, estimate)

    def _one_text(
        self,
        row: int,
        values: Callable,
        numbering: Int[Tensor, "layer place"],
        record: Record,
        tell: Callable[[], None],
    ) -> None:
        if all(index in record.values for index in numbering.flatten().tolist()):
            return
        text = self.tokens[row : row + 1]
        last = self.options.logits == "last"
        plain = None if last else self.model(text)[0]
        first = [min(self.positions) if "position" in self.options.axes else 0]
        trunk = Trunk.grow(self.model, text, first)
        for layer, numbers in zip(self.layers, numbering.tolist(), strict=True):
            done = {place for place, index in enumerate(numbers) if index in record.values}
            if len(done) == len(numbers):
                continue
            changes = self._changes(layer, values(layer, row))
            fresh: dict[int, float] = {}

            def keep(finished: int, total: int, fresh=fresh) -> None:
                record.add(fresh)
                fresh.clear()
                tell()

            forks = run_edits(
                self.model,
                text,
                changes,
                horizon=None,
                last_only=last,
                memory=self.options.memory,
                trunk=trunk,
                done=done,
                on_progress=keep,
            )
            try:
                for fork in forks:
                    logits = fork.logits if plain is None else torch.cat([plain[: fork.position], fork.logits])
                    fresh[numbers[fork.index]] = self.number(row, logits[None])
            finally:  # a kill in the middle of a batch costs nothing that was measured
                if fresh:
                    record.add(fresh)

    def _changes(self, layer: int, values: Values | None) -> list[list[Edit]]:
        """What is done in each run of a layer, in the order of the axes behind the layer's."""
        make = self.site.remove if values is None else partial(self.site.put, values)
        by_head = [[head] for head in self.heads or ()] if "head" in self.options.axes else [self.heads]
        places: list[Any] = self.positions if "position" in self.options.axes else [slice(0, self.tokens.shape[1])]
        return [make(layer, heads, place, self.options.form) for heads in by_head for place in places]
