"""Training: `fit` on any batches of writes, `train` on a head of a model by hook name.

One step: loss, auxiliary loss, gradient without its part along the atoms, clipping, Adam at the scheduled rate, atoms
back to unit norm, counters; now and then a line of the log and a move of dead atoms. Everything random follows from
the seeds of the two configs.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from writesae.config import TrainConfig, WriteSAEConfig
from writesae.sae import Factored, LossOutput, Samples, WriteSAE
from writesae.stream.activations import ActivationStream
from writesae.stream.corpus import Passages
from writesae.stream.sources import Source
from writesae.training.metrics import measure
from writesae.training.revival import auxiliary_loss, count_step, dead_atoms, resample

Batch = tuple[Float[Tensor, "batch d_k"], Float[Tensor, "batch d_v"]]
Line = dict[str, int | float]
OnStep = Callable[[int, Line], None]
Progress = Callable[[str, int, int], None]
HELDOUT_WRITES = 65536


@dataclass(frozen=True)
class TrainResult:
    """What training gives back."""

    sae: WriteSAE
    """The trained dictionary, its provenance filled in."""
    log: list[Line]
    """A line every `log_every` steps: step, loss, fvu, l0, aux, dead, resampled, lr, grad_norm, seconds."""
    metrics: dict[str, dict[str, int | float]] = field(default_factory=dict)
    """Quality at the end, by text: "train", and "heldout" where held-out tokens were given."""


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up to `lr` over `warmup_steps`, then a cosine to `lr_min` at the last step (steps count from 0)."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    span = max(config.steps - 1 - config.warmup_steps, 1)
    done = min((step - config.warmup_steps) / span, 1.0)
    return config.lr_min + (config.lr - config.lr_min) * (1 + math.cos(math.pi * done)) / 2


class Trainer:
    """The state of one training run: dictionary, optimiser, step, generator of resampling, log."""

    def __init__(self, sae: WriteSAE, config: TrainConfig):
        self.sae, self.config = sae, config
        # The fused kernel makes one pass over parameter, gradient and moments; the others make several.
        self.optimizer = torch.optim.Adam(sae.parameters(), lr=config.lr, fused=True)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step = 0
        self.log: list[Line] = []
        self.resampled = 0
        self.started = time.perf_counter()

    def run(self, batches: Iterable[Batch | Samples], on_step: OnStep | None = None) -> list[Line]:
        """Train until `config.steps`; raises `ValueError` when the batches end before."""
        source: Iterator[Batch | Samples] = iter(batches)
        self.sae.train()
        while self.step < self.config.steps:
            batch = next(source, None)
            if batch is None:
                raise ValueError(f"the batches ended at step {self.step} of {self.config.steps}")
            line = self.advance(batch if isinstance(batch, Samples) else Factored(*batch))
            if on_step:
                on_step(self.step, line)
        self.sae.eval()
        return self.log

    def advance(self, samples: Samples) -> Line:
        """One step. Returns the last line of the log. Raises `ValueError` when the loss is not finite."""
        dead = dead_atoms(self.sae, self.config.dead_after)
        output = self.sae.loss(samples)
        aux = self._auxiliary(samples, output, dead)
        total = output.loss + self.config.aux_weight * aux + output.penalty
        if not torch.isfinite(total):
            came, lr = total.item(), self.config.lr
            raise ValueError(f"the loss is {came} at step {self.step}: lower lr={lr} or look at the writes")
        self.optimizer.zero_grad()
        total.backward()
        grad_norm = self._update()
        count_step(self.sae, output.codes)
        self._move_dead_atoms(samples, output)
        self._write_log(output, aux, dead, grad_norm)
        self.step += 1
        return self.log[-1]

    def _auxiliary(self, samples: Samples, output: LossOutput, dead: Tensor) -> Tensor:
        if self.config.aux_weight == 0:
            return output.loss.new_zeros(())
        return auxiliary_loss(self.sae, samples, output, dead, self.config.aux_k)

    def _update(self) -> Tensor:
        """Project, clip, step at the scheduled rate, renormalise; returns the norm of the gradient before clipping."""
        if self.config.project_gradient:
            self.sae.decoder.project_gradients_()
        limit = self.config.grad_clip or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(self.sae.parameters(), limit)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        self.optimizer.step()
        self.sae.decoder.normalise_()
        return grad_norm

    def _move_dead_atoms(self, samples: Samples, output: LossOutput) -> None:
        every, done = self.config.resample_every, self.step + 1
        if every and done % every == 0 and done <= self.config.resample_until * self.config.steps:
            dead = dead_atoms(self.sae, self.config.dead_after)
            self.resampled += resample(
                self.sae, self.optimizer, samples, output.errors, dead, self.generator, codes=output.codes
            )

    def _write_log(self, output: LossOutput, aux: Tensor, dead: Tensor, grad_norm: Tensor) -> None:
        last = self.step + 1 == self.config.steps
        if self.step % self.config.log_every and not last:
            return
        line = {
            "step": self.step,
            "loss": output.loss.item(),
            "fvu": output.fvu.item(),
            "l0": output.l0.item(),
            "aux": aux.item(),
            "dead": int(dead.sum()),
            "resampled": self.resampled,
            "lr": learning_rate(self.step, self.config),
            "grad_norm": grad_norm.item(),
            "seconds": time.perf_counter() - self.started,
        }
        self.log.append(line)


def fit(sae: WriteSAE, batches: Iterable[Batch | Samples], config: TrainConfig, on_step: OnStep | None = None) -> list[Line]:
    """Train `sae` in place on batches (key, value); returns the log.

    The dictionary should have been calibrated (`sae.calibrate_`) on writes like these. `on_step(steps done, last log
    line)` is called after every step. Raises `ValueError` when the loss stops being finite or the batches end early.
    """
    return Trainer(sae, config).run(batches, on_step)


def train(
    model: HookedRecurrentModel,
    hook: str = "blocks.1.mixer.hook_write",
    head: int = 0,
    *,
    tokens: Int[Tensor, "passage pos"] | Passages,
    config: TrainConfig | None = None,
    sae_config: WriteSAEConfig | None = None,
    heldout: Int[Tensor, "heldout_passage heldout_pos"] | Passages | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a WriteSAE on the writes of one head.

    Args:
        model: the language model, which stays as it is.
        hook: "blocks.{layer}.mixer.hook_write"; other hooks raise.
        head: value head of that layer.
        tokens: passages to stream; `Passages` also leave their split and fingerprint in the provenance.
        config: how to train.
        sae_config: the dictionary; by default the paper's 2,048 atoms and k = 32 at the model's d_k and d_v.
        heldout: passages that are only measured, at the end.
        progress: called as progress(stage, done, total), stage "writes" (passages read) or "steps".

    Raises:
        ValueError: unknown or unsupported hook, head out of range, sizes that are not the model's, a loss that is not
        finite.
    """
    config = config or TrainConfig()
    sae_config = sae_config or WriteSAEConfig(d_k=model.cfg.d_k, d_v=model.cfg.d_v)
    if (sae_config.d_k, sae_config.d_v) != (model.cfg.d_k, model.cfg.d_v):
        came, expected = (sae_config.d_k, sae_config.d_v), (model.cfg.d_k, model.cfg.d_v)
        raise ValueError(f"sae_config has (d_k, d_v) = {came}, but the writes of this model have {expected}")
    stream = stream_of(model, tokens, hook, head, config)
    source = Source(hook, head)
    stream.prepare((lambda done, total: progress("writes", done, total)) if progress else None)
    sae = WriteSAE(sae_config).to(model.device)
    sample = stream.sample(config.calibration_writes)[source]
    sae.calibrate_(sample)
    report = (lambda done, line: progress("steps", done, config.steps)) if progress else None
    log = fit(sae, (batch[source] for batch in stream), config, report)
    metrics = {"train": measure(sae, sample).to_dict()}
    if heldout is not None:
        unseen = stream_of(model, heldout, hook, head, config).sample(HELDOUT_WRITES)[source]
        metrics["heldout"] = measure(sae, unseen).to_dict()
    sae.provenance.update(provenance(model, stream, tokens, heldout, config, metrics))
    return TrainResult(sae, log, metrics)


