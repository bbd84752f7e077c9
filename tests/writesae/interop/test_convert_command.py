"""`writesae convert` as a user meets it."""

import json

import pytest
import torch
from typer.testing import CliRunner

from tests.writesae.interop.test_published import config, state_dict
from writesae.cli import app
from writesae.sae import WriteSAE


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def file(tmp_path):
    torch.save({"model_state_dict": state_dict("bilinear"), "config": config("bilinear")}, tmp_path / "best.pt")
    return tmp_path / "best.pt"


def test_a_file_becomes_a_folder(file, tmp_path):
    words = ["--out", tmp_path / "ours", "--layout", "value_first", "--model", "some/model", "--head", 1, "--k", 2]
    result = run("convert", file, *words, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    sae = WriteSAE.load(told["saved"])
    assert (sae.config.d_k, sae.config.d_v, sae.config.k) == (4, 5, 2)
    assert (sae.provenance["model"], sae.provenance["head"]) == ("some/model", 1)
    assert told["provenance"] == sae.provenance and told["config"]["d_k"] == 4
    result = run("convert", file, "--out", tmp_path / "ours")
    assert result.exit_code == 0 and "A bilinear dictionary of 7 atoms of 5 x 4" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--type", "bilinaer"], "did you mean 'bilinear'"),
        (["--layout", "rows_first"], "layout must be 'key_first' or 'value_first'"),
        (["--d-k", "6"], "has V_enc of width 5 where 6 was told"),
    ],
)
def test_bad_input_is_one_sentence(file, tmp_path, words, said):
    result = run("convert", file, "--out", tmp_path / "ours", *words)
    message = " ".join(result.stderr.split())
    assert result.exit_code == 2 and said in message and "Traceback" not in message
    assert not (tmp_path / "ours").exists()
