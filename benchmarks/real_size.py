"""The whole workflow on a checkpoint of Qwen3.5-0.8B's full shape, random weights, on a CPU: seconds and memory of every stage.

    python benchmarks/real_size.py [--folder FOLDER] [--repeats 3] [--threads N] [--allocator default|tuned|both] [--json PATH]

transformers writes the checkpoint (24 layers, 18 of them Gated DeltaNet, hidden 1024, MLP 3584, a vocabulary of 248,320 tied
to the unembedding, float32: 3 GB) into a temporary folder, or into `--folder`, where it stays and is used again. Then, on one
text of 1,024 tokens, in a process of ours:

    load        HookedRecurrentModel.from_pretrained, and a first pass over 8 tokens, by which all weights have been read
    forward     a plain pass, last logits only
    cache       a pass that keeps the factors of every write of one linear layer
    trunk       the plain pass that the edits start from
    edits       64 replacements of one write, each with the logits at t + 1
    stream      the writes of one head of that layer, for a dictionary
    SAE steps   training steps of a WriteSAE (2,048 atoms, k = 32, 256 writes each)

Passes and edits run `--repeats` times, and the median is shown. The peak is that of the process since it started. The script
fails when it reaches 12 GiB, when the last logits are not those of transformers' own pass (in a process of its own), or when an
edit's logits are not those of a full pass with it. At the end stands what larger models would need, computed and not measured;
see `support/plan.py`.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support import hybrid, plan
from support.machine import allocator, answer_of, machine, must_equal, resident_bytes
from support.plain import Qwen3_5ForCausalLM
from support.report import (
    Row,
    other_allocator,
    parser_of,
    print_machine,
    table,
    torch_threads,
    wide_console,
    write_json,
)
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel, WriteEdit
from hooked_recurrent.patching import Trunk, run_edits
from writesae import Source, TrainConfig, WriteSAE, WriteSAEConfig
from writesae.training import fit, stream_of

LENGTH, EDITS, STEPS = 1024, 64, 8
LAYER, HEAD = 12, 4
LIMIT = 12 * 2**30
ROLES = ("log_decay", "erase", "probe", "write_key", "write_value", "query")


@torch.no_grad()
def write_checkpoint(folder: Path, quick: bool) -> dict[str, Any]:
    """Save a random model with transformers, its memories long; see `hybrid.random_model`."""
    start = time.perf_counter()
    if not (folder / "model.safetensors").is_file():
        torch.manual_seed(0)
        kinds = [hybrid.LINEAR] * 3 + [hybrid.FULL]
        config = hybrid.config_of(kinds, quick=True) if quick else plan.CONFIGS["Qwen3.5-0.8B"]
        model = Qwen3_5ForCausalLM(config).eval()
        hybrid.lengthen_memories(model)
        model.save_pretrained(folder, max_shard_size="100GB")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"seconds": time.perf_counter() - start, "bytes": size}


@torch.no_grad()
def their_forward(folder: Path, text: Tensor, out: Path, repeats: int) -> dict[str, Any]:
    """transformers' own load and pass, with the last logits saved to a file."""
    start = time.perf_counter()
    model = Qwen3_5ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model(text[:, :8], use_cache=False, logits_to_keep=1)
    loaded = time.perf_counter() - start
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        logits = model(text, use_cache=False, logits_to_keep=1).logits[0, -1]
        taken.append(time.perf_counter() - start)
    save_file({"last": logits.contiguous()}, out)
    return {"load": loaded, "forward": statistics.median(taken), "peak, MB": resident_bytes()}


