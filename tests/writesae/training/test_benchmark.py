"""The benchmark of a training step runs, and its dense side is the reference formulation."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from writesae import WriteSAE, WriteSAEConfig

PATH = Path(__file__).resolve().parents[3] / "benchmarks" / "sae_step.py"


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("sae_step", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in {"N_ATOMS": 40, "K": 4, "BATCH": 16, "WARMUPS": 1}.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_it_times_both_sides_and_writes_json(benchmark, tmp_path, monkeypatch, capsys):
    path = tmp_path / "steps.json"
    monkeypatch.setattr("sys.argv", ["sae_step.py", "--widths", "6", "8", "--repeats", "2", "--json", str(path)])
    benchmark.main()
    written = json.loads(path.read_text())
    assert [row["d"] for row in written["steps"]] == [6, 8]
    for row in written["steps"]:
        assert row["dense"] > 0 and row["ratio"] == pytest.approx(row["dense"] / row["factored"])
    assert written["machine"]["torch"] == torch.__version__ and "median of 2" in capsys.readouterr().out.replace(
        "\n", " "
    )


def test_the_dense_side_equals_our_reference(benchmark):
    sae = WriteSAE(WriteSAEConfig(d_k=6, d_v=5, n_atoms=20, k=3)).double()
    dense = benchmark.DenseBilinearSAE(sae)
    x = torch.randn(7, 6, 5).double()
    ours, theirs = sae.dense_loss(x).loss, dense.loss(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(sae.key_atoms.grad, dense.key_atoms.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sae.encoder.key_factors.grad, dense.key_encoder.grad, rtol=1e-10, atol=1e-12)


def test_sides_that_disagree_are_not_timed(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark.DenseBilinearSAE, "loss", lambda self, x: x.square().sum())
    with pytest.raises(RuntimeError, match="do not compute the same loss"):
        benchmark.steps_at(6)
