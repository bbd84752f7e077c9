"""The commands erase, readers, steer, install and sign-test, as a user meets them, at the smallest sizes."""

import json

import pytest
from typer.testing import CliRunner

from writesae import WriteSAE, WriteSAEConfig
from writesae.cli import app

RUNNER = CliRunner()
TEXT = ["--passages", "6", "--length", "40", "--json"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A dictionary that nobody trained, of a cell of the bundled model."""
    sae = WriteSAE(WriteSAEConfig(32, 32, n_atoms=12, k=3))
    sae.provenance.update(model="tiny-gated-deltanet", hook="blocks.1.mixer.hook_write", layer=1, head=1)
    return sae.save(tmp_path_factory.mktemp("experiments") / "sae")


@pytest.mark.parametrize(
    ("command", "options", "field", "values"),
    [
        ("erase", ["--count", "1", "--per-atom", "4", "--writes", "2", "--horizon", "1"], "condition", {"delete"}),
        ("readers", ["--count", "1", "--per-atom", "2", "--horizon", "1"], "layer", {2, 3}),
        ("steer", ["--top", "1", "--dose", "2", "--prompts", "2", "--new-tokens", "3"], "condition", {"atoms"}),
        ("sign-test", ["--total", "4"], "predictor", {"first_order", "product"}),
        (
            "install",
            ["--prompts", "1", "--positions", "1", "--per-stratum", "1", "--strata", "middle", "--magnitudes", "3"]
            + ["--cells", "given", "--rounds", "1", "--no-steering"],
            "condition",
            {"lambda_refined", "fixed_native_key", "random"},
        ),
    ],
)
def test_a_command_prints_its_summary_and_keeps_its_measurements(saved, tmp_path, command, options, field, values):
    out = tmp_path / "result.json"
    result = RUNNER.invoke(app, [command, "--sae", str(saved), "--out", str(out), *options, *TEXT])
    assert result.exit_code == 0, result.output
    assert {row[field] for row in json.loads(result.stdout)} >= values
    stored = json.loads(out.read_text())
    assert stored["records"] and (stored["layer"], stored["about"]["model"]) == (1, "tiny-gated-deltanet")


@pytest.mark.parametrize("command", ["erase", "readers", "steer", "sign-test", "install"])
def test_a_dictionary_that_is_not_there_is_one_sentence(command, tmp_path):
    result = RUNNER.invoke(app, [command, "--sae", str(tmp_path / "nothing"), *TEXT])
    assert result.exit_code == 2 and "error:" in result.output and "Traceback" not in result.output
