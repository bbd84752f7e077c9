"""What a dictionary is taught, by name, at one budget: the paper's objective, reconstruction of writes, and those that ask the
output.

Reconstruction weighs every direction of a write alike, and several atoms share the work. The replacement test asks something
else: one atom, alone, should do to the output what the write did. Four changes bring training closer to that, and each is an
objective of its own, so that what it is worth can be measured:

    the metric     errors count as they move the output (`metric.py`)
    a single atom  one active atom per write, tied encoder, atoms that start from samples: gain-shape quantisation of writes
    relative       an error counts by its own write's size: the test asks of small and large writes alike which KL is lower
    the KL         the last part of the steps is taken by the substituted write's own KL (`finetune.py`)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.config import StrictConfig, require_positive
from writesae.config import TrainConfig, WriteSAEConfig, require_at_least_zero, require_one_of
from writesae.sae import Samples, WriteSAE
from writesae.sae.samples import Factored
from writesae.sae.weighted import Weighted
from writesae.stream.sources import Source
from writesae.stream.store import ActivationStore
from writesae.training.finetune import FinetuneConfig, finetune
from writesae.training.jobs import Job, TrainResult, provenance
from writesae.training.metric import OutputMetric
from writesae.training.run import stream_of
from writesae.training.trainer import fit

BEST = "relative"
"""The objective of `best_dictionary`."""


@dataclass(frozen=True)
class Objective:
    """One way of teaching a dictionary."""

    source: str = "write"
    """What it rebuilds: "write", "net" (writes with their erase) or "state"."""
    single: bool = False
    """Whether one atom stands for a write: k = 1, tied encoder, atoms that start from samples."""
    metric: bool = False
    """Whether errors are measured by their effect on the output."""
    relative: bool = False
    """Whether an error counts relative to the write's own size."""
    kl: str | None = None
    """Loss of the fine-tune that takes the last steps, where there is one."""
    meaning: str = ""
    """In words, for tables."""


OBJECTIVES = {
    "state": Objective("state", meaning="reconstruction of states (the paper's)"),
    "write": Objective(meaning="reconstruction of writes"),
    "net": Objective("net", meaning="reconstruction of net writes, erase included"),
    "fisher": Objective(metric=True, meaning="reconstruction in the metric of the output"),
    "write_kl": Objective(kl="share", meaning="reconstruction, then the KL of the most active atom"),
    "single": Objective(single=True, meaning="reconstruction by a single atom"),
    "single_fisher": Objective(single=True, metric=True, meaning="by a single atom, in the metric of the output"),
    "relative": Objective(
        single=True, metric=True, relative=True, meaning="by a single atom, in that metric, relative to the write"
    ),
    "relative_kl": Objective(
        single=True, metric=True, relative=True, kl="share", meaning="the same, then the KL of the atom"
    ),
}
"""The objectives by name."""


