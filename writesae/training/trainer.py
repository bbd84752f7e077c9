"""The training loop of one dictionary: `Trainer` makes the steps, `fit` feeds it any batches.

One step: loss, auxiliary loss, gradient without its part along the atoms, clipping, Adam at the scheduled rate, atoms
back to unit norm, counters; now and then a line of the log and a move of dead atoms. Everything random follows from
the seeds of the two configs.

Several processes make the step of one: every process is given the whole batch, computes on its own share, and the
gradients are summed with the weights of the shares. All that follows (clipping, Adam, counters, the draw of the writes
that dead atoms move to) then runs on equal numbers everywhere, so the copies of the dictionary stay equal without
being sent around.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from writesae.config import TrainConfig
from writesae.parallel import World
from writesae.sae import Factored, LossOutput, Samples, WriteSAE
from writesae.sae.states import StateSequences
from writesae.training.revival import auxiliary_loss, count_step, dead_atoms, resample
from writesae.training.schedule import bandwidth_share, learning_rate, sparsity_share

Pair = tuple[Float[Tensor, "batch d_k"], Float[Tensor, "batch d_v"]]
Batch = Samples | Pair
Line = dict[str, int | float]
OnStep = Callable[[int, Line], None]
NUMBERS = ("loss", "fvu", "l0", "aux", "penalty")
"""What every step measures, in the order of the tensor that the processes add up."""


class Trainer:
    """The state of one training run: dictionary, optimiser, step, generator of resampling, log."""

    def __init__(self, sae: WriteSAE, config: TrainConfig, world: World | None = None):
        self.sae, self.config, self.world = sae, config, world or World()
        # The fused kernel makes one pass over parameter, gradient and moments; the others make several.
        self.optimizer = torch.optim.Adam(sae.parameters(), lr=config.lr, fused=True)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step = 0
        self.log: list[Line] = []
        self.resampled = 0
        self._seconds_before = 0.0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall time since the start, over all interruptions."""
        return self._seconds_before + time.perf_counter() - self._started

    def run(self, batches: Iterable[Batch], on_step: OnStep | None = None) -> list[Line]:
        """Train until `config.steps`; raises `ValueError` when the batches end before."""
        source: Iterator[Batch] = iter(batches)
        while self.step < self.config.steps:
            batch = next(source, None)
            if batch is None:
                raise ValueError(f"the batches ended at step {self.step} of {self.config.steps}")
            line = self.advance(batch)
            if on_step:
                on_step(self.step, line)
        self.sae.eval()
        return self.log

    def advance(self, batch: Batch) -> Line:
        """One step on a batch, `Samples` or the pair (key, value); every process is given the whole batch.

        Returns the last line of the log. Raises `ValueError` when the loss is not finite, and for a batch of fewer
        samples than there are processes.
        """
        samples = batch if isinstance(batch, Samples) else Factored(*batch)
        share = self._share(samples)
        dead = dead_atoms(self.sae, self.config.dead_after)
        with self._prepared():
            output = self.sae.loss(share)
            aux = output.loss.new_zeros(())
            if self.config.aux_weight:
                aux = auxiliary_loss(self.sae, share, output, dead, self.config.aux_k)
        total = output.loss + self.config.aux_weight * aux + output.penalty
        numbers = torch.stack([total, output.loss, output.fvu, output.l0, aux, output.penalty]).detach()
        self.optimizer.zero_grad()
        if self.world.size > 1:
            weight = len(share) / len(samples)
            (total * weight).backward()
            numbers = self._sum_over_shares(numbers * weight)
        else:
            total.backward()
        self._check(numbers[0])
        grad_norm = self._update()
        count_step(self.sae, output.codes, self.world)
        self._move_dead_atoms(share, output)
        self._write_log(numbers[1:], dead, grad_norm)
        self.step += 1
        return self.log[-1]

    # --- saving ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on: {"tensors": name to tensor, "record": plain JSON values}.

        Weights and buffers are called sae/..., Adam's moments and step counts adam/<parameter>/..., and the state of
        the generator `generator`. Nothing is copied.
        """
        tensors = {f"sae/{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            for moment, tensor in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adam/{name}/{moment}"] = tensor
        tensors["generator"] = self.generator.get_state()
        record = {"step": self.step, "resampled": self.resampled, "seconds": self.seconds, "log": list(self.log)}
        return {"tensors": tensors, "record": record}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a run where `state_dict` left it.

        Raises `ValueError` when the tensors are not those of this dictionary; the trainer is then as it was.
        """
        tensors, record = dict(state["tensors"]), state["record"]
        own = self.sae.state_dict()
        for name, tensor in own.items():
            found = tensors.get(f"sae/{name}")
            if found is None or found.shape != tensor.shape:
                came = "nothing" if found is None else f"shape {tuple(found.shape)}"
                raise ValueError(f"{name} should be a tensor of shape {tuple(tensor.shape)}, got {came}")
        self.sae.load_state_dict({name: tensors[f"sae/{name}"] for name in own})
        moments: dict[int, dict[str, Tensor]] = {}
        for number, (name, _) in enumerate(self.sae.named_parameters()):
            prefix = f"adam/{name}/"
            found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if found:
                moments[number] = found
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.generator.set_state(tensors["generator"])
        self.step, self.resampled = int(record["step"]), int(record["resampled"])
        self.log = [dict(line) for line in record["log"]]
        self._seconds_before, self._started = float(record["seconds"]), time.perf_counter()

    # --- inside one step ---------------------------------------------------------------------------------------

    def _share(self, samples: Samples) -> Samples:
        """This process's part of a batch; the states of one passage stay together, so that running sums serve them."""
        if self.world.size == 1:
            return samples
        together = samples.per_passage if isinstance(samples, StateSequences) else 1
        parts = len(samples) // together
        if parts < self.world.size:
            what = "samples" if together == 1 else "passages"
            raise ValueError(f"a batch of {parts} {what} has nothing for some of the {self.world.size} processes")
        share = self.world.share(parts)
        return samples.take(slice(share.start * together, share.stop * together))

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """The dictionary in training, its sparsifier where the schedule has it, and looking at the batch of all processes."""
        activation: Any = self.sae.activation
        activation.sparsity = self.sae.config.sparsity * sparsity_share(self.step, self.config)
        activation.bandwidth = self.sae.config.bandwidth * bandwidth_share(self.step, self.config)
        activation.world = self.world
        self.sae.scoring_dtype = torch.bfloat16 if self.config.precision == "bfloat16" else None
        self.sae.train()
        try:
            yield
        finally:
            activation.world, self.sae.scoring_dtype = World(), None

    def _sum_over_shares(self, numbers: Float[Tensor, " number"]) -> Float[Tensor, " number"]:
        """Add up gradients and numbers over the processes, in one exchange; returns the numbers."""
        parameters = list(self.sae.parameters())
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([*(parameter.grad.flatten() for parameter in parameters), numbers])  # type: ignore[union-attr]
        sizes = [parameter.numel() for parameter in parameters]
        *grads, numbers = self.world.sum_(flat).split([*sizes, len(numbers)])
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad.copy_(grad.view_as(parameter))  # type: ignore[union-attr]
        return numbers

    def _check(self, total: Tensor) -> None:
        if not torch.isfinite(total):
            came, lr = total.item(), self.config.lr
            raise ValueError(f"the loss is {came} at step {self.step}: lower lr={lr} or look at the writes")

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

    def _move_dead_atoms(self, share: Samples, output: LossOutput) -> None:
        every, done = self.config.resample_every, self.step + 1
        if every and done % every == 0 and done <= self.config.resample_until * self.config.steps:
            dead = dead_atoms(self.sae, self.config.dead_after)
            what = share, output.errors, dead, self.generator, self.world
            self.resampled += resample(self.sae, self.optimizer, *what, codes=output.codes)

    def _write_log(self, numbers: Float[Tensor, " number"], dead: Tensor, grad_norm: Tensor) -> None:
        last = self.step + 1 == self.config.steps
        if self.step % self.config.log_every and not last:
            return
        line: Line = {"step": self.step, **dict(zip(NUMBERS, numbers.tolist(), strict=True))}
        line |= {
            "dead": int(dead.sum()),
            "resampled": self.resampled,
            "lr": learning_rate(self.step, self.config),
            "grad_norm": grad_norm.item(),
            "seconds": self.seconds,
        }
        self.log.append(line)


def fit(sae: WriteSAE, batches: Iterable[Batch], config: TrainConfig, on_step: OnStep | None = None) -> list[Line]:
    """Train `sae` in place on batches, `Samples` or pairs (key, value); returns the log.

    The dictionary should have been calibrated (`sae.calibrate_`) on samples like these. `on_step(steps done, last log
    line)` is called after every step. Raises `ValueError` when the loss stops being finite or the batches end early.
    """
    return Trainer(sae, config).run(batches, on_step)
