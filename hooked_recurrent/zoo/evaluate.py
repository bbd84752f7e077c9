"""How good a small model is and how long its heads remember: held-out bits per byte and decay half-lives.

    python -m hooked_recurrent.zoo.evaluate tiny-gated-deltanet
    python -m hooked_recurrent.zoo.evaluate runs/tiny-gated-deltanet --json runs/tiny-gated-deltanet/evaluation.json

Bits per byte. Each held-out file is read from `<|endoftext|>` on, in windows whose state is carried from one to the
next, so every token is predicted from the whole file before it. The file costs the sum of -log2 p over its tokens and
the `<|endoftext|>` that ends it: the length of a code from which the file can be restored, divided by its UTF-8 bytes.
All files together count by their bytes. Two yardsticks of the same kind: `xz -9e` on each file by itself, as the model
reads them, and on all files joined in name order, where xz may copy from one file to the next.

Half-life. A head's memory decays by exp(log_decay) per token (log_decay <= 0), so at a rate held constant half of it is
left after log(1/2) / log_decay tokens. The rate depends on the token; the quartiles over all held-out tokens are given,
and the half-life of the mean log-decay, which is what long stretches of text do to the memory.
"""

import json
import lzma
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Annotated

import numpy as np
import torch
import typer
from jaxtyping import Float
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from hooked_recurrent.files import write_text
from hooked_recurrent.memory.decay import half_life_quartiles
from hooked_recurrent.model import HookedRecurrentModel
from hooked_recurrent.zoo import corpus
from hooked_recurrent.zoo.command import run_command
from hooked_recurrent.zoo.tokenizer import END_OF_TEXT, encode_documents

# A head whose decay rounds to "none at all" would have an infinite half-life, which JSON cannot hold.
SLOWEST_LOG_DECAY = -1e-9


@dataclass(frozen=True)
class FileScore:
    """What one file costs the model and xz."""

    name: str
    n_bytes: int
    """UTF-8 bytes."""
    n_tokens: int
    """Tokens predicted, the final `<|endoftext|>` included."""
    bits: float
    """Sum of -log2 p over those tokens."""
    xz_bytes: int
    """Bytes of `xz -9e` on this file alone."""


@dataclass(frozen=True)
class HalfLife:
    """Half-life of one head's memory in tokens: quartiles over tokens (and channels), and at the mean log-decay."""

    layer: int
    head: int
    lower_quartile: float
    median: float
    upper_quartile: float
    of_mean_log_decay: float


@dataclass(frozen=True)
class Evaluation:
    """Everything `evaluate` measures; `to_dict` is the content of `evaluation.json`."""

    model_name: str
    bits_per_byte: float
    xz_bits_per_byte_each_file: float
    xz_bits_per_byte_joined: float
    files: tuple[FileScore, ...]
    half_lives: tuple[HalfLife, ...]
    fingerprint: str
    python: str
    window: int
    seconds: float

    def to_dict(self) -> dict:
        """Plain JSON values."""
        return asdict(self)


def xz_size(data: bytes) -> int:
    """Bytes that `xz -9e` makes of `data`, container included."""
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME))


@dataclass(frozen=True)
class Window:
    """One model call over a few documents: which, how many of its positions are real in each, and what came out."""

    documents: list[int]
    counts: list[int]
    nats: Float[Tensor, "batch pos"]
    """-ln p of the token that follows each position; positions from counts[row] on are padding."""
    log_decay: dict[int, Float[Tensor, "batch pos head *d_k"]]
    """Per recurrent layer."""


@torch.no_grad()
def read_documents(
    model: HookedRecurrentModel, documents: list[list[int]], window: int = 1024, batch: int = 8
) -> Iterator[Window]:
    """Run documents through the model, a window at a time with the state carried on.

    Args:
        model: any HookedRecurrentModel.
        documents: token ids; all but the first token of each are predicted.
        window: tokens per call; results do not depend on it.
        batch: documents of similar length that run side by side; results do not depend on it.
    """
    if window < 1 or batch < 1:
        raise ValueError(f"window and batch must be at least 1, got {window} and {batch}")
    hooks = {layer: f"blocks.{layer}.mixer.hook_log_decay" for layer in model.cfg.recurrent_layers}
    order = sorted((i for i in range(len(documents)) if len(documents[i]) > 1), key=lambda i: len(documents[i]))
    for group in (order[start : start + batch] for start in range(0, len(order), batch)):
        longest = len(documents[group[-1]])
        padded = torch.tensor([documents[i] + [0] * (longest - len(documents[i])) for i in group])
        state = None
        for start in range(0, longest - 1, window):
            inputs, targets = padded[:, :-1][:, start : start + window], padded[:, 1:][:, start : start + window]
            (logits, state), cache = model.run_with_cache(
                inputs, names_filter=list(hooks.values()), state=state, return_state=True
            )
            nats = torch.nn.functional.cross_entropy(logits.mT.float(), targets.to(logits.device), reduction="none")
            counts = [min(max(len(documents[i]) - 1 - start, 0), inputs.shape[1]) for i in group]
            yield Window(group, counts, nats, {layer: cache[name] for layer, name in hooks.items()})


