"""--dry-run: what would be downloaded, computed and written, how long it may take; and nothing is."""

import json
from functools import cache

import pytest
import yaml
from typer.testing import CliRunner

from hooked_recurrent import HookedRecurrentModel
from writesae import WriteSAE, WriteSAEConfig
from writesae.cli import app, dry_run
from writesae.cli.dry_run import Forecast, Part, in_words

RUNNER = CliRunner()
TEXT = ["--length", "48"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry")
    sae = WriteSAE(WriteSAEConfig(32, 32, n_atoms=8, k=2))
    sae.provenance.update(model="tiny-gated-deltanet", layer=2, head=1, training={"steps": 5})
    sae.save(folder / "run" / "sae")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HookedRecurrentModel, "from_pretrained", cache(HookedRecurrentModel.from_pretrained))
        yield folder


@pytest.mark.parametrize(
    ("words", "computed", "written"),
    [
        (
            ["replace", "--sae", "run/sae", "--firings", "50", "--horizon", "4", "--out", "x.json", *TEXT],
            "50 firings",
            "x.json",
        ),
        (["partition", "--sae", "run/sae", "--figure", "x.png", *TEXT], "8 atoms of 32 x 32", "x.png"),
        (["sign-test", "--sae", "run/sae", "--total", "40", *TEXT], "40 pairs", None),
        (["replace-cells", "run", "--firings", "5", "--keep", "kept", *TEXT], "1 cells", "kept"),
        (["cache", "write", "--out", "new", "--passages", "9", *TEXT], "hook_write", "new/ (at most"),
        (["train", "--out", "new", "--steps", "300", "--passages", "40", *TEXT], "300 steps of 256 samples", "new/"),
    ],
)
def test_it_says_what_would_be_done_and_does_nothing(place, monkeypatch, words, computed, written):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    result = RUNNER.invoke(app, [*words, "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["dry_run"] is True and "ships with the package" in told["downloads"]
    assert any(computed in line for line in told["computes"])
    assert written is None or any(written in line for line in told["writes"])
    assert told["seconds"] > 0 and told["measured"].startswith("an estimate, from short runs")
    assert "48 tokens" in told["reads"]
    assert sorted(place.rglob("*")) == before


def test_in_words_it_stands_below_the_configuration(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(Forecast, "measure", lambda self, parts, beside="": None)
    result = RUNNER.invoke(app, ["train", "--dry-run", "--steps", "77"])
    assert yaml.safe_load(result.stdout)["training"]["steps"] == 77
    for word in ("downloads", "reads", "computes", "writes", "takes"):
        assert f"# {word:>9}  " in result.stdout
    assert "nothing was written" in result.stdout


def test_a_model_of_the_hub_is_never_asked_for(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a dry run touched the network"))
    result = RUNNER.invoke(app, ["demo", "--model", "owner/name", "--dry-run", "--json"])
    told = json.loads(result.stdout)
    assert told["downloads"].startswith("owner/name from the hub") and told["seconds"] is None
    assert "not on this machine" in told["measured"]


def test_a_line_through_two_short_runs(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(dry_run.time, "perf_counter", lambda: clock[0])

    def work(units):  # half a second, and a tenth of one per unit
        clock[0] += 0.5 + 0.1 * units

    plan = Forecast("verb", "nothing")
    plan.measure([Part("firings", 100, work), Part("steps", 1000, work, times=3, small=10)])
    assert plan.seconds == pytest.approx((0.5 + 10) + (3 * 0.5 + 100))
    assert "4 and 12 firings" in plan.measured and "10 and 30 steps" in plan.measured


def test_what_cannot_be_timed_is_said():
    def fails(units):
        raise ValueError("no atom fires")

    plan = Forecast("verb", "nothing")
    plan.measure([Part("firings", 100, fails)])
    assert plan.seconds is None and plan.measured == "not estimated: no atom fires"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (47.0, "47 s"), (130.0, "2.2 minutes"), (8000.0, "2.2 hours")]
)
def test_an_estimate_has_two_digits(seconds, words):
    assert in_words(seconds) == words
