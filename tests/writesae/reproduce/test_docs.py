"""docs/results.md is what the runs in results/ make it: no figure there was typed."""

from pathlib import Path

from writesae.reproduce.page import page, runs_in

ROOT = Path(__file__).resolve().parents[3]


def test_the_page_is_made_of_the_runs_in_results():
    assert page(ROOT / "results") == (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_there_is_a_full_run_of_every_bundled_architecture():
    runs = runs_in(ROOT / "results")
    assert {run.rule for run in runs} == {"gated_delta_net", "mamba2", "rwkv7"}
    assert not any(run.about["config"]["quick"] for run in runs)
    for run in runs:
        assert {"replacement", "heads", "logits", "erase", "sign_test", "install", "objectives"} <= set(run.summaries)
