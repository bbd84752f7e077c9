"""What a number was measured on, and how: versions, allocator, seconds taken in turn, peak memory of a fresh process."""

import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("transformers", "rwkv", "rwkv7-hf", "fla-core", "transformer-lens", "sae-lens")
"""Whose versions are told, besides torch's: what our numbers are compared with."""
TUNED = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
"""With these glibc keeps large temporaries; by default it returns them to the kernel, and timing measures page faults too."""
BOUND = 1e-4
"""Two sides that differ by more of the largest number do not compute the same."""
MOST_SECONDS, FEWEST_ROUNDS = 240.0, 3
Sides = Mapping[str, Callable[[], object]]


def machine() -> dict[str, str | int]:
    """What the numbers are measured on, with the versions of all that takes part."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: _version(package) for package in PACKAGES},
        "opt_einsum": str(torch.backends.opt_einsum.is_available()),
        "allocator": allocator(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def allocator(environment: Mapping[str, str] = os.environ) -> str:
    """The setting of glibc's allocator in an environment: "default", "tuned", or "other" for any mixture."""
    given = {name: value for name, value in environment.items() if name.startswith("MALLOC_")}
    return "default" if not given else "tuned" if given == TUNED else "other"


def with_allocator(name: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """A copy of the environment under the setting `name`, "default" or "tuned". glibc reads it as a process starts."""
    bare = {key: value for key, value in environment.items() if not key.startswith("MALLOC_")}
    return bare | {"default": {}, "tuned": TUNED}[name]


def in_process(script: Path, options: list[str], environment: Mapping[str, str] = os.environ) -> None:
    """Run a script of ours in a process of its own; its output is ours. Raises `RuntimeError` when it fails."""
    sys.stdout.flush()
    done = subprocess.run([sys.executable, str(script), *options], env=dict(environment), check=False)
    if done.returncode:
        raise RuntimeError(f"{script.name} {' '.join(options)} failed with exit status {done.returncode}")


def seconds_in_turn(sides: Sides, repeats: int, warmups: int = 1) -> dict[str, list[float]]:
    """Seconds of every run of every side: a, b, a, b, ... after the warm-ups, so that a machine that drifts does so for all.

    After `MOST_SECONDS` no further round begins, once there are `FEWEST_ROUNDS`.
    """
    for _ in range(warmups):
        for run in sides.values():
            run()
    taken: dict[str, list[float]] = {name: [] for name in sides}
    began = time.perf_counter()
    for done in range(repeats):
        if done >= FEWEST_ROUNDS and time.perf_counter() - began > MOST_SECONDS:
            break
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    return taken


def median_seconds(sides: Sides, repeats: int, warmups: int = 1) -> dict[str, float]:
    """The median of each side's `seconds_in_turn`."""
    return {name: statistics.median(some) for name, some in seconds_in_turn(sides, repeats, warmups).items()}


def relative_error(made: Tensor, expected: Tensor) -> float:
    """The largest absolute difference, over the largest absolute number expected."""
    if made.shape != expected.shape:
        raise RuntimeError(f"shapes differ: {tuple(made.shape)} and {tuple(expected.shape)}")
    return ((made - expected).abs().max() / expected.abs().max()).item()


def must_equal(what: str, made: Tensor, expected: Tensor, bound: float = BOUND) -> float:
    """Their relative error; `RuntimeError` unless it is below the bound."""
    off = relative_error(made.detach(), expected.detach())
    if not off < bound:
        raise RuntimeError(f"{what}: the two sides do not compute the same, off by {off:.1e} of the largest number")
    return off


def resident_bytes(peak: bool = True) -> int:
    """The most memory that this process ever had resident, or since `forget_peak`; without `peak`, what it has now.

    Linux tells both per address space in /proc. `getrusage`, the way elsewhere, knows only the peak, and on Linux it would
    count what the parent process had when it started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        name = "VmHWM:" if peak else "VmRSS:"
        for line in status.read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def forget_peak() -> bool:
    """Give freed memory back to the kernel and let the peak start from what is resident now; whether that was possible."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_increase(warm_up: Callable[[], object], run: Callable[[], object]) -> dict[str, int]:
    """By how much one run raises this process's memory above what is resident after a small warm-up, in bytes.

    Call it in a fresh process. Where the peak cannot be reset (other systems than Linux) it is the rise of the peak itself.
    """
    warm_up()
    before = resident_bytes(peak=not forget_peak())
    run()
    return {"before": before, "increase": resident_bytes() - before}


def answer_of(script: Path, options: list[str], environment: Mapping[str, str] = os.environ) -> Any:
    """What a script of ours prints as JSON on its last line, run in a process of its own. Raises `RuntimeError` on failure."""
    done = subprocess.run(
        [sys.executable, str(script), *options], env=dict(environment), check=False, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise RuntimeError(f"{script.name} {' '.join(options)} failed: {done.stderr[-2000:]}")
    return json.loads(lines[-1])
