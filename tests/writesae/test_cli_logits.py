"""`writesae logits` as a user meets it."""

import json

import pytest
from typer.testing import CliRunner

from writesae import WriteSAE, WriteSAEConfig
from writesae.cli import app
from writesae.cli.logits import parse_cell
from writesae.evaluation.predicting.logit_shift_result import LogitShiftResult

RUNNER = CliRunner()


@pytest.fixture
def folder(tmp_path):
    """An untrained dictionary of a bundled model's cell, and some texts."""
    sae = WriteSAE(WriteSAEConfig(d_k=32, d_v=32, n_atoms=16, k=2))
    sae.provenance = {"model": "tiny-gated-deltanet", "layer": 2, "head": 1}
    sae.save(tmp_path / "sae")
    (tmp_path / "text").mkdir()
    for name in range(60):  # a few of them are held out
        words = " ".join(f"a{name}{n} = {n} + b{name}" for n in range(40))
        (tmp_path / "text" / f"{name}.txt").write_text(words)
    return tmp_path


def run(*words):
    return RUNNER.invoke(app, [str(word) for word in words])


def test_logits_measures_the_cells_it_is_told(folder):
    small = ["--firings", 3, "--passages", 4, "--length", 32, "--text", folder / "text", "--horizon", 0, "--horizon", 2]
    out = folder / "logits.json"
    result = run("logits", "--sae", folder / "sae", "--cell", "2.1", "--cell", "0.3", *small, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    wanted = {"size": "0.01", "predictor": "first_order", "tokens": "top", "source": "all"}
    best = [row for row in summary if wanted.items() <= row.items()]
    assert len(best) == 1 and best[0]["r2"] > 0.99
    kept = LogitShiftResult.from_json(out)
    assert set(zip(kept.table["layer"], kept.table["head"], strict=True)) == {(2, 1), (0, 3)}
    assert set(kept.table["horizon"]) == {0, 2} and kept.about["model"] == "tiny-gated-deltanet"


def test_a_cell_is_two_numbers(folder):
    assert parse_cell("2:1") == parse_cell("2.1") == (2, 1)
    for word in ("2", "2.1.0", "a.b", "-1.2"):
        with pytest.raises(ValueError, match="LAYER:HEAD"):
            parse_cell(word)
    result = run("logits", "--sae", folder / "sae", "--cell", "21", "--text", folder / "text", "--length", 32)
    assert result.exit_code == 2 and "LAYER:HEAD" in result.output