@dataclass(frozen=True)
class ObjectiveConfig(StrictConfig):
    """The budget and the shape that all objectives share."""

    n_atoms: int = 512
    """Atoms in the dictionary."""
    k: int = 8
    """Atoms that may be active at once, where the objective leaves it open."""
    steps: int = 800
    """Optimiser steps in all, those of the fine-tune included."""
    batch_size: int = 256
    """Writes per step of reconstruction."""
    metric_passages: int = 16
    """Training passages from which the metric is measured, one forward and one backward pass each."""
    damping: float = 0.01
    """Added to the metric's eigenvalues, whose mean is 1."""
    finetune: FinetuneConfig = field(default_factory=lambda: FinetuneConfig(steps=200))
    """The fine-tune of the objectives that have one; its loss is the objective's, its seed that of the run."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ObjectiveConfig":
        """As every config; the fine-tune may be a mapping too."""
        values = dict(values)
        if isinstance(values.get("finetune"), Mapping):
            values["finetune"] = FinetuneConfig.from_dict(values["finetune"])
        found: ObjectiveConfig = super().from_dict(values)
        return found

    def __post_init__(self) -> None:
        owner = "ObjectiveConfig"
        require_positive(owner, n_atoms=self.n_atoms, k=self.k, steps=self.steps, batch_size=self.batch_size)
        require_positive(owner, metric_passages=self.metric_passages)
        require_at_least_zero(owner, damping=self.damping)

    def reconstruction_steps(self, objective: Objective) -> int:
        """Steps of reconstruction: all, less those of the fine-tune. Raises `ValueError` when that leaves none."""
        left = self.steps - (self.finetune.steps if objective.kl else 0)
        if left <= 0:
            came, steps = self.finetune.steps, self.steps
            raise ValueError(f"ObjectiveConfig.finetune.steps must be fewer than all steps={steps}, got {came}")
        return left


def train_objective(
    model: HookedRecurrentModel,
    tokens: Int[Tensor, "passage pos"],
    objective: str,
    *,
    layer: int,
    head: int,
    config: ObjectiveConfig | None = None,
    seed: int = 0,
    store: ActivationStore | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TrainResult:
    """A dictionary of one cell taught by one objective of `OBJECTIVES`, on training passages.

    Every objective takes `config.steps` optimiser steps. `result.log` holds the lines of the reconstruction (in the metric,
    where there is one) and then those of the fine-tune. The same seed gives the same dictionary. `store` is a cache of
    these tokens with `source_of(objective, ...)` in it, read instead of running the model.

    Raises:
        ValueError: an unknown objective, with the nearest name; and as `train` and `finetune` do.
        IndexError: a layer or head without writes.
    """
    config = ObjectiveConfig.given(config)
    require_one_of("train_objective", "objective", objective, tuple(OBJECTIVES))
    _check_cell(model, layer, head)
    what = OBJECTIVES[objective]
    job = _job(model, what, objective, layer, head, config, seed)
    training = TrainConfig(
        steps=config.reconstruction_steps(what),
        batch_size=config.batch_size,
        seed=seed,
        aux_weight=0.0 if what.single else 1.0,
    )
    metric = None
    if what.metric:
        sample = tokens[: config.metric_passages]
        metric = OutputMetric.measure(model, sample, layer, head, damping=config.damping, seed=seed)
    tell = on_progress or (lambda done, total: None)
    stream = stream_of(store or model, tokens, [job.source], training, device=model.device)

    def seen(samples: Samples) -> Samples:
        """The samples as this objective looks at them."""
        if not isinstance(samples, Factored):
            return samples
        samples = metric.transform(samples) if metric else samples
        return Weighted.relative(samples) if what.relative else samples

    sae = WriteSAE(job.sae).to(model.device)
    sae.calibrate_(seen(stream.sample(training.calibration_writes)[job.source]))
    batches = (seen(batch[job.source]) for batch in stream)
    log = fit(sae, batches, training, lambda step, line: tell(step, config.steps))
    sae = metric.restore(sae) if metric else sae
    if what.kl:
        taught = FinetuneConfig.from_dict({**config.finetune.to_dict(), "loss": what.kl, "seed": seed})
        log = log + finetune(
            model,
            sae,
            tokens,
            layer=layer,
            head=head,
            config=taught,
            on_progress=lambda step, total: tell(training.steps + step, config.steps),
        )
    sae.eval().provenance.update(provenance(model, job, tokens, None, training, {}))
    sae.provenance["objective"] = {"name": objective, **config.to_dict()}
    return TrainResult(sae, log)


def best_dictionary(
    model: HookedRecurrentModel,
    tokens: Int[Tensor, "passage pos"],
    *,
    layer: int,
    head: int,
    config: ObjectiveConfig | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> TrainResult:
    """The dictionary for putting single atoms in the place of writes: `train_objective` with the objective `BEST`."""
    return train_objective(
        model, tokens, BEST, layer=layer, head=head, config=config, seed=seed, on_progress=on_progress
    )


def source_of(objective: str, layer: int, head: int) -> Source:
    """What dictionaries of this objective are trained on. Raises `ValueError` for an unknown one."""
    require_one_of("train_objective", "objective", objective, tuple(OBJECTIVES))
    what = OBJECTIVES[objective].source
    hook = f"blocks.{layer}.mixer.hook_{'state' if what == 'state' else 'write'}"
    return Source(hook, head, "net" if what == "net" else "additive")


def _job(
    model: HookedRecurrentModel, what: Objective, name: str, layer: int, head: int, config: ObjectiveConfig, seed: int
) -> Job:
    shape = {"k": 1, "encoder": "tied", "start": "samples"} if what.single else {"k": config.k}
    sizes = {"d_k": model.cfg.d_k, "d_v": model.cfg.d_v, "n_atoms": config.n_atoms}
    return Job(name, source_of(name, layer, head), WriteSAEConfig.from_dict({**sizes, **shape, "seed": seed}))


def _check_cell(model: HookedRecurrentModel, layer: int, head: int) -> None:
    if layer not in model.cfg.recurrent_layers:
        raise IndexError(f"layer {layer} has no writes: the recurrent layers are {model.cfg.recurrent_layers}")
    if not 0 <= head < model.cfg.n_heads:
        raise IndexError(f"head {head} is out of range: the layer has heads 0 to {model.cfg.n_heads - 1}")
