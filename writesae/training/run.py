"""Training on a language model: `train_many`, any number of dictionaries from one forward pass, and `train`, one.

Every job sees batch n of its own source at step n, whatever else is trained beside it, so its result is what it would be
alone; and the step is all that a checkpoint has to remember of the data.

Several processes (see `writesae.parallel`) share the forward passes, and then either all train every job on their share of
each batch, or (`shard`) each trains some of the jobs on whole batches.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import writesae.training.checkpoint as checkpoint
from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.files import write_text
from writesae.config import TrainConfig, WriteSAEConfig
from writesae.parallel import World
from writesae.sae import WriteSAE
from writesae.sae.samples import Samples
from writesae.stream.activations import ActivationStream
from writesae.stream.corpus import Passages
from writesae.stream.sources import Source
from writesae.stream.sources import describe as describe_source
from writesae.stream.store import ActivationStore
from writesae.training.folder import RunFolder
from writesae.training.interrupt import Interrupt, noted_interrupts
from writesae.training.jobs import Job, Metrics, Text, TrainResult, Unseen, checked, describe, provenance, tokens_of
from writesae.training.logging import Log, check_logs, open_logs
from writesae.training.metrics import measure
from writesae.training.splice import loss_recovered
from writesae.training.together import anyone, merged
from writesae.training.trainer import Line, Trainer

Progress = Callable[[str, int, int], None]
OnLine = Callable[[str, Line], None]
HELDOUT_SAMPLES = 65536


class Run:
    """One run of `train_many`: its stream, its trainers, its folder."""

    def __init__(
        self,
        model: HookedRecurrentModel,
        jobs: Sequence[Job],
        text: Text,
        config: TrainConfig,
        *,
        out: str | Path | None = None,
        store: ActivationStore | None = None,
        world: World | None = None,
        shard: bool = False,
        progress: Progress | None = None,
        on_line: OnLine | None = None,
    ):
        self.model, self.jobs, self.text, self.config = model, checked(jobs), text, config
        self.world = world or World.current()
        self.shard = shard and self.world.size > 1
        self.progress, self.on_line = progress, on_line
        self.folder = None if out is None else RunFolder(out, [job.name for job in self.jobs])
        if self.world.is_main:
            check_logs(config.log_to, None if self.folder is None else self.folder.out)
        self.stream = self._stream(text, store)
        self._sample: dict[Source, Samples] | None = None
        self._check_sizes()
        own = self.jobs[self.world.rank :: self.world.size] if self.shard else self.jobs
        self.own = {job.name: job for job in own}
        alone = World() if self.shard else self.world
        self.trainers = {
            name: Trainer(WriteSAE(job.sae).to(model.device), config, alone) for name, job in self.own.items()
        }
        self.step = 0

    @property
    def sample(self) -> dict[Source, Samples]:
        """Samples of the training text for calibration and for the metrics at the end; every process asks."""
        if self._sample is None:
            self._sample = self.stream.sample(self.config.calibration_writes)
        return self._sample

    def start(self, resume: bool) -> None:
        """Go on from the newest checkpoint, or calibrate the dictionaries to begin."""
        found = None
        if self.folder is not None:
            description = describe(self.model, self.jobs, self.text, self.config)
            found = self.folder.claim(description, resume, self.world)
        if self.stream.cached or found is None:
            tell = self.progress
            self.stream.prepare((lambda done, total: tell("writes", done, total)) if tell else None)
        if found is None:
            sample = self.sample
            for name, trainer in self.trainers.items():
                trainer.sae.calibrate_(sample[self.own[name].source])
            return
        for name, state in checkpoint.read(found, list(self.own)).items():
            self.trainers[name].load_state_dict(state)
        self.step = int(found.name.removeprefix("step-"))

    def loop(self) -> None:
        """All the steps, with logs, checkpoints and a stop at Ctrl-C; see `train_many`."""
        logs = self._open_logs()
        try:
            with nullcontext(Interrupt()) if self.folder is None else noted_interrupts() as interrupt:
                while self.step < self.config.steps:
                    self._advance(logs)
                    stop = anyone(interrupt.asked, self.world)
                    saved = self._save() if stop or self._due() else None
                    if stop and self.step < self.config.steps:
                        raise KeyboardInterrupt(
                            f"stopped after step {self.step} of {self.config.steps}, saved in {saved}; resume goes on there"
                        )
        finally:
            for log in logs:
                log.close()

    def finish(self, heldout: Unseen | None) -> dict[str, TrainResult]:
        """Measure and save the dictionaries."""
        unseen = None if heldout is None else self._stream(heldout, None).sample(HELDOUT_SAMPLES)
        sample = self.sample
        results: dict[str, TrainResult] = {}
        for name, trainer in self.trainers.items():
            source = self.own[name].source
            trainer.sae.eval()
            metrics: Metrics = {"train": measure(trainer.sae, sample[source]).to_dict()}
            if heldout is not None and unseen is not None:
                metrics["heldout"] = measure(trainer.sae, unseen[source]).to_dict()
                metrics["heldout"] |= self._spliced(trainer.sae, source, heldout)
            where = provenance(self.model, self.own[name], self.text, heldout, self.config, metrics)
            trainer.sae.provenance.update(where)
            results[name] = TrainResult(trainer.sae, trainer.log, metrics)
            if self.folder is not None and self._writes:
                trainer.sae.save(self.folder.of_dictionary(name))
        everything = merged({name: result.metrics for name, result in results.items()}, self.world)
        if self.folder is not None and self.world.is_main:
            write_text(self.folder.out / "metrics.json", json.dumps(everything, indent=1))
        self.world.barrier()
        return results

    # --- inside ------------------------------------------------------------------------------------------------

    @property
    def _writes(self) -> bool:
        """Whether this process writes the files of its jobs."""
        return self.shard or self.world.is_main

    def _check_sizes(self) -> None:
        for job in self.jobs:
            about = self.stream.about[job.source]
            came, expected = (job.sae.d_k, job.sae.d_v), (about.d_k, about.d_v)
            if came != expected:
                raise ValueError(
                    f"the dictionary of job {job.name!r} has (d_k, d_v) = {came}, but {job.source.hook} gives {expected}"
                )

    def _stream(self, text: Tensor | Passages, store: ActivationStore | None) -> ActivationStream:
        sources = list(dict.fromkeys(job.source for job in self.jobs))
        problem = None if store is None else store.mismatch(self.model, tokens_of(text), sources)
        if problem:
            raise ValueError(f"the store cannot serve this run: {problem}")
        if store is None:
            return stream_of(self.model, text, sources, self.config, self.world)
        return stream_of(store, text, sources, self.config, self.world, self.model.device)

    def _spliced(self, sae: WriteSAE, source: Source, heldout: Tensor | Passages) -> dict[str, float]:
        passages = tokens_of(heldout)[: self.config.splice_passages]
        return loss_recovered(self.model, sae, source, passages).to_dict() if len(passages) else {}

    def _open_logs(self) -> list[Log]:
        before = merged({name: trainer.log for name, trainer in self.trainers.items()}, self.world)
        if not self.world.is_main:
            return []
        ordered = {job.name: before[job.name] for job in self.jobs}
        out = None if self.folder is None else self.folder.out
        return open_logs(
            self.config.log_to,
            out,
            ordered,
            first_step=self.step,
            project=self.config.log_project,
            config=describe(self.model, self.jobs, self.text, self.config),
        )

    def _advance(self, logs: list[Log]) -> None:
        batch = self.stream.batch(self.step)
        lines = {}
        for name, trainer in self.trainers.items():
            try:
                lines[name] = trainer.advance(batch[self.own[name].source])
            except ValueError as error:
                raise ValueError(f"job {name!r}: {error}" if len(self.jobs) > 1 else str(error)) from error
        if self.step % self.config.log_every == 0 or self.step + 1 == self.config.steps:
            for name, line in (merged(lines, self.world) if self.shard else lines).items():
                for log in logs:
                    log.write(name, line)
                if self.on_line:
                    self.on_line(name, line)
        self.step += 1
        if self.progress:
            self.progress("steps", self.step, self.config.steps)

    def _due(self) -> bool:
        every = self.config.save_every
        return self.step == self.config.steps or bool(every and self.step % every == 0)

    def _save(self) -> Path | None:
        if self.folder is None:
            return None
        states = {name: trainer.state_dict() for name, trainer in self.trainers.items()} if self._writes else {}
        return checkpoint.write(self.folder.checkpoints, self.step, states, keep=self.config.keep, world=self.world)


def stream_of(
    origin: HookedRecurrentModel | ActivationStore,
    text: Tensor | Passages,
    sources: Sequence[Source],
    config: TrainConfig,
    world: World | None = None,
    device: torch.device | None = None,
) -> ActivationStream:
    """The stream that a training run reads these tokens through; `device` is where a store's batches are needed."""
    return ActivationStream(
        origin,
        tokens_of(text),
        sources,
        batch_size=config.batch_size,
        passages_per_forward=config.passages_per_forward,
        skip_positions=config.skip_positions,
        cache_bytes=config.cache_bytes,
        buffer_samples=config.buffer_writes,
        seed=config.seed,
        world=world,
        device=device,
    )


