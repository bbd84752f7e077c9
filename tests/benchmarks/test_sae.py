"""The benchmark of dictionary training: all parts run, all sides compute one thing, and what is missing is said."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.support import sae_sides
from writesae import WriteSAE, WriteSAEConfig

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "sae.py"
COLUMNS = {
    "writes": {"d_k = d_v", "ours", "dense bilinear", "dense bilinear / ours", "largest error"},
    "growth": {"side", "d_k = d_v", "a step", "time / time at half the width"},
    "states": {"T", "ours, ms", "dense bilinear, ms", "dense bilinear / ours", "peak of ours, MB", "largest error"},
    "memory": {"side", "d_k = d_v", "peak, MB", "peak / ours"},
}


@pytest.fixture
def benchmark():
    spec = importlib.util.spec_from_file_location("sae_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_part_runs_and_is_written(benchmark, tmp_path, monkeypatch, capsys):
    path = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["sae.py", "--quick", "--repeats", "1", "--json", str(path)])
    benchmark.run_parts(PATH, benchmark.__doc__, benchmark.PARTS, benchmark.MEMORY)
    (found,) = json.loads(path.read_text()).values()
    assert {"torch", "sae-lens", "allocator"} <= set(found["machine"])
    parts = found["parts"]
    assert list(parts) == list(COLUMNS)
    for name, part in parts.items():
        assert COLUMNS[name] <= set().union(*part["rows"])
        if name == "states":  # SAELens's side would be the same as on writes
            continue
        installed = "SAELens is left out" not in part["note"]
        assert installed == sae_sides.has_sae_lens() == any("SAELens TopK" in str(row) for row in part["rows"])
    for row in parts["writes"]["rows"]:
        assert row["dense bilinear / ours"] == pytest.approx(row["dense bilinear"] / row["ours"])
    for row in parts["states"]["rows"]:
        assert row["dense bilinear / ours"] == pytest.approx(row["dense bilinear, ms"] / row["ours, ms"])
        assert row["ours, ms"] == pytest.approx(row["a step of ours"] / row["T"])
    for row in parts["writes"]["rows"] + parts["states"]["rows"]:
        assert row["largest error"] < 1e-4
    assert "left out" in capsys.readouterr().out or sae_sides.has_sae_lens()


def test_growth_is_the_time_over_that_at_the_width_before(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "median_seconds", lambda steps, *_, **__: {n: float(n) ** 2 for n in steps})
    options = benchmark.Options(PATH, repeats=1, quick=True)
    rows = [row for row in benchmark.growth(options).rows if row["side"] == "ours"]
    assert [row["time / time at half the width"] for row in rows] == [None, 4.0]


def test_the_dense_side_equals_our_reference():
    sae = WriteSAE(WriteSAEConfig(d_k=6, d_v=5, n_atoms=20, k=3)).double()
    dense = sae_sides.DenseBilinearSAE(sae)
    x = torch.randn(7, 6, 5).double()
    ours, theirs = sae.dense_loss(x).loss, dense.loss(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(sae.key_atoms.grad, dense.key_atoms.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sae.encoder.key_factors.grad, dense.key_encoder.grad, rtol=1e-10, atol=1e-12)


def test_a_step_of_every_side_trains(benchmark):
    steps, _ = benchmark.steps_at(12, quick=True)
    assert list(steps) == [benchmark.OURS, *benchmark.THEIRS]
    sae, batch = sae_sides.dictionary(12, 40, 4), sae_sides.writes(12, 16)
    step, before = sae_sides.dense_step(sae, batch.matrices())
    for _ in range(50):
        step()
    assert sae_sides.dense_step(sae, batch.matrices())[1] == before  # the dictionary itself is untouched
    sae.calibrate_(batch)
    step, before = sae_sides.our_step(sae, lambda: batch)
    for _ in range(100):
        step()
    assert float(sae.loss(batch).loss.detach()) < 0.95 * before


def test_sides_that_disagree_are_not_timed(benchmark, monkeypatch):
    monkeypatch.setattr(sae_sides.DenseBilinearSAE, "loss", lambda self, x: x.square().sum())
    monkeypatch.setitem(benchmark.THEIRS, benchmark.DENSE, sae_sides.dense_step)
    with pytest.raises(RuntimeError, match="do not compute the same loss at d = 6: .* \\(dense bilinear\\)"):
        benchmark.steps_at(6, quick=True)


@pytest.mark.sae_lens
def test_sae_lens_computes_the_loss_of_the_same_dictionary():
    sae, batch = sae_sides.dictionary(12, 40, 4), sae_sides.writes(12, 16)
    step, before = sae_sides.sae_lens_step(sae, batch.matrices())
    assert before == pytest.approx(float(sae.loss(batch).loss.detach()), rel=1e-5)
    step()
