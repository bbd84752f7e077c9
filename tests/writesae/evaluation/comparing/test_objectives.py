"""The comparison of objectives: what it measures, that it goes on where it stopped, and its paired test."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

import writesae.evaluation.comparing.objectives as objectives
from tests.hooked_recurrent.models import ALL_LINEAR, tiny_model, tokens_of
from writesae.evaluation.comparing.objectives import COMPARED, ObjectivesConfig, compare_objectives, load_dictionary
from writesae.evaluation.comparing.objectives_result import ObjectivesResult
from writesae.evaluation.replacing.replacement import ReplacementConfig, replacement
from writesae.training.finetune import FinetuneConfig
from writesae.training.objectives import OBJECTIVES, ObjectiveConfig, train_objective

CELL = {"layer": 1, "head": 2}
TRAINING = ObjectiveConfig(
    n_atoms=12,
    k=3,
    steps=6,
    batch_size=16,
    metric_passages=2,
    finetune=FinetuneConfig(steps=2, rows=4, horizon=2, steps_per_pass=2),
)
CONFIG = ObjectivesConfig(
    objectives=("write", "relative"), seeds=2, training=TRAINING, firings=8, horizon=4, splice_passages=1
)


@pytest.fixture(scope="module")
def texts():
    model = tiny_model(ALL_LINEAR, dtype=torch.float32)
    return model, tokens_of(model, batch=6, length=24), tokens_of(model, batch=3, length=24, seed=1)


@pytest.fixture(scope="module")
def compared(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "objectives"
    return compare_objectives(*texts, **CELL, config=CONFIG, folder=folder), folder


def test_a_row_per_dictionary_and_reading_that_is_its_own_replacement_test(compared, texts):
    result, folder = compared
    model, train, heldout = texts
    assert len(result.table) == 2 * 2 * 3 and result.objectives == ["write", "relative"]
    sae = train_objective(model, train, "relative", config=TRAINING, seed=1, **CELL).sae
    kept = load_dictionary(folder, "relative", 1)
    assert all(torch.equal(tensor, kept.state_dict()[name]) for name, tensor in sae.state_dict().items())
    tested = replacement(
        model, sae, heldout, **CELL, config=ReplacementConfig(total=8, per_atom=3, horizon=4, seed=2026)
    )
    table = result.table
    rows = table[(table["objective"] == "relative") & (table["seed"] == 1)].set_index("reading")
    for reading in ("in_recurrence", "cache", "horizon"):
        assert rows.loc[reading, "win_rate"] == tested.win_rate(reading)
    mine = pd.DataFrame(result.wins).query("objective == 'relative' and seed == 1 and reading == 'cache'")
    assert mine["wins"].sum() / mine["firings"].sum() == pytest.approx(tested.win_rate("cache"))


def test_the_summary_the_figure_and_the_file(compared, tmp_path):
    result, _ = compared
    rows = result.summary(200)
    assert [(row["reading"], row["objective"]) for row in rows[:2]] == [
        ("in_recurrence", "write"),
        ("in_recurrence", "relative"),
    ]
    assert "ahead" not in rows[0] and rows[1]["against"] == "write"
    mine = result.table.query("reading == 'in_recurrence' and objective == 'relative'")["win_rate"]
    assert rows[1]["win_rate"] == pytest.approx(mine.mean())
    assert rows[1]["win_rate_sd"] == pytest.approx(mine.std())
    assert rows[1]["n"] == 16 and {"fvu", "dead_fraction", "loss_recovered"} <= rows[1].keys()
    assert len(result.figure().axes) == 3
    again = ObjectivesResult.from_json(result.to_json(tmp_path / "objectives.json"))
    assert again.wins == result.wins
    pd.testing.assert_frame_equal(pd.DataFrame(again.summary(200)), pd.DataFrame(rows))


def test_it_goes_on_where_it_stopped(compared, texts, tmp_path, monkeypatch):
    result, _ = compared
    folder, trained, real = tmp_path / "kept", [], train_objective

    def counted(*args, **kwargs):
        trained.append((args[2], kwargs["seed"]))
        if len(trained) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(objectives, "train_objective", counted)
    with pytest.raises(KeyboardInterrupt):
        compare_objectives(*texts, **CELL, config=CONFIG, folder=folder)
    told = []
    again = compare_objectives(
        *texts, **CELL, config=CONFIG, folder=folder, on_progress=lambda *done: told.append(done)
    )
    assert trained == [("write", 0), ("relative", 0), ("write", 1), ("write", 1), ("relative", 1)]
    assert told[-1] == (4, 4)
    pd.testing.assert_frame_equal(
        again.table.drop(columns="seconds"), result.table.drop(columns="seconds"), check_exact=True
    )
    assert again.wins == result.wins
    compare_objectives(*texts, **CELL, config=replace(CONFIG, seeds=1), folder=folder)
    assert len(trained) == 5
    with pytest.raises(ValueError, match="another comparison: firings, training differ"):
        other = replace(CONFIG, firings=9, training=replace(TRAINING, k=2))
        compare_objectives(*texts, **CELL, config=other, folder=folder)


@pytest.mark.parametrize("objective", ["state", "net"])
def test_dictionaries_of_states_and_net_writes_are_tested_too(texts, objective):
    config = replace(CONFIG, objectives=(objective,), seeds=1)
    result = compare_objectives(*texts, **CELL, config=config)
    assert len(result.table) == 3 and result.table["win_rate"].between(0, 1).all()


def made(first, second, passages=12):
    """A result in which two objectives win so many of four firings in every passage."""
    wins = [
        {"objective": name, "seed": 0, "reading": "cache", "passage": p, "wins": of(p), "firings": 4}
        for name, of in (("write", first), ("relative", second))
        for p in range(passages)
    ]
    table = pd.DataFrame(
        [{"objective": name, "seed": 0, "reading": "cache", "n": 48, "win_rate": 0.5} for name in ("write", "relative")]
    )
    return ObjectivesResult(table, 0, 0, {}, wins=wins)


def test_the_difference_is_paired_by_passage():
    uneven = made(lambda p: p % 4, lambda p: p % 4 + 1).difference("relative", "write", "cache")
    assert uneven["ahead"] == 0.25 and uneven["interval"] == [0.25, 0.25]  # passages differ, the pairs do not
    assert uneven["p"] < 0.003 and uneven["n_passages"] == 12
    turned = made(lambda p: p % 4, lambda p: p % 4 + 1).difference("write", "relative", "cache")
    assert turned["ahead"] == -0.25
    same = made(lambda p: p % 4, lambda p: (p + 1) % 4).difference("relative", "write", "cache")
    assert abs(same["ahead"]) < 1e-12 and same["p"] > 0.5
    alone = made(lambda p: 1, lambda p: 1, passages=1).difference("relative", "write", "cache")
    assert alone["n_passages"] == 1 and alone["p"] != alone["p"]


def test_configs():
    assert set(COMPARED) <= set(OBJECTIVES)
    quick = ObjectivesConfig.quick(seed=3)
    assert quick.seed == 3 and quick.training.steps < ObjectivesConfig().training.steps
    with pytest.raises(ValueError, match="did you mean 'relative'"):
        ObjectivesConfig(objectives=("relativ",))
    with pytest.raises(ValueError, match="must name one at least"):
        ObjectivesConfig(objectives=())
