"""Layers and whole models, ours against everyone else's on the same weights: prefill, decoding, training, on a CPU.

    python benchmarks/forward.py [--only PART]... [--repeats 5] [--threads N] [--allocator default|tuned|both] [--json PATH]

Parts, all in float32 with random weights and a small vocabulary:

    gdn-layer       one Gated DeltaNet layer of Qwen3.5-0.8B's shape against transformers' Qwen3_5GatedDeltaNet
    mamba2          two layers of mamba2-370m's shape and the head against transformers' Mamba2ForCausalLM, at its default chunk
                    and at the fastest
    rwkv7           RWKV-7 0.1B (12 layers, 768 wide) against the rwkv package (TorchScript) and rwkv7-hf
    decode-rwkv7    the same model, token by token with the state passed on, greedy, against the rwkv package
    decode-qwen     a four-layer hybrid of Qwen3.5-0.8B's shape, likewise, against transformers with its cache
    training        tokens per second of forward and backward at the shapes of the bundled models, batch 4, 512 tokens

Before a clock starts all sides must give the same logits (and gradients where there are any); the columns "error" show the
largest difference over the largest number. Sides run in turn, and the numbers are medians. Hooks are in place, and unused.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support import official_rwkv7
from support.hybrid import FULL, LINEAR, VOCABULARY, random_model
from support.machine import median_seconds, must_equal
from support.models import (
    losses_of,
    mamba2_pair,
    mixer_alone,
    parameter_gradients,
    recipe_sides,
)
from support.report import Options, Part, Row, Section, run_parts
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel

GDN_LENGTHS, MAMBA2_LENGTH, RWKV7_LENGTH = (1024, 2048, 4096), 2048, 1024
DECODED, PREFIX = 32, 64
TRAIN_LENGTH, TRAIN_BATCH = 512, 4
JIT_WARM_UPS = 3
"""TorchScript compiles and specialises during its first calls."""


def compare(sides: dict[str, Callable[[], Tensor]], options: Options, warmups: int = 1) -> Row:
    """Equality of all sides with the first, ours; then median seconds and how many times longer the others take."""
    made = {name: run() for name, run in sides.items()}
    error = max(must_equal(name, other, made["ours"]) for name, other in made.items())
    seconds = median_seconds(sides, options.repeats, warmups)
    others = {name: taken for name, taken in seconds.items() if name != "ours"}
    usual, best = next(iter(others.values())), min(others.values())
    row: Row = {**seconds, "theirs / ours": usual / seconds["ours"]}
    return {**row, "best of theirs / ours": best / seconds["ours"], "largest error": error}


def tokens_of(vocabulary: int, batch: int, length: int) -> Tensor:
    """Random tokens but 0, which rwkv7-hf takes for padding: its embedding learns nothing there."""
    return torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


def gdn_layer(options: Options) -> Section:
    """One Gated DeltaNet layer: prefill at every length, forward and backward at the shortest."""
    theirs = random_model([LINEAR], options.quick)
    ours = HookedRecurrentModel.from_hf(theirs)
    layer = theirs.model.layers[0].linear_attn.requires_grad_(True)
    mixer = partial(mixer_alone, ours)
    rows: list[Row] = []
    lengths = (64, 128) if options.quick else GDN_LENGTHS
    for length in lengths:
        x = torch.randn(1, length, theirs.config.hidden_size)
        with torch.no_grad():
            sides = {"ours": partial(mixer, x), "transformers": partial(layer, x)}
            rows.append({"measured": "prefill", "T": length, **compare(sides, options)})
    x = torch.randn(1, lengths[0], theirs.config.hidden_size, requires_grad=True)
    towards = torch.randn(1, lengths[0], theirs.config.hidden_size)

    def gradient(run: Callable[[Tensor], Tensor], weights: list[Tensor]) -> Tensor:
        return torch.autograd.grad(run(x), [x, *weights], towards)[0]

    weights = {"ours": list(ours.blocks[0].mixer.parameters()), "transformers": list(layer.parameters())}
    runs: dict[str, Callable] = {"ours": mixer, "transformers": layer}
    sides = {name: partial(gradient, run, weights[name]) for name, run in runs.items()}
    rows.append({"measured": "forward and backward", "T": lengths[0], **compare(sides, options)})
    return Section("One Gated DeltaNet layer of Qwen3.5-0.8B's shape, seconds", rows)


def mamba2(options: Options) -> Section:
    """Two layers of mamba2-370m's shape with head: prefill, forward and backward."""
    ours, theirs = mamba2_pair(options.quick)
    length = 128 if options.quick else MAMBA2_LENGTH
    tokens, rows = tokens_of(ours.cfg.d_vocab, 1, length), []
    with torch.no_grad():
        sides: dict[str, Callable] = {"ours": partial(ours, tokens)}
        sides |= {name: partial(run, tokens) for name, run in theirs.items()}
        rows.append({"measured": "prefill, all logits", "T": length, **compare(sides, options)})
    losses = losses_of(ours, theirs, tokens)
    sides = {name: partial(parameter_gradients, run) for name, run in losses.items()}
    rows.append({"measured": "forward and backward", "T": length, **compare(sides, options)})
    note = "theirs: transformers' Mamba2ForCausalLM at its default chunk, 256; best: whichever chunk is fastest."
    return Section("Two layers of mamba2-370m's shape and the head, seconds", rows, note)


