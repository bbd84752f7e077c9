"""The demo end to end on the bundled model, made small: what it writes, and that its numbers follow from its seed."""

import json

import pytest

from hooked_recurrent import HookedRecurrentModel
from writesae import WriteSAE
from writesae.demo import DemoConfig, run_demo

SMALL = DemoConfig(
    length=96,
    train_passages=40,
    heldout_passages=30,
    survey_passages=2,
    n_atoms=64,
    k=4,
    steps=60,
    firings=20,
    atoms_shown=3,
)


@pytest.fixture(scope="module")
def model():
    return HookedRecurrentModel.from_pretrained("tiny-gated-deltanet")


@pytest.fixture(scope="module")
def result(model, tmp_path_factory):
    return run_demo(model, tmp_path_factory.mktemp("demo"), SMALL)


def test_writes_report_results_and_dictionary(result, model):
    folder = result.report.parent
    assert {path.name for path in folder.iterdir()} == {"report.html", "results.json", "sae"}
    page = result.report.read_text(encoding="utf-8")
    assert "tiny-gated-deltanet" in page
    assert page.count('id="heat-') == 3
    stored = json.loads((folder / "results.json").read_text())
    assert stored["about"]["demo"]["seed"] == 0
    assert stored["about"]["heldout_text"]["split"] == "heldout"
    assert stored["about"]["train_text"]["fingerprint"] != stored["about"]["heldout_text"]["fingerprint"]
    cell = (result.replacement.layer, result.replacement.head)
    best = result.cells.loc[result.cells["deletion_kl"].idxmax()]
    assert cell == (best["layer"], best["head"])
    sae = WriteSAE.load(folder / "sae")
    assert (sae.provenance["layer"], sae.provenance["head"]) == cell
    assert result.replacement.floor()[1] < 1e-6  # float32


def test_same_seed_same_numbers(result, model, tmp_path):
    again = run_demo(model, tmp_path, SMALL)
    assert again.replacement.table.equals(result.replacement.table)
    assert again.report.read_text() == result.report.read_text()


def test_progress_is_told_in_order(model, tmp_path):
    heard = []
    run_demo(
        model, tmp_path, DemoConfig(**{**SMALL.to_dict(), "layer": 0, "head": 1}), lambda *step: heard.append(step)
    )
    stages = list(dict.fromkeys(stage for stage, _, _ in heard))
    assert stages == ["survey", "writes", "steps", "replace"]
    assert heard[-1][1] == heard[-1][2] == 20


@pytest.mark.parametrize(("change", "words"), [({"layer": 1}, "layer and head together"), ({"firings": 0}, "firings")])
def test_bad_sizes(change, words):
    with pytest.raises(ValueError, match=words):
        DemoConfig(**change)