def check_model(model: Any) -> None:
    """Raise `TypeError` for what is no model, such as the name of one."""
    if not isinstance(model, HookedRecurrentModel):
        raise TypeError(
            f"model must be a HookedRecurrentModel, got {type(model).__name__}: HookedRecurrentModel.from_pretrained(name)"
        )


def train_many(
    model: HookedRecurrentModel,
    jobs: Sequence[Job],
    *,
    tokens: Text,
    heldout: Unseen | None = None,
    config: TrainConfig | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    store: ActivationStore | None = None,
    world: World | None = None,
    shard: bool = False,
    progress: Progress | None = None,
    on_line: OnLine | None = None,
) -> dict[str, TrainResult]:
    """Train many dictionaries (of many heads, layers, seeds, sparsities) from the same forward passes.

    Args:
        model: the language model, which stays as it is.
        jobs: what to train; each result is what the job gives when it is trained alone.
        tokens: passages to stream; `Passages` also leave their split and fingerprint in the provenance.
        heldout: passages that are only measured, at the end.
        config: how to train, the same for every job.
        out: folder of the run (see folder.py): log, checkpoints, and at the end the dictionaries. Ctrl-C and SIGTERM then
            save before they stop the run with `KeyboardInterrupt`.
        resume: go on from the newest whole checkpoint in `out`, bit for bit; a folder without a run is started afresh.
        store: an `ActivationStore` of these tokens to read instead of running the model.
        world: the processes that train together; by default those that torchrun started.
        shard: give every process some of the jobs on whole batches, instead of all of them on its share of every batch.
        progress: called as progress(stage, done, total), stage "writes" (passages read) or "steps".
        on_line: called as on_line(job's name, line) for every new line of the log.

    Returns:
        The results by job; with `shard`, those of this process's own jobs.

    Raises:
        ValueError: unknown or unsupported hook, head out of range, sizes that are not the source's, a loss that is not
            finite, a folder that holds another run (naming what differs) or no whole checkpoint.
        OSError: a checkpoint could not be written; the finished ones are untouched.
    """
    check_model(model)
    if resume and out is None:
        raise ValueError("resume goes on from the checkpoints of a folder: give out as well")
    run = Run(
        model,
        jobs,
        tokens,
        TrainConfig.given(config),
        out=out,
        store=store,
        world=world,
        shard=shard,
        progress=progress,
        on_line=on_line,
    )
    run.start(resume)
    run.loop()
    return run.finish(heldout)


