"""One write replaced, many times over: transformers with a cached prefix against the fork engine, in one process, in turn.

    python benchmarks/interventions.py [--batch 64] [--repeats 3] [--threads N] [--json PATH]

The model is a six-layer hybrid of Qwen3.5-0.8B's layer shape (hidden 1024, 16 heads of 128 x 128, MLP 3584, a softmax layer in
fourth place) with random weights and a vocabulary of 1,000; a text of 512 tokens; the write of layer 2, head 4 at position 256.

    hf        prefill of the first 256 tokens once (not timed); per edit a copy of the cache, a step over token t, the change of
              the cached state, and the tokens up to the horizon. It misses the read-out of token t itself, so that its
              answer for horizon t would be that of no edit: it has no row there.
    hf x 8    the same with eight edits as one batch, per edit.
    ours      `run_edits` with a kept trunk (one plain pass over the text, not timed), one edit per call.
    ours x N  one call for a whole batch, per edit.

Before the clock starts, ours must equal a full pass with the same edit, and hf must equal our cache reading (the state changed
after token t was read) at t + 1.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sae_step import machine
from torch import Tensor

if not torch.cuda.is_available():  # where it is installed, transformers would bind its Triton kernels, which need a GPU
    sys.modules["fla"] = None  # type: ignore[assignment]
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from hooked_recurrent import HookedRecurrentModel, WriteEdit
from hooked_recurrent.patching import Trunk, run_edits

LENGTH, T, LAYER, HEAD, WIDTH = 512, 256, 2, 4, 128
KINDS = ["linear_attention"] * 3 + ["full_attention"] + ["linear_attention"] * 2
HORIZONS = {"t": 0, "t + 1": 1, "the whole rest": None}


def build() -> tuple[Qwen3_5ForCausalLM, HookedRecurrentModel, Tensor]:
    """Both models with the same random weights, and the text."""
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=1000,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=len(KINDS),
        layer_types=KINDS,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        linear_key_head_dim=WIDTH,
        linear_value_head_dim=WIDTH,
        tie_word_embeddings=True,
    )
    theirs = Qwen3_5ForCausalLM(config).eval().requires_grad_(False)
    for layer in theirs.model.layers:
        if hasattr(layer, "linear_attn"):  # long memories: with the random start every edit is forgotten at once
            layer.linear_attn.dt_bias.fill_(-5.0)
            layer.linear_attn.A_log.fill_(-1.0)
    ours = HookedRecurrentModel.from_hf(theirs).requires_grad_(False)
    return theirs, ours, torch.randint(1000, (1, LENGTH))


class CachedPrefix:
    """The recipe with transformers: copy the cache of the prefix, read token t, change the state, read on."""

    def __init__(self, model: Qwen3_5ForCausalLM, tokens: Tensor, native: tuple[Tensor, Tensor]):
        self.model, self.tokens, self.native = model, tokens, native
        self.prefix = model(tokens[:, :T], use_cache=True).past_key_values

    def __call__(self, keys: Tensor, values: Tensor, horizon: int | None) -> Tensor:
        """Logits [edit, d_vocab] of the last token of the horizon."""
        cache, rows = copy.deepcopy(self.prefix), len(keys)
        if rows > 1:
            cache.reorder_cache(torch.zeros(rows, dtype=torch.long))  # linear layers have no batch_repeat_interleave
        text = self.tokens.expand(rows, -1)
        self.model(text[:, T : T + 1], past_key_values=cache, use_cache=True)
        change = keys[:, :, None] * values[:, None, :] - self.native[0][:, None] * self.native[1][None, :]
        cache.layers[LAYER].recurrent_states[0][:, HEAD] += change
        stop = LENGTH if horizon is None else T + 1 + horizon
        out = self.model(text[:, T + 1 : stop], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]


class Forks:
    """Our way: one plain pass, then every edit runs from its layer and position on."""

    def __init__(self, model: HookedRecurrentModel, tokens: Tensor):
        self.model, self.tokens, self.trunk = model, tokens, Trunk.grow(model, tokens, [T])

    def __call__(self, keys: Tensor, values: Tensor, horizon: int | None) -> Tensor:
        """Logits [edit, d_vocab] of the last token of the horizon."""
        edits = [WriteEdit(LAYER, HEAD, T, key=key, value=value) for key, value in zip(keys, values, strict=True)]
        forks = run_edits(self.model, self.tokens, edits, horizon=horizon, trunk=self.trunk, last_only=True)
        return torch.stack([fork.logits[-1] for fork in forks])


def check(hf: CachedPrefix, forks: Forks, keys: Tensor, values: Tensor) -> None:
    """Raise `RuntimeError` unless both sides compute what the module docstring says."""
    model, tokens = forks.model, forks.tokens
    edit = WriteEdit(LAYER, HEAD, T, key=keys[0], value=values[0])
    full = model.run_with_hooks(tokens, edits=[edit])[0, -1]
    state = model.snapshots(tokens, [T + 1])[T + 1]
    changed = state.layers[LAYER].matrix.clone()
    changed[:, HEAD] += keys[0][:, None] * values[0] - hf.native[0][:, None] * hf.native[1]
    patched = model(tokens[:, T + 1 : T + 2], state=state.with_matrix(LAYER, changed))[0, -1]
    for name, made, expected in (
        ("ours", forks(keys[:1], values[:1], None)[0], full),
        ("hf", hf(keys[:1], values[:1], 1)[0], patched),
    ):
        off = ((made - expected).abs().max() / expected.abs().max()).item()
        if not off < 1e-4:
            raise RuntimeError(f"{name} does not compute its edit: off by {off:.1e} of the logits")


def seconds(run: Callable[[], object], edits: int, repeats: int) -> float:
    """Median seconds per edit after one run that does not count."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        taken.append((time.perf_counter() - start) / edits)
    return statistics.median(taken[1:])


