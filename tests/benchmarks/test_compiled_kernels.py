"""The command that compiles every kernel: that its table is sane, and that what it must refuse makes it fail."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.compilation import TARGETS, Record, faults, occupancy

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
SCRIPT = str(BENCHMARKS / "compiled_kernels.py")
GOOD = Record("v", "k", "gated delta", 64, 64, "float32", "sm_80", 4, 1, registers=128, shared_bytes=163 * 1024)


SPILLING = """
from support.compilation import TARGETS, compile_variant
from compiled_kernels import variants
for variant in variants([128], ["float32"], ["rwkv7"]):
    if variant.name == "step, many rows":
        starved = {"maxnreg": 32} if variant.case.backend == "cuda" else {"waves_per_eu": 8}
        type(variant).options = property(lambda _, options={"num_warps": 1, "num_stages": 1} | starved: options)
        for name, target in TARGETS.items():
            if target.backend == variant.case.backend:
                print(name, compile_variant(variant, name).spill_bytes)
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    """Python in a process of its own, where nothing is interpreted and the benchmarks find each other."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(BENCHMARKS)])
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT)


def test_small_kernels_compile_for_both_vendors(tmp_path):
    table, page = tmp_path / "table.json", tmp_path / "page.md"
    case = ["--kernel", "step", "short_conv", "--widths", "16", "--rules", "mamba2", "rwkv7", "--dtypes", "bfloat16"]
    done = run(
        SCRIPT, *case, "--target", "sm_80", "gfx942", "--jobs", "1", "--json", str(table), "--markdown", str(page)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [Record(**one) for one in json.loads(table.read_text())["kernels"]]
    assert {record.target for record in records} == {"sm_80", "gfx942"}
    assert {record.rule for record in records} == {"mamba2", "rwkv7"}
    for record in records:
        assert 5 <= record.registers <= 255
        assert record.spill_bytes == 0 and record.error == ""
        assert 0 <= record.shared_bytes < 4096
        assert 0 < record.active_warps <= record.warp_slots == TARGETS[record.target].slots
        assert record.limited_by in ("threads", "registers", "shared memory")
    assert {record.kernel for record in records} == {"step_kernel", "short_conv_kernel"}
    assert "step_kernel" in done.stdout and "gfx942" in done.stdout
    text = page.read_text()
    assert f"{len(records)} configurations compiled, 0\n" in text
    some = [r for r in records if (r.kernel, r.target) == ("step_kernel", "sm_80")]
    registers = f"{min(r.registers for r in some)} to {max(r.registers for r in some)}"
    assert f"| step | 16 | bfloat16 | sm_80 | {len(some)} | {registers} | 0 |" in text


def test_spills_of_a_starved_kernel_are_read():
    """One warp for a tile of four and few registers: every target's compiler must spill, and say so."""
    done = run("-c", SPILLING)
    assert done.returncode == 0, done.stderr
    spilled = dict(line.split() for line in done.stdout.splitlines())
    assert set(spilled) == set(TARGETS)
    assert all(int(bytes_) > 0 and int(bytes_) % 4 == 0 for bytes_ in spilled.values()), spilled


def test_a_name_that_no_kernel_has_fails():
    done = run(SCRIPT, "--kernel", "no such kernel", "--widths", "16", "--rules", "mamba2", "--jobs", "1")
    assert done.returncode == 1
    assert "no kernel has such a name" in done.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"spill_bytes": 8}, ["spills 8 bytes"]),
        ({"spill_bytes": 8, "d_k": 80, "d_v": 80}, []),
        ({"shared_bytes": 163 * 1024 + 1}, ["of shared memory, sm_80 has 166912"]),
        ({"shared_bytes": 200 * 1024, "target": "sm_90"}, []),
        ({"shared_bytes": 65 * 1024, "target": "gfx942", "d_k": 80}, ["gfx942 has 65536"]),
        ({"error": "PTXASError", "spill_bytes": 4}, ["does not compile: PTXASError", "spills 4 bytes"]),
    ],
)
def test_what_is_refused(change, words):
    found = faults(replace(GOOD, **change))
    assert len(found) == len(words)
    assert all(word in fault for word, fault in zip(words, found, strict=True))


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "expected"),
    [
        ("sm_80", 4, 32, 0, (64, "threads")),
        ("sm_80", 4, 128, 0, (16, "registers")),  # 65536 / (32 * 128) warps
        ("sm_80", 8, 255, 0, (8, "registers")),
        ("sm_80", 4, 168, 0, (12, "registers")),  # the occupancy calculator's example of the register granularity
        ("sm_80", 4, 32, 81 * 1024, (8, "shared memory")),  # 82 KB with what the system keeps: two of them are all
        ("sm_80", 4, 32, 82 * 1024, (4, "shared memory")),
        ("sm_90", 1, 32, 0, (32, "threads")),  # at most 32 blocks
        ("gfx942", 4, 64, 0, (32, "threads")),
        ("gfx942", 4, 128, 0, (16, "registers")),
        ("gfx942", 4, 129, 0, (12, "registers")),  # 136 of 512: three waves on each SIMD
        ("gfx942", 8, 512, 0, (0, "registers")),  # does not fit at all
        ("gfx942", 4, 64, 33 * 1024, (4, "shared memory")),
    ],
)
def test_occupancy(target, warps, registers, shared, expected):
    assert occupancy(TARGETS[target], warps, registers, shared) == expected
