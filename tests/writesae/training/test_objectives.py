"""Every objective makes a dictionary of the cell at the budget that it was given, and follows from its seed."""

import pytest
import torch

from tests.hooked_recurrent.models import ALL_LINEAR, tiny_model, tokens_of
from writesae import WriteSAE
from writesae.stream.store import ActivationStore
from writesae.training.finetune import FinetuneConfig
from writesae.training.objectives import (
    BEST,
    OBJECTIVES,
    ObjectiveConfig,
    best_dictionary,
    source_of,
    train_objective,
)

CELL = {"layer": 1, "head": 2}
FINETUNE = FinetuneConfig(steps=3, rows=4, horizon=2, steps_per_pass=3, log_every=1)
CONFIG = ObjectiveConfig(n_atoms=12, k=3, steps=8, batch_size=16, metric_passages=4, finetune=FINETUNE)


def text(layer_types=ALL_LINEAR):
    model = tiny_model(layer_types, dtype=torch.float32)
    return model, tokens_of(model, batch=8, length=20)


def same(a, b):
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_spends_the_same_steps(objective, tmp_path):
    model, tokens = text()
    what, told = OBJECTIVES[objective], []
    result = train_objective(
        model, tokens, objective, config=CONFIG, on_progress=lambda *done: told.append(done), **CELL
    )
    assert told == [(step, 8) for step in range(1, 9)]
    config, origin = result.sae.config, result.sae.provenance
    assert (config.k, config.encoder, config.start) == (
        (1, "bilinear" if what.metric else "tied", "samples") if what.single else (3, "bilinear", "random")
    )
    assert (origin["layer"], origin["head"], origin["objective"]["name"]) == (1, 2, objective)
    assert origin["hook"] == source_of(objective, **CELL).hook and not result.sae.training
    assert ("win_rate" in result.log[-1]) == bool(what.kl)
    result.sae.save(tmp_path / "sae")
    assert same(WriteSAE.load(tmp_path / "sae"), result.sae)


@pytest.mark.parametrize("layer_types", [("mamba2",) * 2, ("rwkv7",) * 2])
def test_the_best_one_on_other_rules_and_by_its_seed(layer_types):
    model, tokens = text(layer_types)
    first, again, other = (best_dictionary(model, tokens, config=CONFIG, seed=seed, **CELL).sae for seed in (1, 1, 2))
    named = train_objective(model, tokens, BEST, config=CONFIG, seed=1, **CELL).sae
    assert same(first, again) and same(first, named) and not same(first, other)


@pytest.mark.parametrize("objective", ["state", "net", "relative"])
def test_a_store_gives_the_same_dictionary(objective, tmp_path):
    model, tokens = text()
    store = ActivationStore.write(tmp_path / "store", model, tokens, [source_of(objective, **CELL)])
    alone = train_objective(model, tokens, objective, config=CONFIG, **CELL).sae
    assert same(train_objective(model, tokens, objective, config=CONFIG, store=store, **CELL).sae, alone)


def test_what_the_objectives_differ_in_reaches_the_dictionary():
    model, tokens = text()
    names = [name for name in OBJECTIVES if OBJECTIVES[name].source == "write"]
    made = [train_objective(model, tokens, name, config=CONFIG, **CELL).sae.key_atoms for name in names]
    assert not any(torch.equal(a, b) for i, a in enumerate(made) for b in made[:i])


def test_bad_objectives_cells_and_budgets():
    model, tokens = text()
    with pytest.raises(ValueError, match="did you mean 'relative'"):
        train_objective(model, tokens, "relativ", **CELL)
    with pytest.raises(IndexError, match="layer 3 has no writes"):
        train_objective(model, tokens, "write", layer=3, head=0)
    with pytest.raises(IndexError, match="head 4 is out of range"):
        train_objective(model, tokens, "write", layer=1, head=4)
    with pytest.raises(ValueError, match="fewer than all steps=200, got 200"):
        train_objective(model, tokens, "relative_kl", config=ObjectiveConfig(steps=200), **CELL)
    assert ObjectiveConfig.from_dict(CONFIG.to_dict()) == CONFIG