@torch.no_grad()
def measure(batch: int, repeats: int) -> list[dict[str, float | str | None]]:
    """A row per horizon: seconds per edit of each route, and the ratio of the best of theirs to our batch."""
    theirs, ours, tokens = build()
    _, cache = ours.run_with_cache(tokens)
    native = tuple(cache[f"blocks.{LAYER}.mixer.hook_write_{side}"][0, T, HEAD] for side in ("key", "value"))
    keys, values = torch.randn(2, batch, WIDTH) * WIDTH**-0.5
    hf = CachedPrefix(theirs, tokens, native)
    forks = Forks(ours, tokens)
    check(hf, forks, keys, values)
    rows: list[dict[str, float | str | None]] = []
    for name, horizon in HORIZONS.items():
        row: dict[str, float | str | None] = {"horizon": name, "hf": None, "hf x 8": None}
        if horizon != 0:
            row["hf"] = seconds(lambda h=horizon: hf(keys[:1], values[:1], h), 1, repeats)
            row["hf x 8"] = seconds(lambda h=horizon: hf(keys[:8], values[:8], h), 8, repeats)
        row["ours"] = seconds(lambda h=horizon: forks(keys[:1], values[:1], h), 1, repeats)
        many = batch if horizon is not None else min(batch, 8)
        row[f"ours x {batch}"] = seconds(lambda h=horizon, m=many: forks(keys[:m], values[:m], h), many, repeats)
        best = min((row[side] for side in ("hf", "hf x 8") if row[side] is not None), default=None)
        row["ratio"] = None if best is None else best / row[f"ours x {batch}"]  # type: ignore[operator]
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64, help="edits in our batch (8 with the whole rest as horizon)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each route")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice when left out")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    if arguments.repeats < 1 or arguments.batch < 8:
        parser.error("--repeats must be at least 1 and --batch at least 8")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = measure(arguments.batch, arguments.repeats)
    table = Table(*rows[0], title=f"Seconds per replaced write: median of {arguments.repeats}")
    for row in rows:
        *cells, ratio = row.values()
        shown = [cell if isinstance(cell, str) else "-" if cell is None else f"{cell:.4f}" for cell in cells]
        table.add_row(*shown, "-" if ratio is None else f"{ratio:.1f}x")
    console, where = Console(), machine()
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in where.items()), style="dim")
    if arguments.json:
        text = json.dumps({"machine": where, "seconds": rows}, indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
