"""Compile a kernel variant for a GPU that is not there, and read what the compilers say it needs.

Registers, spills and shared memory come from the compiled objects: `cuobjdump -res-usage` for NVIDIA (and `ptxas -v` where a
kernel has a stack, because only that names the spills), the metadata at the end of the assembly for AMD.

Occupancy is an estimate, the same way for both vendors: blocks * w of the warp slots, where w is the number of warps of a block
and the blocks that fit a processor are the least of what these allow:

    registers      NVIDIA: a warp takes 32 * registers, rounded up to 256, of 65,536; the warps that fit, rounded down to a
                   multiple of 4 (there are four schedulers), divided by w.
                   AMD: a wave takes its vector registers, rounded up to 8, of the 512 that a lane has in each of 4 SIMDs; at
                   most 8 waves on a SIMD; 4 times the waves that fit, divided by w.
    shared memory  what the processor has, divided by what a block takes (NVIDIA: and 1 KB more, kept for the system).
    threads        warp slots divided by w, and a largest number of blocks.

Limits (CUDA C++ programming guide, table of compute capabilities; AMD CDNA 3
instruction set and LLVM's AMDGPU usage guide):

                             sm_80     sm_90     gfx942
    registers                65,536    65,536    4 SIMDs x 512 for each lane
    warp or wave slots       64        64        32
    blocks                   32        32        16
    shared memory, all       164 KB    228 KB    64 KB
    shared memory, a block   163 KB    227 KB    64 KB
"""

import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hooked_recurrent.scan.kernels.variants import Variant

KB = 1024
CLEAN_WIDTHS = (64, 128)
"""Widths of published models: a spill there is a fault; at other widths it is only reported."""


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, and what one of its processors has."""

    backend: str
    arch: int | str
    warp_size: int
    slots: int
    blocks: int
    shared: int
    shared_per_block: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, slots=64, blocks=32, shared=164 * KB, shared_per_block=163 * KB),
    "sm_90": Target("cuda", 90, 32, slots=64, blocks=32, shared=228 * KB, shared_per_block=227 * KB),
    "gfx942": Target("hip", "gfx942", 64, slots=32, blocks=16, shared=64 * KB, shared_per_block=64 * KB),
}


@dataclass(frozen=True)
class Record:
    """What one variant needs on one target."""

    variant: str
    kernel: str
    rule: str
    d_k: int
    d_v: int
    dtype: str
    target: str
    warps: int
    stages: int
    registers: int = 0
    spill_bytes: int = 0
    """Per thread; on NVIDIA the bytes of stores and loads added, on AMD four for each register."""
    shared_bytes: int = 0
    active_warps: int = 0
    warp_slots: int = 0
    limited_by: str = ""
    seconds: float = 0.0
    error: str = ""


def faults(record: Record) -> list[str]:
    """Why this record is not acceptable; empty when it is."""
    found = []
    limit = TARGETS[record.target].shared_per_block
    if record.error:
        found.append(f"does not compile: {record.error}")
    if record.spill_bytes and record.d_k in CLEAN_WIDTHS and record.d_v in CLEAN_WIDTHS:
        found.append(f"spills {record.spill_bytes} bytes")
    if record.shared_bytes > limit:
        found.append(f"needs {record.shared_bytes} bytes of shared memory, {record.target} has {limit} for a block")
    return found


def occupancy(target: Target, warps: int, registers: int, shared: int) -> tuple[int, str]:
    """Warps (waves) that a processor holds at once, and what limits them; the module's docstring has the formula."""
    if target.backend == "cuda":
        by_registers = 65536 // _up(32 * registers, 256) // 4 * 4 if registers else target.slots
        kept = KB
    else:
        by_registers = 4 * min(8, 512 // _up(registers, 8)) if registers else target.slots
        kept = 0
    blocks = {
        "threads": min(target.slots // warps, target.blocks),
        "registers": by_registers // warps,
        "shared memory": target.shared // (shared + kept) if shared else target.blocks,
    }
    least = min(blocks, key=lambda name: blocks[name])
    return blocks[least] * warps, least


def _up(number: int, unit: int) -> int:
    """The next multiple of a unit."""
    return -(-number // unit) * unit


def compile_variant(variant: Variant, target_name: str) -> Record:
    """Compile and measure; a failure becomes the record's error, so that the others still run."""
    case, start = variant.case, time.perf_counter()
    about = dict(variant=variant.name, kernel=variant.kernel.__name__, rule=case.rule, d_k=case.d_k, d_v=case.d_v)
    about |= dict(dtype=case.dtype, target=target_name, warps=variant.num_warps, stages=variant.num_stages)
    target = TARGETS[target_name]
    try:
        compiled = _compiled(variant, target)
        read = _read_nvidia if target.backend == "cuda" else _read_amd
        registers, spills = read(compiled)
    except Exception as error:  # every compiler of the chain has errors of its own
        return Record(**about, error=_in_short(error))
    shared = compiled.metadata.shared
    active, limit = occupancy(target, compiled.metadata.num_warps, registers, shared)
    return Record(
        **about,
        registers=registers,
        spill_bytes=spills,
        shared_bytes=shared,
        active_warps=active,
        warp_slots=target.slots,
        limited_by=limit,
        seconds=round(time.perf_counter() - start, 2),
    )


def _in_short(error: BaseException) -> str:
    """The end of what the innermost error says: compilers quote the source first."""
    while error.__cause__ is not None:
        error = error.__cause__
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words if len(words) <= 300 else '...' + words[-300:]}"


def _compiled(variant: Variant, target: Target) -> Any:
    """The compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget

    source = triton.compiler.ASTSource(
        fn=variant.kernel, signature=variant.signature, constexprs=variant.constexprs, attrs=variant.attributes
    )
    where = GPUTarget(target.backend, target.arch, target.warp_size)
    return triton.compile(source, target=where, options=variant.options)


def _read_nvidia(compiled: Any) -> tuple[int, int]:
    """Registers per thread and spilled bytes (stores and loads) per thread."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin))
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump names no registers: {usage}")
        registers, stack, local = map(int, found.groups())
        if not stack + local:
            return registers, 0
        ptx.write_text(compiled.asm["ptx"])
        arch = re.search(r"\.target (sm_\d+a?)", compiled.asm["ptx"]).group(1)  # type: ignore[union-attr]
        options = ("-v", "--regAllocOptLevel=2", f"--gpu-name={arch}", "-o", str(Path(folder, "again")))
        log = _output(knobs.nvidia.ptxas.path, str(ptx), *options)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    return registers, sum(map(int, spills))


def _output(*command: str) -> str:
    """What a program prints on both of its outputs; raises when it fails."""
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def _read_amd(compiled: Any) -> tuple[int, int]:
    """Vector registers per lane and bytes per lane of those that were spilled."""
    metadata = compiled.asm["amdgcn"].split(".amdgpu_metadata", 1)[1]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", metadata).group(1))  # type: ignore[union-attr]

    return number("vgpr_count"), 4 * number("vgpr_spill_count")