def rwkv7_models(folder: Path, quick: bool) -> tuple[HookedRecurrentModel, Any, Path]:
    """Our model and the rwkv package's of one random file."""
    file = official_rwkv7.write_file(folder / "model.pth", official_rwkv7.SMALL if quick else official_rwkv7.Size())
    return HookedRecurrentModel.from_pretrained(file).requires_grad_(False), official_rwkv7.rwkv_package(file), file


@torch.no_grad()
def rwkv7(options: Options) -> Section:
    """RWKV-7 0.1B: prefill with all logits and with the last one."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        ours, package, file = rwkv7_models(Path(name), options.quick)
        hf = official_rwkv7.rwkv7_hf(file, Path(name) / "converted")
        length = 64 if options.quick else RWKV7_LENGTH
        tokens = tokens_of(ours.cfg.d_vocab, 1, length)
        listed = tokens[0].tolist()
        sides: dict[str, Callable] = {
            "ours": lambda: ours(tokens)[0],
            "rwkv": lambda: package.forward(listed, None, full_output=True)[0],
            "rwkv7-hf": lambda: hf(tokens)[0],
        }
        rows.append({"measured": "prefill, all logits", "T": length, **compare(sides, options, JIT_WARM_UPS)})
        sides = {
            "ours": lambda: ours(tokens, last_only=True)[0, 0],
            "rwkv": lambda: package.forward(listed, None)[0],
        }
        rows.append({"measured": "prefill, last logits", "T": length, **compare(sides, options, JIT_WARM_UPS)})
    return Section("RWKV-7 0.1B, seconds", rows, "theirs: the rwkv package. rwkv7-hf always computes all logits.")


class Decoder:
    """Greedy decoding that goes on where it stopped: `feed(token, state)` gives the next logits [d_vocab] and state."""

    def __init__(self, feed: Callable[[int, Any], tuple[Tensor, Any]], state: Any, first: int):
        self.feed, self.state, self.token = feed, state, first

    def __call__(self) -> Tensor:
        """The logits of `DECODED` further tokens."""
        made = []
        for _ in range(DECODED):
            logits, self.state = self.feed(self.token, self.state)
            self.token = int(logits.argmax())
            made.append(logits)
        return torch.stack(made)


def decode_row(sides: dict[str, Decoder], options: Options, warmups: int) -> Row:
    """Milliseconds per token; the first run of all is compared."""
    row = compare(sides, options, warmups)  # type: ignore[arg-type]
    return {
        name if "/" in name or "error" in name else f"{name}, ms": per_token(name, value) for name, value in row.items()
    }


def per_token(name: str, value: Any) -> Any:
    """Seconds per token of what is seconds per run; ratios and errors stay."""
    return value if "/" in name or "error" in name else value / DECODED


def our_decoder(model: HookedRecurrentModel, tokens: Tensor) -> Decoder:
    """Ours after a prefix."""
    _, state = model(tokens[:, :-1], return_state=True)

    def feed(token: int, state: Any) -> tuple[Tensor, Any]:
        logits, state = model(torch.tensor([[token]]), state=state, return_state=True)
        return logits[0, -1], state

    return Decoder(feed, state, int(tokens[0, -1]))


@torch.no_grad()
def decode_rwkv7(options: Options) -> Section:
    """RWKV-7 0.1B token by token."""
    with tempfile.TemporaryDirectory() as name:
        ours, package, _ = rwkv7_models(Path(name), options.quick)
        tokens = tokens_of(ours.cfg.d_vocab, 1, PREFIX)
        _, state = package.forward(tokens[0, :-1].tolist(), None)
        theirs = Decoder(lambda token, state: package.forward([token], state), state, int(tokens[0, -1]))
        row = decode_row({"ours": our_decoder(ours, tokens), "rwkv": theirs}, options, JIT_WARM_UPS)
    return Section(f"RWKV-7 0.1B, decoding after {PREFIX} tokens, milliseconds per token", [row])


@torch.no_grad()
def decode_qwen(options: Options) -> Section:
    """A hybrid of Qwen3.5-0.8B's shape token by token."""
    model = random_model([LINEAR, LINEAR, LINEAR, FULL], options.quick)
    ours, tokens = HookedRecurrentModel.from_hf(model).requires_grad_(False), tokens_of(VOCABULARY, 1, PREFIX)

    def feed(token: int, cache: Any) -> tuple[Tensor, Any]:
        out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        return out.logits[0, -1], out.past_key_values

    cache = model(tokens[:, :-1], use_cache=True).past_key_values
    theirs = Decoder(feed, cache, int(tokens[0, -1]))
    row = decode_row({"ours": our_decoder(ours, tokens), "transformers": theirs}, options, 1)
    return Section(f"Four-layer hybrid, decoding after {PREFIX} tokens, milliseconds per token", [row])


