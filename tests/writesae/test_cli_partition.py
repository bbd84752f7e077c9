"""The commands partition, selectivity and perplexity, on small dictionaries of a bundled model."""

import json

import pytest
import torch
from typer.testing import CliRunner

from writesae import WriteSAE, WriteSAEConfig
from writesae.cli import app

RUNNER = CliRunner()
TEXT = ["--passages", "4", "--length", "40"]


def run(*words):
    return RUNNER.invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random dictionaries of heads 1 and 3 of one layer, and one of head 1 of another."""
    found = []
    for layer, head, seed in ((2, 1, 0), (2, 3, 1), (1, 1, 2)):
        sae = WriteSAE(WriteSAEConfig(d_k=32, d_v=32, n_atoms=24, k=4, seed=seed))
        sae.calibrate_(torch.randn(64, 32, generator=torch.Generator().manual_seed(seed)), torch.randn(64, 32))
        sae.provenance |= {"model": "tiny-gated-deltanet", "layer": layer, "head": head, "form": "additive"}
        sae.provenance["hook"] = f"blocks.{layer}.mixer.hook_write"
        found.append(sae.save(tmp_path_factory.mktemp("dictionaries") / f"l{layer}h{head}"))
    return found


def test_partition_prints_keeps_and_draws(folders, tmp_path):
    out, figure = tmp_path / "result.json", tmp_path / "figure.png"
    result = run(
        "partition", "--sae", folders[0], "--other", folders[1], "--out", out, "--figure", figure, "--json", *TEXT
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["form"] for row in rows] == ["additive", "net"] and rows[0]["bic_rule"] == "lower is better"
    assert rows[0]["matched_seed_1_all"] == 0
    stored = json.loads(out.read_text())
    assert (stored["kind"], stored["layer"], stored["head"], len(stored["records"])) == ("partition", 2, 1, 24)
    assert stored["about"]["model"] == "tiny-gated-deltanet" and figure.stat().st_size > 1000


def test_selectivity_stands_beside_its_check(folders):
    result = run("selectivity", "--sae", folders[0], "--firings", "8", "--json", *TEXT)
    assert result.exit_code == 0, result.output
    rows = {(row["pair"], row["K"]): row for row in json.loads(result.stdout)}
    assert rows["gaussian~gaussian", 32]["selectivity"] > 0.5 and rows["atom~half_atom", 32]["selectivity"] < 0.5


def test_perplexity_of_one_head_and_of_two(folders, tmp_path):
    figure = tmp_path / "figure.png"
    result = run("perplexity", "--sae", folders[0], "--other", folders[1], "--figure", figure, "--json", *TEXT)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert {(row["variant"], row["k"]) for row in rows if row["variant"] != "svd"} == {
        (variant, k) for variant in ("self", "zero", "mean", "writes") for k in (1, 2)
    }
    assert all(row["floor"] < 1e-5 for row in rows) and figure.stat().st_size > 1000  # float32


@pytest.mark.parametrize(
    ("others", "words"), [((2,), "one layer"), ((1, 1), "both of head 3"), ((0,), "both of head 1")]
)
def test_dictionaries_that_do_not_go_together_end_in_one_sentence(folders, others, words):
    more = [word for number in others for word in ("--other", folders[number])]
    result = run("perplexity", "--sae", folders[0], *more, *TEXT)
    assert result.exit_code == 2 and words in " ".join(result.output.split())
    assert "Traceback" not in result.output


@pytest.mark.parametrize("verb", ["partition", "selectivity", "perplexity"])
def test_help_has_an_example(verb):
    assert f"writesae {verb} --sae" in " ".join(run(verb, "--help").output.split())
