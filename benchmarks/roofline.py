"""How long the Triton kernels must take on an H100 at least: computed from what they move and compute, never measured.

    python benchmarks/roofline.py [--products tf32 | tf32x3 | bf16] [--markdown FILE]

Bytes and operations are counted in `support/traffic.py`, kernel by kernel, for the layers of published models. A kernel needs
at least the longest of three times: its bytes at the bandwidth of the memory, its matrix products at the peak of the matrix
units, its other operations at the peak of the float32 units. Kernels run one after another, so their times add up.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from support.traffic import Kernel, Shape, backward, forward, least_bytes, step

BANDWIDTH = 3.35e12
PRODUCTS = {"tf32": 494.7e12, "bf16": 989.4e12, "tf32x3": 494.7e12 / 3}
OTHER = 66.9e12
SCALAR, CHANNEL = 64, 16
"""Positions per chunk, with one decay for a head and with one for each key channel."""
SHAPES = (
    Shape("Gated DeltaNet, Qwen3.5-0.8B (and 2B)", "tied", False, 16, 128, 128, SCALAR),
    Shape("Gated DeltaNet, Qwen3.5-9B (and 4B)", "tied", False, 32, 128, 128, SCALAR),
    Shape("Gated DeltaNet, Qwen3.5-27B", "tied", False, 48, 128, 128, SCALAR),
    Shape("Mamba-2, 370m", "plain", False, 32, 128, 64, SCALAR),
    Shape("Mamba-2, 2.7b", "plain", False, 80, 128, 64, SCALAR),
    Shape("RWKV-7, 0.1B", "decoupled", True, 12, 64, 64, CHANNEL),
    Shape("RWKV-7, 2.9B", "decoupled", True, 40, 64, 64, CHANNEL),
)
ASSUMPTIONS = """\
Computed by `python benchmarks/roofline.py`, not measured: no GPU was used. One layer, inputs in bfloat16 (decay and
erase strength float32), state and all scratch float32.

- H100 SXM: 3.35 TB/s of HBM3; dense peaks of 989 TFLOP/s in bf16 and 495 TFLOP/s in TF32 on the matrix units (the data sheet
  gives twice that, "with sparsity"), 67 TFLOP/s in float32 elsewhere. Source: NVIDIA H100 Tensor Core GPU data sheet.
- Products: {products}.
- Chunks of {scalar} positions with one decay for a head, of {channel} with one for each key channel, forward and backward.
- A kernel loads each of its arrays once and stores each once; what several programs of one kernel load is then in the L2 cache.
  All arrays between two kernels go through HBM: this holds once they exceed the 50 MB of L2. A short sequence may be faster.
- The backward pass prepares and carries the chunks again, as the forward pass saves only its inputs.
- Whole [C, C] squares are multiplied, their empty halves too. Where every key channel decays by itself, a Gram matrix costs
  five operations per entry and key channel outside the matrix units. Row-wise work is not counted, nor launches, nor the states
  at a sequence's ends, nor that few programs cannot fill the GPU: a real time lies above these.
- "Inputs and outputs" is what any kernel must move, whatever it keeps on the chip.
- Shapes, as heads (keys expanded to value heads) x d_k x d_v: Gated DeltaNet from transformers' `Qwen3_5TextConfig`, whose
  defaults are the 9B's (32 value heads of 128 x 128). The 0.8B's 16 and the 27B's 48 value heads are taken from secondary
  sources, and that the 2B and the 4B have the heads of the next is assumed: their released configs were not at hand.
  Mamba-2 from the state-spaces checkpoints: d_state 128, head width 64, d_inner 2048 and 5120. RWKV-7: 768 and 2560 wide, in
  heads of 64.
