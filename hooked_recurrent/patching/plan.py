"""What all sweeps share: their options, the checks before a run, and the loop over texts and layers."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from operator import index as whole
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from rich.progress import Progress
from torch import Tensor

from hooked_recurrent.cache import RecurrentCache
from hooked_recurrent.config import refuse_unknown
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


def plan_sweep(
    model: HookedRecurrentModel, tokens: Text, metric: Any, site: str, options: dict[str, Any]
) -> "SweepPlan":
    """Check everything that can be checked before a run."""
    refuse_unknown("a sweep", options, [one.name for one in fields(SweepOptions)])
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
    if not callable(metric) and not isinstance(metric, list | tuple):
        raise TypeError(f"a metric must be a function of the logits, or several such functions, got {metric!r}")
    metrics = (metric,) * len(checked) if callable(metric) else tuple(metric)
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
    return SweepPlan(model, checked, metrics, chosen, replace(given, axes=axes), layers, heads, positions)


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


def digest(tokens: Tensor) -> str:
    """A short name of a text."""
    return hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class SweepPlan:
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
        """Per axis of the result the numbers along it."""
        along = {"layer": tuple(self.layers), "head": tuple(self.heads or ()), "position": tuple(self.positions)}
        rows = {"row": tuple(range(len(self.tokens)))} if len(self.tokens) > 1 else {}
        return rows | {name: along[name] for name in self.options.axes}

    def tokens_of(self, text: Text) -> Int[Tensor, "row pos"]:
        """Another text of this sweep, as tokens."""
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
    def sweep(self, values: Callable[[int, int], Values | None], attributed: RecurrentCache | None = None) -> Sweep:
        """Run every change; `values(layer, row)` says what is put there, None that nothing is left there.

        With `attributed`, the cache of a clean run, the estimates stand beside.
        """
        baseline = self.unchanged(self.tokens)
        axes = self.axes
        about: dict[str, Any] = {
            "kind": self.kind,
            "site": self.site.name,
            "axes": {n: list(a) for n, a in axes.items()},
        }
        about |= {"tokens": digest(self.tokens), "source": self.source, **self.settings}
        about |= {"form": self.options.form, "logits": self.options.logits, "model": self.model.cfg.model_name}
        about |= {"heads": self.heads}
        record = Record(self.options.record, about, {"unchanged": baseline, "clean": self.target})
        estimate = None if attributed is None else self.first_order(attributed)
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
        trunk = Trunk.grow(self.model, text, self._starts())
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

    def _starts(self) -> list[int]:
        """Where the trunk keeps a state: wherever a run begins, so that no layer makes them anew, if `memory` holds them."""
        if "position" not in self.options.axes:
            return [0]
        cfg, starts = self.model.cfg, sorted(self.positions)
        one = len(cfg.recurrent_layers) * cfg.n_heads * cfg.d_k * cfg.d_v * self.model.W_E.element_size()
        return starts if len(starts) * one <= self.options.memory else starts[:1]

    def _changes(self, layer: int, values: Values | None) -> list[list[Edit]]:
        """What is done in each run of a layer, in the order of the axes behind the layer's."""
        make = self.site.remove if values is None else partial(self.site.put, values)
        by_head = [[head] for head in self.heads or ()] if "head" in self.options.axes else [self.heads]
        places: list[Any] = self.positions if "position" in self.options.axes else [slice(0, self.tokens.shape[1])]
        return [make(layer, heads, place, self.options.form) for heads in by_head for place in places]
