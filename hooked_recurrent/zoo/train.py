"""Train one of the small models that this package ships, from the standard library's source files.

    python -m hooked_recurrent.zoo.train --out runs/tiny-gated-deltanet
    python -m hooked_recurrent.zoo.train --out runs/tiny-gated-deltanet --resume

Data: every training file becomes `<|endoftext|>` and its tokens; the files are joined to one stream, and a step reads a
batch of windows at uniformly random places of it. A window starts with an empty state.

Optimisers: Muon (Jordan et al. 2024: momentum, then the nearest orthogonal matrix) for the weight matrices inside the
blocks, AdamW for everything that is not a matrix acting on the residual stream: embeddings, convolutions, norms, decay
and gate parameters. The learning rate is a trapezoid: linear warm-up, constant, linear to zero (Haegele et al. 2024,
arXiv:2405.18392), so a run can be judged before it cools down.

A run stops and resumes exactly: weights, both optimisers and the random generator of the batches are in the checkpoint.
"""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from jaxtyping import Int
from torch import Tensor, nn

from hooked_recurrent.files import write_text
from hooked_recurrent.model import HookedRecurrentModel
from hooked_recurrent.zoo import checkpoint, corpus
from hooked_recurrent.zoo.command import run_command
from hooked_recurrent.zoo.muon import Muon
from hooked_recurrent.zoo.recipes import RECIPES, Recipe, find_recipe
from hooked_recurrent.zoo.tokenizer import encode_documents, load_tokenizer, train_tokenizer

LOG_NAME = "training_log.jsonl"
RECORD_NAME = "training.json"


@dataclass(frozen=True)
class Cadence:
    """How often a run reports and saves, in steps. Checkpoints must fall on log lines, so that resuming loses none."""

    log: int = 10
    checkpoint: int = 200
    heldout: int = 1000
    heldout_tokens: int = 65_536

    def __post_init__(self) -> None:
        for name, every in (("checkpoint", self.checkpoint), ("heldout", self.heldout)):
            if every % self.log:
                raise ValueError(f"Cadence.{name} must be a multiple of log={self.log}, got {every}")


def lr_factor(step: int, recipe: Recipe) -> float:
    """The trapezoid in [0, 1]: what step number `step` (counted from 0) multiplies the peak learning rates by."""
    cooldown_steps = max(1, round(recipe.cooldown * recipe.steps))
    return min(1.0, (step + 1) / max(1, recipe.warmup), (recipe.steps - step) / cooldown_steps)


def token_stream(tokenizer, files: list[corpus.SourceFile]) -> Int[Tensor, "tokens"]:
    """All documents in order, each behind its `<|endoftext|>`, as int32."""
    documents = encode_documents(tokenizer, [file.text for file in files])
    return torch.from_numpy(np.concatenate([np.asarray(document, dtype=np.int32) for document in documents]))


def random_windows(
    stream: Int[Tensor, "tokens"], batch: int, length: int, generator: torch.Generator
) -> Int[Tensor, "batch length"]:
    """`batch` windows of `length` tokens at uniformly random starts, as int64."""
    if len(stream) < length:
        raise ValueError(f"the stream has {len(stream)} tokens, fewer than one window of {length}")
    starts = torch.randint(len(stream) - length + 1, (batch,), generator=generator)
    return torch.stack([stream[start : start + length] for start in starts.tolist()]).long()