"""


@dataclass(frozen=True)
class Floor:
    """What some kernels need at least, per token of one layer (all its heads)."""

    bytes: float
    operations: float
    seconds: float
    bound: str
    """What takes most of that time: "memory", "matrix products" or "other operations"."""


def kernel_time(kernel: Kernel, peak: float) -> tuple[float, str]:
    """Seconds that one chunk and head of a kernel needs at least, and what binds."""
    times = {
        "memory": (kernel.loaded + kernel.stored) / BANDWIDTH,
        "matrix products": kernel.products / peak,
        "other operations": kernel.other / OTHER,
    }
    bound = max(times, key=lambda name: times[name])
    return times[bound], bound


def floor(kernels: Iterable[Kernel], shape: Shape, tokens: int, peak: float) -> Floor:
    """The sum over kernels, each of which covers so many tokens of one head."""
    kernels = list(kernels)
    times = [kernel_time(kernel, peak) for kernel in kernels]
    shares: dict[str, float] = {}
    for seconds, bound in times:
        shares[bound] = shares.get(bound, 0.0) + seconds
    per_token = shape.heads / tokens
    return Floor(
        bytes=per_token * sum(kernel.loaded + kernel.stored for kernel in kernels),
        operations=per_token * sum(kernel.products + kernel.other for kernel in kernels),
        seconds=per_token * sum(seconds for seconds, _ in times),
        bound=max(shares, key=lambda name: shares[name]),
    )


def rows(shape: Shape, peak: float) -> list[list[str]]:
    """One line per pass: what it moves and computes for a token, and the time that it needs at least."""
    passes = {
        "forward": (forward(shape), shape.chunk, least_bytes(shape, gradients=False)),
        "backward": (backward(shape), shape.chunk, least_bytes(shape, gradients=True)),
        "decode step": (step(shape), 1, None),
    }
    found = []
    for name, (kernels, tokens, least) in passes.items():
        need = floor(kernels, shape, tokens, peak)
        ends = need.bytes if least is None else least * shape.heads / tokens  # a step cannot keep its state on the chip
        cells = [f"{need.bytes / 1e3:,.1f}", f"{ends / 1e3:,.1f}", f"{need.operations / 1e6:,.2f}"]
        found.append([shape.model, size(shape), name, *cells, f"{need.seconds * 1e9:,.1f}", need.bound])
    return found


def size(shape: Shape) -> str:
    """heads x d_k x d_v."""
    return f"{shape.heads} x {shape.d_k} x {shape.d_v}"


def kernel_rows(shape: Shape, peak: float) -> list[list[str]]:
    """One line per kernel of both passes."""
    found = []
    for direction, kernels in (("forward", forward(shape)), ("backward", backward(shape))):
        for kernel in kernels:
            need = floor([kernel], shape, shape.chunk, peak)
            cells = [f"{need.bytes / 1e3:,.1f}", f"{need.operations / 1e6:,.2f}", f"{need.seconds * 1e9:,.2f}"]
            found.append([direction, kernel.name, *cells, need.bound])
    return found


PASSES = ("model", "heads x d_k x d_v", "pass", "KB", "inputs and outputs, KB", "MFLOP", "least time, ns", "what binds")
KERNELS = ("pass", "kernel", "KB", "MFLOP", "least time, ns", "what binds")


def markdown_table(names: Iterable[str], lines: Iterable[list[str]]) -> str:
    """A table in Markdown."""
    names = list(names)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *lines))


def page(products: str) -> str:
    """The whole page: assumptions, every model, and the kernels of one model of each form."""
    peak = PRODUCTS[products]
    meant = {
        "tf32": "TF32, which the kernels use for 16-bit inputs, whose tiles they widen to float32 as they load them",
        "tf32x3": "TF32 three times over (tf32x3), which the kernels use for float32 inputs",
        "bf16": "bfloat16, which the kernels do not use; for comparison",
    }[products]
    parts = ["# What the Triton kernels need at least on an H100", ""]
    parts += [ASSUMPTIONS.format(products=meant, scalar=SCALAR, channel=CHANNEL)]
    parts += [
        "## Per token of one layer",
        "",
        markdown_table(PASSES, (row for one in SHAPES for row in rows(one, peak))),
    ]
    for shape in (SHAPES[0], SHAPES[3], SHAPES[5]):
        parts += ["", f"## Kernels of {shape.model}, per token of one layer", ""]
        parts += [markdown_table(KERNELS, kernel_rows(shape, peak))]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Compute, show, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--products", choices=list(PRODUCTS), default="tf32", help="how tiles are multiplied")
    parser.add_argument("--markdown", type=Path, help="write the page with its assumptions to this file")
    arguments = parser.parse_args()
    table = Table(*PASSES, title="Per token of one layer, on an H100 SXM: computed, not measured")
    for column in table.columns[3:7]:
        column.justify = "right"
    for shape in SHAPES:
        for row in rows(shape, PRODUCTS[arguments.products]):
            table.add_row(*row, end_section=row[2] == "decode step")
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    if arguments.markdown:
        arguments.markdown.write_text(page(arguments.products), encoding="utf-8")


if __name__ == "__main__":
    main()
