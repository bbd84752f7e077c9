"""Every CPU benchmark runs from end to end on tiny shapes, checks its sides against each other, and writes what it measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
RATIOS = {"theirs / ours", "best of theirs / ours", "largest error"}
SCAN_COLUMNS = {
    "gdn": {"T", "ours", "ours, edited", "transformers", "edited / ours"} | RATIOS,
    "mamba2": {"T", "ours", "ours, edited", "transformers, chunk 256", "transformers, chunk 64"} | RATIOS,
    "rwkv7": {"T", "ours", "rwkv7-hf", "fla, by token", "fla, chunks"} | RATIOS,
    "backward": {"rule", "ours", "ours, edited", "theirs", "best of theirs"} | RATIOS,
    "linear": {"rule", "T", "ours", "seconds per token", "time / time of half the length"},
    "memory": {"rule", "T", "side", "peak, MB", "states of all heads, MB", "peak / states of all heads"},
    "state": {"asked", "seconds", "time / ours, all heads", "peak, MB", "error"},
}
FORWARD_COLUMNS = {
    "gdn-layer": {"measured", "T", "ours", "transformers"} | RATIOS,
    "mamba2": {"measured", "T", "ours", "transformers, chunk 256"} | RATIOS,
    "rwkv7": {"measured", "T", "ours", "rwkv"} | RATIOS,
    "decode-rwkv7": {"ours, ms", "rwkv, ms"} | RATIOS,
    "decode-qwen": {"ours, ms", "transformers, ms"} | RATIOS,
    "training": {"model", "ours, tokens/s", "theirs, tokens/s", "best of theirs, tokens/s"} | RATIOS,
}
VERSIONS = {"processor", "cores", "threads", "python", "torch", "transformers", "rwkv", "rwkv7-hf", "fla-core"}
VERSIONS |= {"transformer-lens", "allocator"}


def run(script, *options):
    """The script in a process of its own, on one thread and under glibc's default allocator."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / script), *map(str, options)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def measured(script, path, *options):
    """What a quick run writes as JSON, under its allocator setting."""
    done = run(script, "--quick", "--repeats", 1, "--threads", 1, "--json", path, *options)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize(("script", "columns"), [("scan.py", SCAN_COLUMNS), ("forward.py", FORWARD_COLUMNS)])
def test_every_part_runs_and_is_written(script, columns, tmp_path):
    found = measured(script, tmp_path / "found.json")
    assert list(found) == ["default"]
    assert set(found["default"]) == {"machine", "settings", "parts"}
    assert VERSIONS <= set(found["default"]["machine"])
    parts = found["default"]["parts"]
    assert {name: set() for name in columns} == {
        name: columns[name] - set().union(*part["rows"]) for name, part in parts.items()
    }
    for part in parts.values():
        assert part["title"] and part["rows"]
        for row in part["rows"]:
            assert all(value >= 0 for value in row.values() if isinstance(value, int | float))
            assert row.get("largest error", row.get("error", 0)) < 1e-4


def test_a_case_of_memory_runs_in_its_own_process():
    done = run("scan.py", "--memory-of", "mamba2: ours: 2048")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    read = 4 * 2048 * 32 * 64
    assert read < told["increase"] < 100 * read and told["before"] > 0


def test_the_whole_workflow(tmp_path):
    found = measured("real_size.py", tmp_path / "found.json", "--folder", tmp_path / "model")["default"]
    assert set(found) == {"machine", "settings", "checkpoint", "transformers", "stages", "errors", "plan"}
    stages = [row["stage"] for row in found["stages"]]
    assert stages == ["load", "forward", "cache", "trunk", "edits", "stream", "SAE steps"]
    peaks = [row["peak, MB"] for row in found["stages"]]
    assert peaks == sorted(peaks) and peaks[-1] < 12 * 2**30
    assert len(found["errors"]) == 2 and max(found["errors"].values()) < 1e-4
    sizes = {row["model"]: row["parameters"] / 1e9 for row in found["plan"]}
    assert sizes == pytest.approx({"Qwen3.5-0.8B": 0.75, "Qwen3.5-4B": 4.2, "Qwen3.5-27B": 26.9}, rel=0.01)
    assert [file.name for file in (tmp_path / "model").glob("*.safetensors")] == ["model.safetensors"]
