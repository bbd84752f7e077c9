"""Compile every kernel for GPUs that are not there, and show what each needs: registers, spills, shared memory, occupancy.

    python benchmarks/compiled_kernels.py [--kernel NAME ...] [--target sm_80 sm_90 gfx942] [--widths 64 128 80]
                                          [--rules ...] [--dtypes float32 bfloat16] [--jobs N] [--json PATH]
                                          [--markdown PATH]

Nothing runs, so no GPU is needed; the numbers are the compilers' own, except the occupancy, which is computed from them
(`support/compilation.py` has the formula and the limits). The exit status is 1 when a kernel spills registers at d_k = d_v = 64
or 128, needs more shared memory than a block may have, or does not compile; at other widths spills are only shown.
Every kernel takes about a second for each target, the first time; Triton keeps what it has compiled.
"""

import os

# Both are read as triton is imported. An interpreted kernel cannot be compiled; the other names today's default, which is to
# change. (This file may not be called kernels.py: transformers would import it in the place of the package of that name.)
if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import argparse
import importlib
import json
import multiprocessing
import pkgutil
import platform
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from support.compilation import TARGETS, Record, compile_variant, faults

from hooked_recurrent.scan.kernels.variants import BACKENDS, DTYPES, RULES, Case, Variant, registered

PACKAGES = ("hooked_recurrent.scan.kernels", "hooked_recurrent.layers", "writesae.sae.kernels")
"""Where kernels are: their modules register variants as they are imported."""
WIDTHS = (64, 128, 80)
_VARIANTS: list[Variant] = []


def variants(widths: Iterable[int], dtypes: Iterable[str], rules: Iterable[str]) -> list[Variant]:
    """Every variant of every module for these cases, in an order that every process agrees on."""
    for package in PACKAGES:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
            importlib.import_module(module.name)
    widths, dtypes, rules = list(widths), list(dtypes), list(rules)
    return registered(
        Case(rule, width, width, dtype, backend)
        for backend in BACKENDS
        for width in widths
        for rule in rules
        for dtype in dtypes
    )


def _prepare(*chosen: list) -> None:
    """Give a worker the list that its tasks are indices of: kernels themselves do not travel between processes."""
    torch.set_num_threads(1)
    _VARIANTS.extend(variants(*chosen))


def _compile(index: int, target: str) -> Record:
    return compile_variant(_VARIANTS[index], target)


def compile_all(chosen: tuple[list, ...], kernels: list[str], targets: list[str], jobs: int) -> Iterator[Record]:
    """The records of all variants whose kernel or name contains one of `kernels`, on every target, as they are compiled."""
    tasks = [
        (index, target)
        for index, variant in enumerate(variants(*chosen))
        if not kernels or any(word in f"{variant.name} {variant.kernel.__name__}" for word in kernels)
        for target in targets
        if TARGETS[target].backend == variant.case.backend
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_prepare, initargs=chosen) as pool:
        if tasks:
            results = pool.map(_compile, *zip(*tasks, strict=True))
            console = Console(stderr=True)
            yield from track(results, "compiling", total=len(tasks), console=console, disable=not console.is_terminal)


def show(records: list[Record]) -> None:
    """The table, what is wrong below it."""
    title = "What every compiled kernel needs (computed by the compilers; nothing was run)"
    names = (
        "kernel",
        "variant",
        "case",
        "target",
        "warps",
        "registers",
        "spills",
        "shared",
        "active warps",
        "limited by",
    )
    table = Table(*names, title=title)
    for column in (4, 5, 6, 7, 8):
        table.columns[column].justify = "right"
    for record in records:
        width = f"{record.d_k}" if record.d_k == record.d_v else f"{record.d_k}x{record.d_v}"
        case = f"{record.rule}, {width}, {record.dtype}"
        wrong = "red" if faults(record) else "yellow" if record.spill_bytes else None
        numbers = [str(record.registers), f"{record.spill_bytes} B", f"{record.shared_bytes / 1024:.1f} KB"]
        active = f"{record.active_warps} / {record.warp_slots}"
        cells = [record.kernel, record.variant, case, record.target, str(record.warps), *numbers, active]
        table.add_row(*cells, record.limited_by, style=wrong)
    console = Console(width=None if Console().is_terminal else 180)
    console.print(table)
    for record in records:
        for fault in faults(record):
            where = (
                f"{record.kernel} ({record.variant}; {record.rule}, {record.d_k}, {record.dtype}) on {record.target}"
            )
            console.print(f"{where} {fault}", style="red", markup=False, highlight=False)


def summary(records: list[Record], made_by: dict[str, str]) -> str:
    """A page with one row per kernel, width, dtype and target: ranges over rules and variants."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault((record.kernel, record.d_k, record.dtype, record.target), []).append(record)
    wrong = sum(bool(faults(record)) for record in records)
    versions = ", ".join(f"{name} {version}" for name, version in made_by.items())
    lines = [
        "# What every compiled kernel needs",
        "",
        "Made by `python benchmarks/compiled_kernels.py`; nothing was run. "
        f"{len(records)} configurations compiled, {wrong}",
        "of them with a fault (a spill at widths 64 and 128, too much shared memory, no compilation). The occupancy is",
        f"computed; the rest is what the compilers say ({versions}). Ranges are over",
        "the rules and variants of a kernel.",
        "",
        "| kernel | d_k = d_v | dtype | target | configurations | registers | spills, bytes | shared, KB | active warps |",
        "| --- | --: | --- | --- | --: | --: | --: | --: | --: |",
    ]
    for (kernel, width, dtype, target), some in groups.items():
        registers = f"{min(r.registers for r in some)} to {max(r.registers for r in some)}"
        warps = f"{min(r.active_warps for r in some)} to {max(r.active_warps for r in some)} of {some[0].warp_slots}"
        spills, shared = max(r.spill_bytes for r in some), max(r.shared_bytes for r in some) / 1024
        name = kernel.removesuffix("_kernel").replace("_", " ")
        cells = (name, width, dtype, target, len(some), registers, spills, f"{shared:.0f}", warps)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", nargs="+", default=[], help="only kernels whose name contains one of these")
    parser.add_argument("--target", nargs="+", default=list(TARGETS), choices=list(TARGETS), help="GPUs to compile for")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS), help="values of d_k = d_v")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; one per core by default")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--markdown", type=Path, help="also write a page that sums it up")
    return parser.parse_args()


def main() -> int:
    """Compile, show, judge."""
    given = parsed()
    chosen = (given.widths, given.dtypes, given.rules)
    records = list(compile_all(chosen, given.kernel, given.target, given.jobs))
    if not records:
        print("no kernel has such a name")
        return 1
    show(records)
    made_by = {"triton": triton.__version__, "torch": torch.__version__, "python": platform.python_version()}
    if given.markdown:
        given.markdown.write_text(summary(records, made_by), encoding="utf-8")
    if given.json:
        text = json.dumps({"compilers": made_by, "kernels": [asdict(record) for record in records]}, indent=1)
        given.json.write_text(text + "\n", encoding="utf-8")
    return int(any(faults(record) for record in records))


if __name__ == "__main__":
    raise SystemExit(main())