def half_lives(log_decay: dict[int, Float[Tensor, "tokens head *d_k"]]) -> tuple[HalfLife, ...]:
    """Half-lives in tokens of every head, from the log-decay (<= 0) of every layer at many tokens.

    Where every key channel has a decay of its own, each counts alike: quartiles and mean are over tokens and channels.
    """
    rows = []
    for layer, rates in log_decay.items():
        for head, of_head in enumerate(rates.unbind(1)):
            values = of_head.flatten().numpy().astype(np.float64).clip(max=SLOWEST_LOG_DECAY)
            rows.append(HalfLife(layer, head, *half_life_quartiles(values).tolist()))
    return tuple(rows)


def evaluate(
    model: HookedRecurrentModel,
    files: list[corpus.SourceFile],
    window: int = 1024,
    batch: int = 8,
    on_tokens: Callable[[int], None] | None = None,
) -> Evaluation:
    """Score a model that has a tokenizer on files it has not seen.

    Args:
        model: with `model.tokenizer`.
        files: usually `standard_library("heldout")`.
        window, batch: see `read_documents`.
        on_tokens: told after each call how many tokens it predicted.

    Raises:
        ValueError: no files, or a model without tokenizer.
    """
    if not files:
        raise ValueError("evaluate needs at least one file, got none")
    if model.tokenizer is None:
        raise ValueError("evaluate needs a model with a tokenizer, this one has none")
    started = time.perf_counter()
    end = model.tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    documents = [[*tokens, end] for tokens in encode_documents(model.tokenizer, [file.text for file in files])]
    bits = [0.0] * len(files)
    decays: dict[int, list[Tensor]] = {layer: [] for layer in model.cfg.recurrent_layers}
    for read in read_documents(model, documents, window, batch):
        for row, (document, count) in enumerate(zip(read.documents, read.counts, strict=True)):
            bits[document] += read.nats[row, :count].double().sum().item() / math.log(2)
            for layer, rates in read.log_decay.items():
                decays[layer].append(rates[row, :count].float().cpu())
        if on_tokens is not None:
            on_tokens(sum(read.counts))
    scores = tuple(
        FileScore(file.name, file.n_bytes, len(tokens) - 1, cost, xz_size(file.text.encode("utf-8")))
        for file, tokens, cost in zip(files, documents, bits, strict=True)
    )
    n_bytes = sum(score.n_bytes for score in scores)
    joined = "".join(file.text for file in sorted(files, key=lambda file: file.name)).encode("utf-8")
    return Evaluation(
        model_name=PurePath(model.cfg.model_name).name,  # a model loaded from a folder is named by its whole path
        bits_per_byte=sum(bits) / n_bytes,
        xz_bits_per_byte_each_file=8 * sum(score.xz_bytes for score in scores) / n_bytes,
        xz_bits_per_byte_joined=8 * xz_size(joined) / n_bytes,
        files=scores,
        half_lives=half_lives({layer: torch.cat(rates) for layer, rates in decays.items()}),
        fingerprint=corpus.fingerprint(files),
        python=platform.python_version(),
        window=window,
        seconds=round(time.perf_counter() - started, 1),
    )


def tables(evaluation: Evaluation) -> list[Table]:
    """The two tables that the command prints: bits per byte, and half-lives."""
    score = Table("code", "bits per byte", title=f"{len(evaluation.files)} held-out files")
    score.add_row(evaluation.model_name, f"{evaluation.bits_per_byte:.3f}", style="bold")
    score.add_row("xz -9e, each file by itself", f"{evaluation.xz_bits_per_byte_each_file:.3f}")
    score.add_row("xz -9e, all files joined", f"{evaluation.xz_bits_per_byte_joined:.3f}")
    lives = Table("layer", "head", "lower quartile", "median", "upper quartile", "of mean log-decay")
    lives.title = "half-life of the memory, tokens"
    for life in evaluation.half_lives:
        numbers = (life.lower_quartile, life.median, life.upper_quartile, life.of_mean_log_decay)
        lives.add_row(str(life.layer), str(life.head), *(f"{number:.1f}" for number in numbers))
    return [score, lives]


def main(
    model: Annotated[str, typer.Argument(help="A shipped model's name, or a folder written by the training command.")],
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")] = None,
    window: Annotated[int, typer.Option(help="Tokens per model call; changes speed only.")] = 1024,
    batch: Annotated[int, typer.Option(help="Files side by side; changes speed only.")] = 8,
    limit: Annotated[int | None, typer.Option(help="Only the first so many held-out files.")] = None,
) -> None:
    """Held-out bits per byte of a small model against xz -9e, and the decay half-life of every head."""
    loaded = HookedRecurrentModel.from_pretrained(model)
    files = corpus.standard_library("heldout")[:limit]
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("reading held-out files", total=None)
        result = evaluate(loaded, files, window, batch, on_tokens=lambda count: progress.advance(task, count))
    console.print(*tables(result))
    if json_path is not None:
        write_text(json_path, json.dumps(result.to_dict(), indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