def fixed_windows(stream: Int[Tensor, "tokens"], seq_len: int, tokens: int) -> Int[Tensor, "window length"]:
    """Evenly spaced windows of `seq_len + 1` tokens with about `tokens` predictions: the same sample at every call."""
    windows = max(1, min(tokens, len(stream) - 1) // seq_len)
    starts = torch.linspace(0, max(0, len(stream) - seq_len - 1), windows).long()
    return torch.stack([stream[start : start + seq_len + 1] for start in starts.tolist()]).long()


def is_muon_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon trains it: a matrix inside a block. Per-head gate rows (a side under 16) have too few directions."""
    return name.startswith("blocks.") and parameter.ndim == 2 and min(parameter.shape) >= 16


def make_optimizers(model: nn.Module, recipe: Recipe) -> dict[str, torch.optim.Optimizer]:
    """Muon for the block matrices and AdamW for the rest; each group remembers its peak rate as "peak_lr"."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if is_muon_matrix(name, p)]
    others = [p for name, p in trained if not is_muon_matrix(name, p)]
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if matrices:
        optimizers["muon"] = Muon(matrices, lr=recipe.muon_lr, momentum=0.95, weight_decay=recipe.weight_decay)
    if others:
        optimizers["adamw"] = torch.optim.AdamW(
            others, lr=recipe.adam_lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
        )
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


class Trainer:
    """One run: the model, its optimisers, the stream of windows, and a folder with log and checkpoints.

    Args:
        model: called as `model(tokens, return_type="loss")` with tokens [batch, seq_len + 1]; returns a scalar in nats.
        recipe: see `Recipe`.
        stream: training tokens [tokens], int32.
        heldout: held-out tokens [tokens] of which a fixed sample is evaluated, or None.
        folder: where log and checkpoints go; created when missing.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        stream: Int[Tensor, "tokens"],
        folder: Path,
        heldout: Int[Tensor, "heldout_tokens"] | None = None,
        cadence: Cadence | None = None,
    ) -> None:
        self.model, self.recipe, self.stream, self.folder = model, recipe, stream, Path(folder)
        self.cadence = cadence or Cadence()
        self.optimizers = make_optimizers(model, recipe)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.step, self.seconds = 0, 0.0
        sample = self.cadence.heldout_tokens
        self.heldout = None if heldout is None else fixed_windows(heldout, recipe.seq_len, sample)
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def log_path(self) -> Path:
        """Where the JSON lines of `log` go."""
        return self.folder / LOG_NAME

    def train_step(self) -> float:
        """One batch, one update; returns the batch's loss in nats per token."""
        factor = lr_factor(self.step, self.recipe)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        tokens = random_windows(self.stream, self.recipe.batch, self.recipe.seq_len + 1, self.generator)
        loss = self.model(tokens, return_type="loss")
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip, error_if_nonfinite=True)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def heldout_loss(self) -> float:
        """Mean loss in nats per token over the fixed held-out sample; `ValueError` for a run that was given none."""
        if self.heldout is None:
            raise ValueError("this run was given no held-out tokens")
        self.model.eval()
        batches = self.heldout.split(self.recipe.batch)
        total = sum(self.model(tokens, return_type="loss").item() * len(tokens) for tokens in batches)
        self.model.train()
        return total / len(self.heldout)

    def run(self, stop_after: int | None = None, on_heldout: Callable[[], None] | None = None) -> None:
        """Train up to `stop_after` steps in all (the recipe's steps when None), logging and saving on the way.

        `on_heldout` is called after every held-out evaluation, for instance to export the model as it stands.
        """
        last = self.recipe.steps if stop_after is None else min(stop_after, self.recipe.steps)
        self.model.train()
        recent: list[float] = []
        while self.step < last:
            started = time.perf_counter()
            recent.append(self.train_step())
            self.seconds += time.perf_counter() - started
            if self.step % self.cadence.log == 0 or self.step == last:
                self.log(loss=sum(recent) / len(recent))
                recent.clear()
            if self.heldout is not None and (self.step % self.cadence.heldout == 0 or self.step == self.recipe.steps):
                self.log(heldout_loss=self.heldout_loss())
                if on_heldout is not None:
                    on_heldout()
            if self.step % self.cadence.checkpoint == 0 or self.step == last:
                self.save()

    def log(self, **measured: float) -> None:
        """Append one JSON line: step, what was measured, tokens read, seconds in training steps, rate factor."""
        tokens = self.step * self.recipe.batch * self.recipe.seq_len
        line = {"step": self.step, **{name: round(value, 5) for name, value in measured.items()}, "tokens": tokens}
        line |= {"seconds": round(self.seconds, 1), "lr": round(lr_factor(self.step - 1, self.recipe), 5)}
        with self.log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def save(self) -> None:
        """Write a checkpoint of this step and drop the older ones."""
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        state = {"optimizers": optimizers, "generator": self.generator.get_state(), "seconds": self.seconds}
        checkpoint.save(self.folder, self.step, self.model, state)

    def resume(self) -> None:
        """Continue from the newest checkpoint exactly, dropping later log lines; `ValueError` if there is none."""
        self.step, state = checkpoint.load_newest(self.folder, self.model)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.generator.set_state(state["generator"])
        self.seconds = state["seconds"]
        if self.log_path.exists():
            lines = self.log_path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step]
            write_text(self.log_path, "".join(kept))


