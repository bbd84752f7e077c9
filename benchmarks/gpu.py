"""On a GPU: are the kernels right there, and how fast beside flash-linear-attention and mamba_ssm, where those are installed.

    python benchmarks/gpu.py [--checks | --timings] [--layers 0 3 5] [--lengths 2048 8192] [--batch 1] [--dtype bfloat16]
                             [--json PATH]

This script has not been run by us on a GPU: we had none. Its checks and the arguments that it gives to other libraries are
tested on a CPU, with interpreted kernels and with those libraries' own references.

Checks compare reads, states and every gradient with the float64 step reference on the same device. Timings are of one layer's
recurrence, in one process, of every side on the same recurrence, after its reads have been compared with ours: forward, forward
and backward together, and one decode step. `triton.testing.do_bench` takes CUDA events around each run and empties the L2 cache
before it; a step is also timed as a CUDA graph, without the cost of launching it from Python. Tables show medians and the
fastest and slowest fifth.

The exit status is 2 without a GPU, and 1 where a check fails.
"""

import os

if __name__ == "__main__":  # read as triton is imported: on a GPU nothing is to be interpreted
    os.environ.pop("TRITON_INTERPRET", None)

import argparse
import importlib.metadata
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from roofline import SHAPES
from support.gpu_checks import Check, all_checks, error
from support.gpu_routes import PROBLEMS, Draw, Problem, Route
from support.machine import machine
from support.traffic import Shape
from torch import Tensor

from hooked_recurrent.factors import Factors
from hooked_recurrent.scan.kernels.step import triton_step
from hooked_recurrent.scan.kernels.variants import DTYPES

NO_GPU = "benchmarks/gpu.py needs a GPU that torch can use (CUDA or ROCm); none was found, so nothing was run."
ALIKE = 0.05
"""Reads of two sides that differ by more do not come from the same recurrence."""
QUANTILES = [0.5, 0.2, 0.8]
STATES = ("initial_state", "initial_states")


@dataclass(frozen=True)
class Timing:
    """One side of one comparison."""

    layer: str
    what: str
    batch: int
    length: int
    side: str
    note: str = ""
    """Why there is no time: the package is missing, or it failed."""
    milliseconds: float = float("nan")
    fast_fifth: float = float("nan")
    slow_fifth: float = float("nan")
    peak_megabytes: float = float("nan")
    difference: float = float("nan")
    """Of its reads from ours, relative."""


def without_state(names: dict[str, Any]) -> list[Tensor]:
    """The leaves that gradients are taken for: what a training step asks for, so not the state to start from."""
    return [one for name, one in names.items() if name not in STATES and isinstance(one, Tensor) and one.requires_grad]