def training(options: Options) -> Section:
    """Forward and backward at the shapes of the bundled models."""
    rows: list[Row] = []
    batch, length = (1, 32) if options.quick else (TRAIN_BATCH, TRAIN_LENGTH)
    for recipe in ("tiny-gated-deltanet", "tiny-mamba2", "tiny-rwkv7"):
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = recipe_sides(recipe, Path(folder))
        tokens = tokens_of(ours.cfg.d_vocab, batch, length)
        losses = losses_of(ours, theirs, tokens)
        row = compare({name: partial(parameter_gradients, run) for name, run in losses.items()}, options)
        names = list(theirs)
        best = min(names, key=lambda name: row[name])
        about: Row = {"model": recipe, "parameters": ours.parameter_count(), "theirs is": names[0], "best is": best}
        rates = {"ours": row["ours"], "theirs": row[names[0]], "best of theirs": row[best]}
        speeds: Row = {f"{name}, tokens/s": batch * length / seconds for name, seconds in rates.items()}  # type: ignore[operator]
        rows.append({**about, **speeds, **{name: row[name] for name in row if "/" in name or "error" in name}})
    title = f"Forward and backward of the mean next-token loss, {batch} x {length} tokens, vocabulary 2,048"
    return Section(title, rows)


PARTS: dict[str, Part] = {
    "gdn-layer": gdn_layer,
    "mamba2": mamba2,
    "rwkv7": rwkv7,
    "decode-rwkv7": decode_rwkv7,
    "decode-qwen": decode_qwen,
    "training": training,
}


if __name__ == "__main__":
    run_parts(Path(__file__), __doc__, PARTS)
