"""A run keeps what it made, goes on where it was stopped, and tells which way effects point."""

import json
from dataclasses import replace

import pandas as pd
import pytest

from hooked_recurrent import HookedRecurrentModel
from writesae.evaluation.result import Result
from writesae.reproduce import ReproduceConfig, reproduce, run
from writesae.reproduce.claims import claims_of
from writesae.reproduce.page import page, runs_in, say, table
from writesae.reproduce.rows import Row
from writesae.reproduce.run import command, read


class Counted(Result):
    """A result whose summary is its table."""

    kind = "counted"

    def summary(self):
        return self.table.to_dict(orient="records")


@pytest.fixture(scope="module")
def model():
    return HookedRecurrentModel.from_pretrained("tiny-gated-deltanet")


@pytest.fixture
def steps(monkeypatch):
    """Two steps of no work; how often each ran."""
    calls = []

    def step(name, value):
        def made(bench):
            calls.append(name)
            if value is None:
                raise RuntimeError("killed")
            rows = pd.DataFrame([{"win_rate": value, "interval": [value - 0.1, value + 0.1], "way": "plain"}])
            return {"only": Counted(rows, 1, 2, {"seed": 0})}

        return made

    fakes = {"first": step("first", 0.75), "second": step("second", 0.55)}
    monkeypatch.setattr(run, "STEPS", fakes)
    return fakes, calls


def test_what_is_on_disk_is_not_run_again(model, steps, tmp_path):
    fakes, calls = steps
    config = ReproduceConfig.of("tiny-gated-deltanet", quick=True)
    reproduce(model, config, tmp_path, only=["first"])
    outcome = reproduce(model, config, tmp_path)
    assert calls == ["first", "second"]
    assert outcome.summaries["first"] == [{"run": "only", "win_rate": 0.75, "interval": [0.65, 0.85], "way": "plain"}]
    assert set(outcome.seconds) == {"first", "second"}
    reproduce(model, config, tmp_path, redo=["second"])
    assert calls == ["first", "second", "second"]
    assert pd.read_csv(tmp_path / "tables" / "first.only.csv.gz")["win_rate"].tolist() == [0.75]


def test_a_step_that_was_killed_is_run_again(model, steps, tmp_path):
    fakes, calls = steps
    good, fakes["second"] = fakes["second"], lambda bench: 1 / 0
    config = ReproduceConfig.of("tiny-gated-deltanet")
    with pytest.raises(ZeroDivisionError):
        reproduce(model, config, tmp_path)
    fakes["second"] = good
    assert set(reproduce(model, config, tmp_path).summaries) == {"first", "second"}
    assert calls == ["first", "second"]


def test_another_config_does_not_mix_with_a_run_that_is_there(model, steps, tmp_path):
    config = ReproduceConfig.of("tiny-gated-deltanet", quick=True)
    reproduce(model, config, tmp_path)
    with pytest.raises(ValueError, match=r"another config \(firings differ\)"):
        reproduce(model, replace(config, firings=7), tmp_path)
    with pytest.raises(ValueError, match="did you mean 'first'"):
        reproduce(model, config, tmp_path, only=["frist"])


