"""The script behind docs/recovery.md runs, saves as it goes, and the page holds the table that it wrote."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from writesae.evaluation.recovering.recovery import VARIANTS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("recovery_benchmark", ROOT / "benchmarks" / "recovery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_runs_every_planting_and_saves(script, tmp_path, monkeypatch, capsys):
    json_path, page = tmp_path / "recovery.json", tmp_path / "table.md"
    options = ["--quick", "--variant", "bilinear", "--variant", "flat", "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", ["recovery.py", *options, "--json", str(json_path), "--markdown", str(page)])
    script.main()
    written = json.loads(json_path.read_text())
    assert set(written) == {"machine", "threshold", "config", "summary", "records"}
    assert list(written["config"]) == list(script.PLANTINGS)
    assert len(written["records"]) == 3 * len(script.PLANTINGS)  # bilinear; flat as learned and by svd
    assert page.read_text().count("\n") == 2 + len(written["summary"])
    assert "torch" in capsys.readouterr().out
    # A second run adds what is missing and trains nothing again.
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--variant", "rank1"])
    script.main()
    again = json.loads(json_path.read_text())
    assert again["records"][: len(written["records"])] == written["records"]
    assert {row["variant"] for row in again["records"][len(written["records"]) :]} == {"rank1"}


def test_the_first_planting_is_what_was_promised_for_all_variants(script):
    planted, k, variants = next(iter(script.PLANTINGS.values()))
    assert (planted.n_atoms, planted.d_k, planted.d_v, planted.k, planted.noise, k) == (512, 64, 64, 8, 0.01, 8)
    assert planted.kind == "writes" and planted.overlap == 0 and set(variants) == set(VARIANTS)


def test_the_page_holds_the_measured_table(script):
    from writesae.evaluation.recovering.recovery_result import RecoveryResult

    written = json.loads((ROOT / "benchmarks" / "results" / "recovery.json").read_text())
    import pandas as pd

    table = RecoveryResult(pd.DataFrame(written["records"]), written["threshold"]).to_markdown()
    assert table.strip() in (ROOT / "docs" / "recovery.md").read_text()
    promised = [row for row in written["summary"] if row["variant"] == "bilinear"][0]
    assert promised["recovered"] >= 0.95