def describe_run(recipe: Recipe, name: str, stream: Tensor, files: list[corpus.SourceFile]) -> dict:
    """What the model card needs to know of a run, as plain JSON values."""
    return {
        "recipe_name": name,
        "recipe": asdict(recipe),
        "data": {
            "python": platform.python_version(),
            "files": len(files),
            "bytes": sum(file.n_bytes for file in files),
            "tokens": len(stream),
            "fingerprint": corpus.fingerprint(files),
            "undecodable": len(corpus.read_folder(corpus.library_folder()).undecodable),
        },
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
    }


def train(name: str, recipe: Recipe, out: Path, resume: bool = False, stop_after: int | None = None) -> None:
    """Train a recipe into the folder `out`: tokenizer, log, checkpoints, and at the end (and at every held-out
    evaluation) the model with its config.

    Raises `ValueError` when `out` already holds a run and `resume` is not given, or holds none and it is.
    """
    if not resume and checkpoint.newest(out) is not None:
        raise ValueError(f"{str(out)!r} already holds a run: pass --resume to continue it, or choose another folder")
    files = corpus.standard_library("train", include_tests=True)
    if resume:
        tokenizer = load_tokenizer(out)
    else:
        tokenizer = train_tokenizer(file.text for file in corpus.standard_library("train"))
        tokenizer.save_pretrained(str(out))
    stream = token_stream(tokenizer, files)
    heldout = token_stream(tokenizer, corpus.standard_library("heldout"))
    torch.manual_seed(recipe.seed)
    model = HookedRecurrentModel(recipe.config, tokenizer=tokenizer)
    trainer = Trainer(model, recipe, stream, out, heldout)
    record = json.dumps(describe_run(recipe, name, stream, files), indent=2) + "\n"
    if resume:
        check_same_run(out / RECORD_NAME, record)
        trainer.resume()
    write_text(out / RECORD_NAME, record)

    def export() -> None:
        model.save_pretrained(out)
        tokenizer.save_pretrained(str(out))

    trainer.run(stop_after, on_heldout=export)
    export()


def check_same_run(path: Path, record: str) -> None:
    """`ValueError` when the run that is being resumed had another recipe or other text."""
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is missing: the folder holds no run to resume")
    before, now = json.loads(path.read_text(encoding="utf-8")), json.loads(record)
    for key in ("recipe", "data"):
        for field, value in now[key].items():
            if before[key].get(field) != value:
                raise ValueError(f"cannot resume: {key}.{field} was {before[key].get(field)!r}, is now {value!r}")


def main(
    out: Annotated[Path, typer.Option(help="Folder for tokenizer, log, checkpoints and the finished model.")],
    recipe: Annotated[str, typer.Option(help="Which model to train: " + ", ".join(RECIPES))] = "tiny-gated-deltanet",
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; the recipe's own number when left out.")] = None,
    batch: Annotated[int | None, typer.Option(help="Windows per step.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Predictions per window.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the initial weights and the windows.")] = None,
    muon_lr: Annotated[float | None, typer.Option(help="Peak learning rate of the block matrices.")] = None,
    adam_lr: Annotated[float | None, typer.Option(help="Peak learning rate of all other parameters.")] = None,
    stop_after: Annotated[int | None, typer.Option(help="Stop at this step with the schedule unchanged.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue the run in --out exactly where its checkpoint is.")] = False,
) -> None:
    """Train a small recurrent language model on the source files of the Python standard library."""
    chosen = {"steps": steps, "batch": batch, "seq_len": seq_len, "seed": seed, "muon_lr": muon_lr, "adam_lr": adam_lr}
    given: dict[str, Any] = {field: value for field, value in chosen.items() if value is not None}
    train(recipe, replace(find_recipe(recipe), **given), out, resume, stop_after)


if __name__ == "__main__":
    run_command(main)
