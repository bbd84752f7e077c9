"""What is trained: jobs, each one dictionary of one source, and what comes back."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from markupsafe import Markup
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.display.html import card, details, table
from writesae.config import TrainConfig, WriteSAEConfig
from writesae.sae import WriteSAE
from writesae.sae.shown import by_measure
from writesae.stream.corpus import Passages
from writesae.stream.sources import WRITE, Source
from writesae.stream.sources import describe as describe_source
from writesae.stream.store import model_fingerprint, tokens_fingerprint
from writesae.training.trainer import Line

if TYPE_CHECKING:  # training does not load matplotlib
    from matplotlib.figure import Figure

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
Text = Int[Tensor, "passage pos"] | Passages
Unseen = Int[Tensor, "heldout_passage heldout_pos"] | Passages
# Lines of the log that a notebook shows.
LINES_SHOWN = 5
Metrics = dict[str, dict[str, int | float]]


@dataclass(frozen=True)
class Job:
    """One dictionary to train."""

    name: str
    """Names the job in logs and files: letters, digits, "_", "." and "-"."""
    source: Source
    """What it is trained on."""
    sae: WriteSAEConfig
    """What it is."""

    def to_dict(self) -> dict[str, Any]:
        """The fields but the name as plain values, ready for JSON."""
        return {"source": self.source.to_dict(), "sae": self.sae.to_dict()}


@dataclass(frozen=True, repr=False)
class TrainResult:
    """What training gives back."""

    sae: WriteSAE
    """The trained dictionary, its provenance filled in."""
    log: list[Line]
    """A line every `log_every` steps: step, loss, fvu, l0, aux, penalty, dead, resampled, lr, grad_norm, seconds."""
    metrics: Metrics = field(default_factory=dict)
    """Quality at the end, by text: "train", and "heldout" where held-out tokens were given."""

    def figure(self) -> "Figure":
        """The training curves: unexplained variance, active and dead atoms by step."""
        from writesae.sae.plots import training_curves

        return training_curves(self.log)

    def __repr__(self) -> str:
        """One line: the dictionary, how long it was trained, and how much it leaves unexplained."""
        steps = f"{self.log[-1]['step']:,} steps" if self.log else "no log"
        fvu = [f"fvu {numbers['fvu']:.4f} on {text}" for text, numbers in self.metrics.items() if "fvu" in numbers]
        return f"TrainResult({self.sae!r}, {', '.join([steps, *fvu])})"

    def _repr_html_(self) -> str:
        """Quality by text, the end of the log, and the dictionary."""
        parts = [table(by_measure(self.metrics))] if self.metrics else []
        if self.log:
            parts.append(details(f"the last of {len(self.log):,} lines of the log", table(self.log[-LINES_SHOWN:])))
        parts.append(details("the dictionary", Markup(self.sae._repr_html_())))
        return card("TrainResult", {"steps": self.log[-1]["step"] if self.log else None}, parts, note=repr(self.sae))


def checked(jobs: Sequence[Job]) -> list[Job]:
    """The jobs, when there are some and their names are distinct and fit for file names; else `ValueError`."""
    if not jobs:
        raise ValueError("there is no job to train")
    seen = set()
    for job in jobs:
        if not _NAME.fullmatch(job.name):
            raise ValueError(f"a job's name must be letters, digits, '_', '.' and '-', got {job.name!r}")
        if job.name in seen:
            raise ValueError(f"two jobs are called {job.name!r}")
        seen.add(job.name)
    return list(jobs)


def tokens_of(text: Tensor | Passages) -> Int[Tensor, "passage pos"]:
    """The tokens of a text; `TypeError` for what is neither `Passages` nor a tensor of tokens."""
    if isinstance(text, Passages):
        return text.tokens
    if not isinstance(text, Tensor):
        raise TypeError(f"tokens must be Passages (writesae.passages) or [passage, pos], got {type(text).__name__}")
    return text


def record_of(text: Tensor | Passages) -> dict[str, Any]:
    """What a dictionary remembers of a text, as plain JSON values."""
    if isinstance(text, Passages):
        return text.record()
    return {"n_passages": len(text), "length": int(text.shape[1])}


def describe(model: HookedRecurrentModel, jobs: Sequence[Job], text: Text, config: TrainConfig) -> dict[str, Any]:
    """What the numbers of a run depend on, as plain values: a run is resumed only by one of the same description."""
    return {
        "jobs": {job.name: job.to_dict() for job in jobs},
        "training": config.to_dict(),
        "model": {"name": model.cfg.model_name, "weights": model_fingerprint(model)},
        "tokens": {**record_of(text), "sha256": tokens_fingerprint(tokens_of(text))},
    }


def provenance(
    model: HookedRecurrentModel, job: Job, text: Text, heldout: Unseen | None, config: TrainConfig, metrics: Metrics
) -> dict[str, Any]:
    """Where a dictionary comes from, as plain JSON values: it is saved with the weights."""
    about = describe_source(model, job.source)
    return {
        "model": model.cfg.model_name,
        "weights": model_fingerprint(model),
        "rule": None if about.layer is None else model.cfg.layer_types[about.layer],
        "hook": job.source.hook,
        "layer": about.layer,
        "head": job.source.head,
        "layout": "key_first",
        "kind": about.kind,
        "form": job.source.form if about.kind == WRITE else None,
        "split": {"train": record_of(text), "heldout": None if heldout is None else record_of(heldout)},
        "training": config.to_dict(),
        "metrics": metrics,
    }