class Stages:
    """Times one stage after the other and notes the peak of memory after each."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.rows: list[Row] = []

    def __call__(self, name: str, run: Callable[[], Any], what: str = "", *, once: bool = False) -> Any:
        """Run a stage, `repeats` times unless it must be `once`; raises `MemoryError` when the peak has reached the limit."""
        taken = []
        for _ in range(1 if once else self.repeats):
            made = None  # what an earlier run made is not held beside what this one makes
            start = time.perf_counter()
            made = run()
            taken.append(time.perf_counter() - start)
        seconds, peak = statistics.median(taken), resident_bytes()
        self.rows.append({"stage": name, "seconds": seconds, "peak, MB": peak, "what": what})
        if peak >= LIMIT:
            raise MemoryError(f"after stage {name!r} the peak is {peak / 2**30:.1f} GiB, not below {LIMIT / 2**30:.0f}")
        return made


def our_stages(folder: Path, text: Tensor, quick: bool, repeats: int) -> tuple[list[Row], Tensor, float]:
    """All stages of ours; also the last logits of the plain pass, and the error of an edit against a full pass with it."""
    stages = Stages(repeats)
    layer, head, count = (1, 1, 8) if quick else (LAYER, HEAD, EDITS)
    model = stages("load", lambda: loaded(folder, text), once=True)
    names = [f"blocks.{layer}.mixer.hook_{role}" for role in ROLES]
    with torch.no_grad():
        plain = stages("forward", lambda: model(text, last_only=True), f"{text.shape[1]:,} tokens")[0, -1]
        keep = {"names_filter": names, "return_type": None}
        _, cache = stages("cache", lambda: model.run_with_cache(text, **keep), f"the factors of layer {layer}")
        edits = replacements(cache, layer, head, text.shape[1] // 2, count)
        at = edits[0].position
        trunk = stages("trunk", lambda: Trunk.grow(model, text, [at]), f"the state at {at}")
        asked = {"horizon": 1, "trunk": trunk, "last_only": True}
        forks = stages("edits", lambda: list(run_edits(model, text, edits, **asked)), f"{count} replaced writes")
        full = model.run_with_hooks(text[:, : at + 2], edits=[edits[0]], last_only=True)[0, -1]
        first = next(fork for fork in forks if fork.index == 0)
        error = must_equal("an edit and a full pass with it", first.logits[-1], full)
    del cache, trunk, forks, full
    config = TrainConfig(steps=2 if quick else STEPS, batch_size=16 if quick else 256, passages_per_forward=1)
    source = Source(f"blocks.{layer}.mixer.hook_write", head)
    stream = stream_of(model, text, [source], config)
    stages("stream", stream.prepare, f"head {head} of layer {layer}", once=True)
    sae = WriteSAE(
        WriteSAEConfig(d_k=model.cfg.d_k, d_v=model.cfg.d_v, n_atoms=64 if quick else 2048, k=4 if quick else 32)
    )
    sae.calibrate_(stream.sample(config.calibration_writes)[source])
    steps = f"{config.steps} steps on {config.batch_size} writes"
    log = stages("SAE steps", lambda: fit(sae, (batch[source] for batch in stream), config), steps, once=True)
    if not log:
        raise RuntimeError("the dictionary took no step")
    return stages.rows, plain, error


@torch.no_grad()
def loaded(folder: Path, text: Tensor) -> HookedRecurrentModel:
    """Our model, after a first pass."""
    model = HookedRecurrentModel.from_pretrained(folder).requires_grad_(False)
    model(text[:, :8], last_only=True)
    return model


def replacements(cache: Any, layer: int, head: int, at: int, count: int) -> list[WriteEdit]:
    """Edits that put other rank-1 writes, of the native one's size, in its place."""
    native = [cache[f"blocks.{layer}.mixer.hook_write_{side}"][0, at, head] for side in ("key", "value")]
    generator = torch.Generator().manual_seed(0)
    edits = []
    for _ in range(count):
        key, value = (torch.randn(side.shape, generator=generator) for side in native)
        key, value = (new * old.norm() / new.norm() for new, old in zip((key, value), native, strict=True))
        edits.append(WriteEdit(layer, head, at, key=key, value=value))
    return edits


def text_of(folder: Path, quick: bool) -> Tensor:
    """Random tokens of the checkpoint's vocabulary."""
    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    return torch.randint(vocabulary, (1, 64 if quick else LENGTH), generator=torch.Generator().manual_seed(0))


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything: the checkpoint, transformers' pass and ours; raises `RuntimeError` when the two differ."""
    flags = ["--repeats", str(arguments.repeats), *(["--quick"] if arguments.quick else [])]
    flags += ["--threads", str(arguments.threads)] if arguments.threads else []
    script, at = Path(__file__), ["--folder", str(folder)]
    written = answer_of(script, ["--stage", "write", *at, *flags])
    theirs = answer_of(script, ["--stage", "theirs", *at, *flags])
    text = text_of(folder, arguments.quick)
    rows, last, edit_error = our_stages(folder, text, arguments.quick, arguments.repeats)
    expected = load_file(folder / LOGITS)["last"]
    error = must_equal("the last logits of both libraries", last, expected)
    (folder / LOGITS).unlink()
    for row in rows:
        row["transformers"] = theirs.get(str(row["stage"]))
    errors = {"last logits against transformers": error, "an edit against a full pass": edit_error}
    return {"checkpoint": written, "transformers": theirs, "stages": rows, "errors": errors, "plan": plan.plan()}


LOGITS = "last_logits.transformers.safetensors"


def run_stage(stage: str, folder: Path, quick: bool, repeats: int) -> dict[str, Any]:
    """A stage that has a process of its own."""
    if stage == "write":
        return write_checkpoint(folder, quick)
    return their_forward(folder, text_of(folder, quick), folder / LOGITS, repeats)


def report(found: dict[str, Any], where: dict[str, Any]) -> None:
    """Print the tables."""
    console = wide_console()
    console.print(table("Qwen3.5-0.8B's shape, random weights: seconds, and the peak of the process", found["stages"]))
    size, theirs = found["checkpoint"]["bytes"] / 1e9, found["transformers"]
    console.print(
        f"checkpoint {size:.2f} GB; transformers' own process peaks at {theirs['peak, MB'] / 1e6:,.0f} MB", style="dim"
    )
    console.print("; ".join(f"{name}: {error:.1e}" for name, error in found["errors"].items()), style="dim")
    console.print(table("Computed, not measured: what each model takes for the same stages on a GPU", found["plan"]))
    print_machine(console, where)


def main() -> None:
    """Parse, measure, report."""
    parser = parser_of(__doc__, repeats=3)
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here, and use it when it is there")
    parser.add_argument("--stage", choices=["write", "theirs"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    if other_allocator(arguments, Path(__file__)):
        return
    with torch_threads(arguments.threads), tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if arguments.stage:
            print(json.dumps(run_stage(arguments.stage, folder, arguments.quick, arguments.repeats)))
            return
        folder.mkdir(parents=True, exist_ok=True)
        found, where = measure(folder, arguments), machine()
    report(found, where)
    if arguments.json:
        settings = {"length": LENGTH, "edits": EDITS, "steps": STEPS}
        settings |= {"repeats": arguments.repeats, "quick": arguments.quick}
        write_json(arguments.json, {allocator(): {"machine": where, "settings": settings, **found}})


if __name__ == "__main__":
    main()
