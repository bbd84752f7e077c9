"""The command line as a user meets it: help that teaches, tables, JSON, and one sentence for bad input."""

import json

import pytest
from typer.testing import CliRunner

from writesae.cli import app

RUNNER = CliRunner()
SMALL = ["--steps", "40", "--passages", "30", "--length", "64", "--atoms", "32", "--k", "4"]


def run(*words):
    return RUNNER.invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A dictionary that the command line itself trained."""
    folder = tmp_path_factory.mktemp("cli") / "sae"
    result = run("train", "--out", folder, "--hook", "blocks.2.mixer.hook_write", "--head", "1", "--json", *SMALL)
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout)


@pytest.mark.parametrize("verb", ["demo", "train", "replace", "models"])
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
    assert printed["metrics"]["heldout"]["l0"] <= 4
    out = tmp_path / "results.json"
    options = ["--firings", "6", "--passages", "20", "--length", "64", "--horizon", "2", "--out", out, "--json"]
    result = run("replace", "--sae", folder, *options)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert {(row["reading"], row["n"]) for row in summary} == {("in_recurrence", 6), ("cache", 6), ("horizon", 6)}
    assert all(row["floor_max"] < 1e-6 for row in summary)  # float32
    stored = json.loads(out.read_text())
    assert (stored["layer"], stored["head"], len(stored["records"])) == (2, 1, 18)


def test_replace_prints_a_table(trained):
    result = run(
        "replace", "--sae", trained[0], "--firings", "4", "--passages", "20", "--length", "64", "--horizon", "2"
    )
    assert result.exit_code == 0, result.output
    assert "strongest" in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["train", "--out", "x", "--hook", "blocks.1.mixer.hook_wrote", *SMALL],
            "did you mean 'blocks.1.mixer.hook_write'",
        ),
        (["train", "--out", "x", "--head", "4", *SMALL], "head must be 0..3, got 4"),
        (["train", "--out", "x", "--model", "tiny-gated-deltant", *SMALL], "did you mean 'tiny-gated-deltanet'"),
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
