"""The command line as a user meets it: help that teaches, tables, JSON, and one sentence for bad input."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from writesae.cli import app

RUNNER = CliRunner()
SMALL = ["--steps", "40", "--passages", "30", "--length", "64", "--atoms", "32", "--k", "4"]


def run(*words):
    return RUNNER.invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A dictionary that the command line itself trained."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    result = run("train", "--out", folder, "--hook", "blocks.2.mixer.hook_write", "--head", "1", "--json", *SMALL)
    assert result.exit_code == 0, result.output
    return folder / "sae", json.loads(result.stdout)


@pytest.mark.parametrize("verb", ["demo", "train", "replace", "replace-cells", "models", "cache"])
def test_help_names_every_option_in_words(verb):
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output
    assert len(result.output) > 300


def test_models_lists_the_bundled_model_with_its_sizes():
    rows = {row["name"]: row for row in json.loads(run("models", "--json").stdout)}
    row = rows["tiny-gated-deltanet"]
    assert (row["layers"], row["heads"], row["d_k"], row["d_v"]) == (4, 4, 32, 32)
    assert 1_000_000 < row["parameters"] < 4_000_000
    assert "tiny-gated-deltanet" in run("models").stdout


def test_train_saves_a_dictionary_that_replace_tests(trained, tmp_path):
    folder, printed = trained
    assert printed["saved"] == {"sae": str(folder)} and printed["out"] == str(folder.parent)
    assert printed["metrics"]["sae"]["heldout"]["l0"] <= 4 and "loss_recovered" in printed["metrics"]["sae"]["heldout"]
    out = tmp_path / "results.json"
    options = ["--firings", "6", "--passages", "20", "--length", "64", "--horizon", "2", "--out", out, "--json"]
    result = run("replace", "--sae", folder, *options)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert {(row["reading"], row["n"]) for row in summary} == {("in_recurrence", 6), ("cache", 6), ("horizon", 6)}
    assert all(row["floor_max"] < 1e-6 for row in summary)  # float32
    stored = json.loads(out.read_text())
    assert (stored["layer"], stored["head"], len(stored["records"])) == (2, 1, 18)


def test_replace_cells_reads_the_dictionaries_of_a_run(trained, tmp_path):
    options = ["--firings", "4", "--passages", "20", "--length", "64", "--horizon", "2", "--reading", "in_recurrence"]
    out, keep, figure = tmp_path / "cells.json", tmp_path / "keep", tmp_path / "cells.svg"
    saved = ["--out", out, "--keep", keep, "--figure", figure]
    result = run("replace-cells", trained[0].parent, *saved, "--json", *options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {(row["layer"], row["head"], row["n"]) for row in found["cells"]} == {(2, 1, 4)}
    assert {row["reading"] for row in found["summary"]} == {"in_recurrence"}
    assert [path.name for path in keep.iterdir()] == ["l2.h1.json"] and figure.exists()
    stored = json.loads(out.read_text())
    assert stored["about"]["dictionaries"] == {"2.1": str(trained[0])} and stored["about"]["model"]
    shown = run("replace-cells", trained[0].parent, *options)
    assert "over cells" in shown.stdout
    none = run("replace-cells", tmp_path / "keep", *options)
    assert none.exit_code == 2 and "no dictionary lies" in none.stderr


@pytest.fixture
def plan(tmp_path):
    """A file with two heads, on little text."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "text: {passages: 30, length: 64, heldout_passages: 4}\n"
        "training: {steps: 30, lr: 5e-3, save_every: 10, splice_passages: 1}\n"
        "sae: {n_atoms: 32, k: 4}\n"
        "jobs:\n  - {hook: blocks.2.mixer.hook_write, head: [0, 1]}\n"
    )
    return path


def test_a_dry_run_prints_the_resolved_plan(plan, tmp_path):
    result = run("train", "--config", plan, "--dry-run", "--json", "--k", 2, "--log-to", "tensorboard")
    assert result.exit_code == 0, result.output
    resolved = json.loads(result.stdout)
    assert [job["name"] for job in resolved["jobs"]] == ["l2.hook_write.h0", "l2.hook_write.h1"]
    assert [(job["sae"]["n_atoms"], job["sae"]["k"]) for job in resolved["jobs"]] == [(32, 2)] * 2
    assert resolved["training"]["lr"] == 0.005 and resolved["training"]["log_to"] == ["tensorboard"]
    assert yaml.safe_load(run("train", "--dry-run").stdout)["training"]["steps"] == 3000


def test_a_file_a_cache_and_resuming(plan, tmp_path):
    out, cache = tmp_path / "out", tmp_path / "caches" / "one"
    words = ["train", "--config", plan, "--out", out, "--cache", cache]
    result = run(*words)
    assert result.exit_code == 0, result.output
    for path in ("log.jsonl", "checkpoints", "metrics.json", "sae", "config.json"):
        assert str(out / path) in result.stdout.replace("\n", "") and (out / path).exists()
    assert "l2.hook_write.h1" in result.stdout and "loss recovered" in result.stdout
    refused = run(*words)
    assert refused.exit_code == 2 and "holds a training run already" in " ".join(refused.stderr.split())
    assert run(*words, "--resume").exit_code == 0
    (row,) = json.loads(run("cache", "list", tmp_path, "--json").stdout)
    assert (row["path"], row["passages"], row["of"], len(row["sources"])) == (str(cache), 30, 30, 2)
    assert "30 of 30" in run("cache", "list", tmp_path).stdout
    assert "no cache" in run("cache", "list", out).stdout
    again = run("cache", "write", "--config", plan, "--out", cache, "--json")
    assert json.loads(again.stdout)["passages"] == 30
    other = run("cache", "write", "--config", plan, "--out", cache, "--passages", 20)
    assert other.exit_code == 2 and "other tokens" in " ".join(other.stderr.split())


def test_replace_prints_a_table(trained):
    result = run(
        "replace", "--sae", trained[0], "--firings", "4", "--passages", "20", "--length", "64", "--horizon", "2"
    )
    assert result.exit_code == 0, result.output
    assert "strongest" in result.stdout
    options = ["--firings", "4", "--passages", "20", "--length", "64", "--horizon", "2", "--reading", "cache"]
    lost = json.loads(run("replace", "--sae", trained[0], *options, "--losses", "--json").stdout)
    assert {row["reading"] for row in lost["summary"]} == {"cache"}
    assert sum(row["n"] for row in lost["losses"] if row["by"] == "cosine") == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["train", "--out", "x", "--hook", "blocks.1.mixer.hook_wrote", *SMALL],
            "did you mean 'blocks.1.mixer.hook_write'",
        ),
        (["train", "--out", "x", "--head", "4", *SMALL], "head must be 0..3, got 4"),
        (["train", "--out", "x", "--model", "tiny-gated-deltant", *SMALL], "did you mean 'tiny-gated-deltanet'"),
        (["train", *SMALL], "give the run a folder: --out"),
        (["train", "--out", "x", "--config", "none.yaml"], "none.yaml cannot be read"),
        (["train", "--out", "x", "--preset", "bilinaer", *SMALL], "did you mean 'bilinear'"),
        (["train", "--out", "x", "--log-to", "tensorbord", *SMALL], "did you mean 'tensorboard'"),
        (["replace", "--sae", "no-such-folder"], "no-such-folder"),
        (["demo", "--layer", "1"], "give layer and head together"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_two(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert result.exit_code == 2
    message = " ".join(result.stderr.split())
    assert said in message
    assert "Traceback" not in message
    assert not (tmp_path / "x").exists()