def stream_of(
    model: HookedRecurrentModel, tokens: Tensor | Passages, hook: str, head: int, config: TrainConfig
) -> ActivationStream:
    """The stream that a training run reads these tokens through."""
    return ActivationStream(
        model,
        tokens.tokens if isinstance(tokens, Passages) else tokens,
        [Source(hook, head)],
        batch_size=config.batch_size,
        passages_per_forward=config.passages_per_forward,
        skip_positions=config.skip_positions,
        cache_bytes=config.cache_bytes,
        buffer_samples=config.buffer_writes,
        seed=config.seed,
    )


def provenance(
    model: HookedRecurrentModel,
    stream: ActivationStream,
    tokens: Tensor | Passages,
    heldout: Tensor | Passages | None,
    config: TrainConfig,
    metrics: dict[str, dict[str, int | float]],
) -> dict[str, Any]:
    """Where a dictionary comes from, as plain JSON values: it is saved with the weights."""

    def record(text: Tensor | Passages) -> dict[str, Any]:
        if isinstance(text, Passages):
            return text.record()
        return {"n_passages": len(text), "length": int(text.shape[1])}

    return {
        "model": model.cfg.model_name,
        "rule": model.cfg.layer_types[stream.about[stream.sources[0]].layer or 0],
        "hook": stream.sources[0].hook,
        "layer": stream.about[stream.sources[0]].layer,
        "head": stream.sources[0].head,
        "layout": "key_first",
        "write": "additive",
        "train_text": record(tokens),
        "heldout_text": None if heldout is None else record(heldout),
        "training": config.to_dict(),
        "metrics": metrics,
    }