def train(
    model: HookedRecurrentModel,
    hook: str = "blocks.1.mixer.hook_write",
    head: int | None = 0,
    *,
    tokens: Text,
    config: TrainConfig | None = None,
    sae_config: WriteSAEConfig | None = None,
    heldout: Unseen | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train one dictionary on the writes of one head, or on any other hook: `train_many` with a single job called "sae".

    Args:
        model: the language model, which stays as it is.
        hook: the hook whose activations are learned, such as "blocks.{layer}.mixer.hook_write".
        head: head of that layer; None for hooks without heads.
        tokens: passages to stream; `Passages` also leave their split and fingerprint in the provenance.
        config: how to train.
        sae_config: the dictionary; by default the paper's 2,048 atoms and k = 32 at the widths of the hook.
        heldout: passages that are only measured, at the end.
        out: folder of the run: log, checkpoints and the dictionary.
        resume: go on from the newest checkpoint in `out`.
        progress: called as progress(stage, done, total), stage "writes" (passages read) or "steps".

    Raises:
        ValueError: see `train_many`.
    """
    check_model(model)
    source = Source(hook, head)
    if sae_config is None:
        about = describe_source(model, source)
        sae_config = WriteSAEConfig(d_k=about.d_k, d_v=about.d_v)
    job = Job("sae", source, sae_config)
    results = train_many(
        model, [job], tokens=tokens, heldout=heldout, config=config, out=out, resume=resume, progress=progress
    )
    return results["sae"]
