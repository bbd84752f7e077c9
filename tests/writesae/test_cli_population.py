"""The commands population, passage-test, baselines and encoder-swap, as a user meets them, at the smallest sizes."""

import json

import pytest
from typer.testing import CliRunner

from writesae.cli import app

RUNNER = CliRunner()
TEXT = ["--passages", "4", "--length", "32", "--json"]


def run(*words):
    return RUNNER.invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("population") / "run"
    sizes = ["--steps", "20", "--passages", "10", "--length", "32", "--atoms", "16", "--k", "3"]
    result = run("train", "--out", folder, "--hook", "blocks.1.mixer.hook_write", "--head", "1", "--json", *sizes)
    assert result.exit_code == 0, result.output
    return folder / "sae"


def test_population(trained, tmp_path):
    out = tmp_path / "p.json"
    options = ["--atoms", "3", "--per-atom", "2", "--min-firings", "1", "--horizon", "1", "--out", out]
    result = run("population", "--sae", trained, *options, *TEXT)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)[0]["part"] == "all"
    stored = json.loads(out.read_text())
    assert stored["kind"] == "population" and stored["about"]["model"] == "tiny-gated-deltanet"


def test_passage_test(trained):
    result = run("passage-test", "--sae", trained, "--side", "all", "--most", "2", "--draws", "1", *TEXT)
    assert result.exit_code == 0, result.output
    assert {row["condition"] for row in json.loads(result.stdout)} >= {"native", "delete", "atom"}
    wrong = run("passage-test", "--sae", trained, "--atom", "99", *TEXT)
    assert wrong.exit_code == 2 and "outside this dictionary" in wrong.output


def test_baselines(trained, tmp_path):
    out = tmp_path / "b.json"
    result = run("baselines", "--sae", trained, "--firings", "2", "--horizon", "1", "--out", out, *TEXT)
    assert result.exit_code == 0, result.output
    about = json.loads(out.read_text())["about"]
    assert about["train_text"] == about["text_of_the_dictionary"]  # the very passages that the dictionary saw


def test_encoder_swap(tmp_path):
    options = ["--preset", "bilinear", "--preset", "flat", "--seeds", "1", "--atoms", "8", "--k", "2", "--steps", "3"]
    more = ["--firings", "2", "--horizon", "1", "--train-passages", "10", "--folder", tmp_path / "swap", *TEXT]
    result = run("encoder-swap", "--cell", "1:1", *options, *more)
    assert result.exit_code == 0, result.output
    assert {row["preset"] for row in json.loads(result.stdout)} == {"bilinear", "flat"}
    assert (tmp_path / "swap" / "measured-l1h1.json").exists()
    wrong = run("encoder-swap", "--cell", "1-1", *options, *more)
    assert wrong.exit_code == 2 and "LAYER:HEAD" in wrong.output
