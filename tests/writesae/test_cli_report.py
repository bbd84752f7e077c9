"""The command report, on a small random dictionary of a bundled model."""

import json

import pytest
import torch
from typer.testing import CliRunner

from writesae import WriteSAE, WriteSAEConfig
from writesae.cli import app

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sae = WriteSAE(WriteSAEConfig(d_k=32, d_v=32, n_atoms=24, k=4))
    sae.calibrate_(torch.randn(64, 32), torch.randn(64, 32))
    sae.provenance |= {"model": "tiny-gated-deltanet", "layer": 2, "head": 1, "form": "additive"}
    sae.provenance["hook"] = "blocks.2.mixer.hook_write"
    return sae.save(tmp_path_factory.mktemp("dictionaries") / "l2h1")


def run(*words):
    return RUNNER.invoke(app, ["report", *map(str, words)])


def test_a_page_is_written_beside_the_dictionary_and_told_of(folder):
    result = run(folder, "--passages", 3, "--length", 24, "--tested-atoms", 2, "--firings-per-atom", 1, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    page = (folder / "atoms.html").read_text(encoding="utf-8")
    assert told["page"] == str(folder / "atoms.html") and told["bytes"] == len(page.encode())
    assert (told["atoms"], told["tested"]) == (24, 2) and sum(told["kinds"].values()) == 24
    assert "<title>tiny-gated-deltanet, layer 2, head 1: 24 atoms</title>" in page and ".py" in page


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--length", 9], "need at least 11"),
        (["--tested-atoms", -1], "tested_atoms must be at least 0"),
        (["--firings-per-atom", 0], "firings_per_atom"),
    ],
)
def test_bad_options_end_in_one_sentence(folder, more, words):
    result = run(folder, "--passages", 2, *more)
    assert result.exit_code == 2 and words in " ".join(result.output.split()) and "Traceback" not in result.output


def test_a_folder_without_a_dictionary_is_named(tmp_path):
    result = run(tmp_path / "nothing")
    assert result.exit_code == 2 and "nothing" in result.output


def test_help_has_an_example():
    assert "writesae report runs/" in " ".join(run("--help").output.split())