def test_a_truncated_step_is_named(model, steps, tmp_path):
    config = ReproduceConfig.of("tiny-gated-deltanet")
    reproduce(model, config, tmp_path)
    whole = (tmp_path / "first.json").read_text()
    (tmp_path / "first.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"first\.json is no whole JSON file"):
        read(tmp_path)
    with pytest.raises(ValueError, match="holds no reproduction"):
        read(tmp_path / "nowhere")


def test_the_command_names_what_differs_from_the_models_own_sizes():
    config = ReproduceConfig.of("tiny-rwkv7", quick=True, firings=9, layer=1, head=0)
    words = command(config)
    assert words == "writesae reproduce --model tiny-rwkv7 --quick --layer 1 --head 0 --firings 9"


@pytest.mark.parametrize(
    ("model_name", "cell"),
    [
        ("Qwen/Qwen3.5-0.8B", (9, 4)),
        ("x/mamba2-370m-hf", (24, 0)),
        ("x/rwkv7-1.5B-world", (12, 0)),
        ("y/RWKV-7-World3-1.5B-HF", (12, 0)),
    ],
)
def test_the_papers_models_have_the_papers_cells_and_sizes(model_name, cell):
    config = ReproduceConfig.of(model_name)
    assert (config.layer, config.head) == cell and (config.n_atoms, config.k, config.length) == (2048, 32, 1024)
    assert ReproduceConfig.of(model_name, layer=3, head=1).layer == 3
    assert ReproduceConfig.of("x/mamba2-780m").layer is None


def test_a_layer_without_a_head_is_refused():
    with pytest.raises(ValueError, match="layer and head together"):
        ReproduceConfig.of("tiny-rwkv7", layer=1)


# --- rows, claims, page ---------------------------------------------------------------------------------------------

SUMMARIES = {"first": [{"way": "a", "rate": 0.4, "ends": [0.3, 0.6]}, {"way": "b", "rate": 0.9, "ends": [0.8, 0.95]}]}


def row(**fields):
    return Row("first", "a rate", "rate", **{"where": {"way": "b"}, "interval": "ends", **fields})


def test_a_row_finds_its_number_by_what_its_fields_must_be():
    assert row().written(row().find(SUMMARIES)) == "90.0% (80.0% to 95.0%)"
    assert row(where={"way": "c"}).find(SUMMARIES) is None
    assert Row("other", "", "rate").find(SUMMARIES) is None
    assert row(form="nats", interval=None).written(None) == "-"


def test_a_claim_holds_by_its_estimate_and_is_certain_by_its_interval(monkeypatch):
    rows = (
        row(above=0.5),
        row(above=0.85),
        row(above=0.95),
        row(below=0.97),
        row(),
        row(where={"way": "gone"}, above=0.5),
        Row("not run", "", "rate", above=0.5),
        row(where={"way": "b", "run": "left out by a quick run"}, above=0.95),
    )
    monkeypatch.setattr("writesae.reproduce.claims.ROWS", rows)
    verdicts = [(claim.holds, claim.certain) for claim in claims_of(SUMMARIES)]
    assert verdicts == [(True, True), (True, False), (False, False), (True, True), (False, False)]


def test_the_page_sets_the_papers_figures_beside_those_of_the_runs(model, steps, tmp_path, monkeypatch):
    reproduce(model, ReproduceConfig.of("tiny-gated-deltanet"), tmp_path / "tiny-gated-deltanet")
    reproduce(model, ReproduceConfig.of("tiny-gated-deltanet", seed=1), tmp_path / "other")
    wanted = (
        Row("first", "wins", "win_rate", interval="interval", paper={"gated_delta_net": "91.2%"}),
        Row("first", "more", "win_rate"),
    )
    monkeypatch.setattr("writesae.reproduce.page.ROWS", wanted)
    lines = table(runs_in(tmp_path), "first").splitlines()
    assert lines[0].count("paper, gated delta net") == 2
    assert lines[2] == "| wins | 75.0% (65.0% to 85.0%) | 91.2% | 75.0% (65.0% to 85.0%) | 91.2% |"
    assert lines[3] == "| more | 75.0% |  | 75.0% |  |"
    runs = runs_in(tmp_path)
    assert say(runs, "first", "wins") == "75.0% (tiny-gated-deltanet), 75.0% (tiny-gated-deltanet)"
    with pytest.raises(KeyError, match="no row 'won'"):
        say(runs, "first", "won")


def test_a_folder_without_runs_has_no_page(tmp_path):
    with pytest.raises(ValueError, match="no run in"):
        page(tmp_path)


def test_a_run_records_what_it_takes_to_run_it_again(model, steps, tmp_path):
    reproduce(model, ReproduceConfig.of("tiny-gated-deltanet", quick=True), tmp_path)
    about = json.loads((tmp_path / "reproduce.json").read_text())
    assert about["command"] == "writesae reproduce --model tiny-gated-deltanet --quick"
    assert about["rule"] == "gated_delta_net" and "torch" in about["versions"]
    assert json.loads((tmp_path / "first.json").read_text())["results"]["only"]["config"] == {"seed": 0}
