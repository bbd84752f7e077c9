"""`--dry-run`: what a command would download, read, compute and write, and how long that may take. Nothing is written.

The network is never touched: of a model on the hub it is only said that it would be fetched. The time is an estimate: short
runs of the command's own work, on this machine and now, and a straight line through them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from writesae.cli.base import log, print_json

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from hooked_recurrent import HookedRecurrentModel
    from writesae.config import TrainConfig, WriteSAEConfig
    from writesae.sae.write_sae import WriteSAE
    from writesae.training.jobs import Job

PROBE_PASSAGES = 8
"""Passages that the short runs read."""
PATIENCE = 2.0
"""Seconds of a first short run from which on it is not done again, warm."""


@dataclass(frozen=True)
class Part:
    """A piece of work whose time is taken for a line in the number of its units."""

    unit: str
    """What is counted, in the plural."""
    units: int
    """How many of them the command would do."""
    run: Callable[[int], object]
    """Does so many of them."""
    times: int = 1
    """How often the command would pay what a short run pays whatever its units."""
    small: int = 4
    """Units of the shorter short run; the longer one has three times as many."""


@dataclass
class Forecast:
    """What a command would do."""

    verb: str
    """Its name."""
    downloads: str
    """What would be fetched."""
    reads: str = "nothing"
    """Which text would be read."""
    computes: list[str] = field(default_factory=list)
    """What would be computed, with its numbers."""
    writes: list[str] = field(default_factory=list)
    """Files and folders that would be made."""
    seconds: float | None = None
    """How long it may take; None where nothing could be measured."""
    measured: str = "not estimated"
    """What the estimate comes from, or why there is none."""

    def measure(self, parts: Sequence[Part], beside: str = "") -> None:
        """Take the time of short runs of all parts; `beside` says what they leave out."""
        try:
            with log.status("timing short runs"):
                found = [_time(part) for part in parts]
        except (ValueError, IndexError, RuntimeError) as error:
            self.measured = f"not estimated: {error}"
            return
        self.seconds = sum(seconds for seconds, _ in found)
        short = ", ".join(dict.fromkeys(words for _, words in found))
        self.measured = f"an estimate, from short runs on this machine ({short}){beside}"

    def show(self, as_json: bool, more: dict[str, Any] | None = None) -> None:
        """Print it: as JSON, or as lines of YAML comments, which may stand below a YAML configuration."""
        said = {"dry_run": True, **vars(self)}
        if as_json:
            print_json({**(more or {}), **said})
            return
        takes = "time not known" if self.seconds is None else f"about {in_words(self.seconds)}"
        typer.echo(f"# writesae {self.verb} --dry-run: nothing was written")
        for name, words in (
            ("downloads", [self.downloads]),
            ("reads", [self.reads]),
            ("computes", self.computes),
            ("writes", self.writes or ["nothing but what it prints"]),
            ("takes", [f"{takes}; {self.measured}"]),
        ):
            for line in words:
                typer.echo(f"# {name:>9}  {line}")


def in_words(seconds: float) -> str:
    """Two digits at most: an estimate has no more."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 100 * size else f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"


def _time(part: Part) -> tuple[float, str]:
    """Seconds for the whole of a part, and the short runs in words. A first run that was quick only warmed up."""
    few = min(part.small, part.units)
    many = min(3 * few, part.units)
    short = _seconds(part, few)
    short = _seconds(part, few) if short < PATIENCE else short
    if many == few:
        return short * part.times, f"{few} {part.unit}"
    each = max(0.0, (_seconds(part, many) - short) / (many - few))
    once = max(0.0, short - each * few)
    return once * part.times + each * part.units, f"{few} and {many} {part.unit}"


def _seconds(part: Part, units: int) -> float:
    start = time.perf_counter()
    part.run(units)
    return time.perf_counter() - start


def origin(name: str) -> tuple[str, Path | str | None]:
    """Where a model comes from, in words, and what it can be loaded from without the network; None where it cannot.

    Raises `ValueError` for what is neither bundled, nor a folder, nor shaped like a hub name.
    """
    from hooked_recurrent.loading.load import looks_local, unknown_model
    from hooked_recurrent.zoo.bundled import bundled_models

    path = Path(name).expanduser()
    if name in bundled_models():
        return f"nothing: {name} ships with the package", name
    if path.exists():
        return f"nothing: {name} is on this machine", name
    if looks_local(name):
        raise unknown_model(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return f"nothing: {name} is in this machine's cache of the hub", snapshot_download(name, local_files_only=True)
    except (LocalEntryNotFoundError, ValueError, OSError):
        return f"{name} from the hub: config, tokenizer and weights (their size is not asked: no network here)", None


def begin(verb: str, model: str) -> tuple[Forecast, "HookedRecurrentModel | None"]:
    """A dry run that knows where the model comes from, and the model where it is at hand."""
    from writesae.cli.base import load_model

    downloads, found = origin(model)
    plan = Forecast(verb, downloads)
    if found is None:
        plan.measured = "not estimated: the model is not on this machine"
    return plan, None if found is None else load_model(str(found))


def passages_in_words(count: int, length: int, split: str, text: object = None) -> str:
    """60 heldout passages of 256 tokens ..."""
    source = "the Python standard library" if text is None else str(text)
    return f"at most {count:,} {split} passages of {length} tokens ({count * length:,} tokens) from {source}"


def forward_part(model: "HookedRecurrentModel", tokens: "Int[Tensor, 'passage pos']", passages: int) -> Part:
    """Running the model over passages."""
    return Part("passages", passages, lambda count: model(tokens[:count], return_type=None), small=2)


def training_part(
    model: "HookedRecurrentModel",
    jobs: "Sequence[Job]",
    tokens: "Int[Tensor, 'passage pos']",
    config: "TrainConfig",
    times: int = 1,
) -> Part:
    """The optimiser steps of dictionaries, which may be trained several times."""

    def run(steps: int) -> None:
        from writesae.training.run import train_many

        train_many(
            model, jobs, tokens=tokens, config=replace(config, steps=steps, splice_passages=0, log_to=(), save_every=0)
        )

    return Part("steps", config.steps * times, run, times=times, small=10)


def brief_dictionary(
    model: "HookedRecurrentModel",
    layer: int,
    head: int,
    sizes: "WriteSAEConfig",
    tokens: "Int[Tensor, 'passage pos']",
) -> "WriteSAE":
    """A dictionary of ten steps, good for taking the time of what is done with one."""
    from writesae.config import TrainConfig
    from writesae.training.run import train

    config = TrainConfig(steps=10, splice_passages=0)
    return train(model, f"blocks.{layer}.mixer.hook_write", head, tokens=tokens, sae_config=sizes, config=config).sae


def replacement_part(
    model: "HookedRecurrentModel",
    sae: "WriteSAE",
    tokens: "Int[Tensor, 'passage pos']",
    cell: tuple[int, int],
    *,
    firings: int,
    times: int = 1,
) -> Part:
    """Replacement tests of so many firings each."""

    def run(count: int) -> None:
        from writesae.evaluation.replacing.replacement import ReplacementConfig, replacement

        config = ReplacementConfig(total=count, per_atom=count)
        replacement(model, sae, tokens, layer=cell[0], head=cell[1], config=config)

    return Part("firings", firings * times, run, times=times)