def as_leaves(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same with floating-point tensors that gradients can be taken for."""
    return {
        name: one.detach().requires_grad_() if isinstance(one, Tensor) and one.is_floating_point() else one
        for name, one in arguments.items()
    }


def sides(
    problem: Problem, routes: list[Route], ours: dict[str, Callable[..., Any]]
) -> Iterator[tuple[str, Any, dict]]:
    """Name, function and arguments of every side; the function is None where a package is not installed."""
    present = {name: tensor for name, tensor in vars(problem.factors).items() if tensor is not None}
    for name, function in ours.items():
        yield name, function, present
    for route in routes:
        yield f"{route.module.split('.')[0]} {route.name}", route.load(), dict(route.arguments)


def run_time(run: Callable[[], Any], bench: Callable[..., Any] = triton.testing.do_bench) -> dict[str, float]:
    """Median, fastest and slowest fifth in milliseconds, and the most memory that a run takes beyond what was there."""
    run()  # compiles, and tunes where there is something to tune
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    median, fast, slow = bench(run, quantiles=QUANTILES)
    return {"milliseconds": median, "fast_fifth": fast, "slow_fifth": slow, "peak_megabytes": peak}


def gradient_run(function: Callable[..., Any], arguments: dict[str, Any], upstream: Tensor) -> Callable[[], Any]:
    """Forward and backward together."""
    leaves = as_leaves(arguments)

    def run() -> None:
        read = function(**leaves)[0]
        torch.autograd.grad(read, without_state(leaves), upstream.to(read.dtype))

    return run


def timings(
    shape: Shape, what: str, batch: int, length: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Timing]:
    """Every side of one layer; `what` is "forward", "forward and backward", "step" or "step, CUDA graph"."""
    stepping = what.startswith("step")
    length = 1 if stepping else length
    problem = PROBLEMS[shape.form](Draw(batch, length, shape.heads, dtype, device), shape.d_k, shape.d_v)
    ours = our_steps(problem) if stepping else {"ours": our_scan(problem)}
    bench = triton.testing.do_bench_cudagraph if "graph" in what else triton.testing.do_bench
    reference = None
    for name, function, arguments in sides(problem, problem.steps if stepping else problem.scans, ours):
        about = {"layer": shape.model, "what": what, "batch": batch, "length": length, "side": name}
        if function is None:
            yield Timing(**about, note="not installed")
            continue
        try:
            with torch.no_grad():
                read = function(**arguments)[0]
            reference = read.double() if reference is None else reference
            difference = error(read, reference)
            if "backward" in what:
                run = gradient_run(function, arguments, torch.randn_like(read))
                found = run_time(run, bench)
            else:
                with torch.no_grad():
                    found = run_time(lambda call=function, given=arguments: call(**given), bench)
        except Exception as failure:  # another library may refuse a device, a dtype or a width: the rest still runs
            if name.startswith("ours"):
                raise
            yield Timing(**about, note=f"failed: {type(failure).__name__}: {str(failure)[:200]}")
            continue
        yield Timing(**about, difference=difference, **found)


def our_scan(problem: Problem) -> Callable[..., Any]:
    """`triton_scan` on factors by name."""
    from hooked_recurrent.scan.kernels.scan import triton_scan

    def scan(**roles: Tensor) -> tuple[Tensor, Tensor | None]:
        result = triton_scan(Factors(**roles), problem.state)
        return result.read, result.state

    return scan


def our_steps(problem: Problem) -> dict[str, Callable[..., Any]]:
    """The decode step with a new state, and over a state of its own."""
    own = problem.state.clone()
    return {
        "ours": lambda **roles: triton_step(Factors(**roles), problem.state),
        "ours, in place": lambda **roles: triton_step(Factors(**roles), own, in_place=True),
    }


def versions(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on and with."""
    smi = shutil.which("nvidia-smi")
    driver = "unknown"
    if smi:
        asked = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True).stdout.strip() or driver
    properties = torch.cuda.get_device_properties(device)
    packages = {}
    for name in ("fla-core", "flash-linear-attention", "mamba_ssm"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    return {
        **machine(),
        "device": torch.cuda.get_device_name(device),
        "memory_gigabytes": round(properties.total_memory / 2**30, 1),
        "processors": properties.multi_processor_count,
        "driver": driver,
        "cuda": torch.version.cuda or "none",
        "hip": torch.version.hip or "none",
        "triton": triton.__version__,
        **packages,
    }


def show_checks(checks: list[Check], console: Console) -> None:
    """Every check that failed, and how many passed with what margin."""
    for check in checks:
        if not check.passed:
            words = f"{check.case}: {check.what} is off by {check.error:.2e}, allowed {check.bound:.0e}"
            console.print(words, style="red", markup=False, highlight=False)
    passed = [check.error / check.bound for check in checks if check.passed]
    console.print(
        f"{len(passed)} of {len(checks)} checks passed; the worst of them took {max(passed, default=0):.0%} of its bound"
    )


def show_timings(found: list[Timing], console: Console) -> None:
    """The table."""
    table = Table("layer", "what", "batch x length", "side", "ms (fifths)", "of ours", "MB", "difference")
    ours: dict[tuple, float] = {}
    for one in found:
        place = (one.layer, one.what, one.batch, one.length)
        ours.setdefault(place, one.milliseconds)
        name = f"{one.batch} x {one.length}"
        if one.note:
            table.add_row(one.layer, one.what, name, one.side, one.note, style="dim")
            continue
        time = f"{one.milliseconds:.4f} ({one.fast_fifth:.4f} to {one.slow_fifth:.4f})"
        ratio, memory = f"{one.milliseconds / ours[place]:.2f}x", f"{one.peak_megabytes:,.0f}"
        wrong = not one.difference <= ALIKE
        cells = [one.layer, one.what, name, one.side, time, ratio, memory, f"{one.difference:.1e}"]
        table.add_row(*cells, style="red" if wrong else None)
    console.print(table)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--checks", action="store_true", help="only the comparisons with the reference")
    only.add_argument("--timings", action="store_true", help="only the timings")
    names = "; ".join(f"{number}: {shape.model}" for number, shape in enumerate(SHAPES))
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 3, 5], choices=range(len(SHAPES)), help=names)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192], help="positions of a scan")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES), help="of the timed inputs")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    return parser.parse_args()


def main() -> int:
    """Refuse, or check and time."""
    given = parsed()
    if not torch.cuda.is_available():
        print(NO_GPU)
        return 2
    device, console = torch.device("cuda", torch.cuda.current_device()), Console()
    where, checks, found = versions(device), [], []
    console.print(", ".join(f"{name} {value}" for name, value in where.items()), style="dim")
    if not given.timings:
        checks = list(all_checks(device, "hip" if torch.version.hip else "cuda"))
        show_checks(checks, console)
    if not given.checks:
        work = [(what, length) for what in ("forward", "forward and backward") for length in given.lengths]
        work += [("step", 1), ("step, CUDA graph", 1)]
        for number in given.layers:
            for what, length in work:
                found += timings(SHAPES[number], what, given.batch, length, DTYPES[given.dtype], device)
        show_timings(found, console)
    if given.json:
        record = {"where": where, "checks": [asdict(one) for one in checks], "timings": [asdict(one) for one in found]}
        given.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(not all(check.passed for check in checks))


if __name__ == "__main__":
    raise SystemExit(main())
