import json
from dataclasses import replace

import pytest
import torch

from hooked_recurrent.model import HookedRecurrentModel
from hooked_recurrent.zoo import corpus, train
from hooked_recurrent.zoo.recipes import Recipe, find_recipe
from hooked_recurrent.zoo.tokenizer import train_tokenizer
from hooked_recurrent.zoo.train import Cadence, Trainer, fixed_windows, lr_factor, random_windows

CADENCE = Cadence(log=2, checkpoint=4, heldout=4, heldout_tokens=64)


@pytest.fixture
def recipe(small_config) -> Recipe:
    return Recipe(small_config, steps=12, seq_len=16, batch=2, warmup=2, adam_lr=1e-2)


@pytest.fixture
def stream(small_tokenizer, few_files):
    return train.token_stream(small_tokenizer, few_files)


def fresh(recipe: Recipe, stream, folder) -> Trainer:
    torch.manual_seed(recipe.seed)
    return Trainer(HookedRecurrentModel(recipe.config), recipe, stream, folder, stream[:200], CADENCE)


def logged(folder) -> list[dict]:
    lines = (folder / train.LOG_NAME).read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def test_the_rate_is_a_trapezoid(small_config):
    recipe = Recipe(small_config, steps=1000, warmup=100, cooldown=0.4)
    assert lr_factor(0, recipe) == 0.01 and lr_factor(99, recipe) == 1 == lr_factor(600, recipe)
    assert lr_factor(800, recipe) == pytest.approx(0.5) and lr_factor(999, recipe) == pytest.approx(1 / 400)
    factors = [lr_factor(step, recipe) for step in range(1000)]
    assert all(0 < factor <= 1 for factor in factors) and factors == sorted(factors[:100]) + factors[100:]


def test_documents_are_joined_behind_their_starts(small_tokenizer, few_files, stream):
    assert (stream == 0).sum() == len(few_files) and stream[0] == 0
    text = small_tokenizer.decode(stream.tolist())
    assert text == "".join("<|endoftext|>" + file.text for file in few_files)


def test_windows_are_stretches_of_the_stream():
    stream = torch.arange(50, dtype=torch.int32)
    windows = random_windows(stream, 300, 10, torch.Generator().manual_seed(0))
    assert windows.dtype == torch.int64 and (windows.diff(dim=1) == 1).all()
    assert set(windows[:, 0].tolist()) == set(range(41))
    again = random_windows(stream, 300, 10, torch.Generator().manual_seed(0))
    assert torch.equal(windows, again)
    with pytest.raises(ValueError, match="50 tokens, fewer than one window of 51"):
        random_windows(stream, 1, 51, torch.Generator())


def test_the_heldout_sample_is_spread_and_fixed():
    stream = torch.arange(1000, dtype=torch.int32)
    windows = fixed_windows(stream, 64, 256)
    assert windows.shape == (4, 65) and windows[0, 0] == 0 and windows[-1, -1] == 999
    assert fixed_windows(stream, 64, 10_000).shape[0] == 15


def test_every_parameter_has_exactly_one_optimizer(small_config):
    model = HookedRecurrentModel(small_config)
    optimizers = train.make_optimizers(model, Recipe(small_config))
    owned = {name: [p for group in o.param_groups for p in group["params"]] for name, o in optimizers.items()}
    everything = [id(p) for params in owned.values() for p in params]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())
    muon = {id(p) for p in owned["muon"]}
    chosen = {name for name, p in model.named_parameters() if id(p) in muon}
    assert "blocks.0.mixer.qkv.weight" in chosen and "blocks.1.mlp.down.weight" in chosen
    assert not any(word in name for name in chosen for word in ("embed", "conv", "norm", "dt", "A_log", "ln"))


def test_the_model_learns(recipe, stream, tmp_path):
    trainer = fresh(replace(recipe, steps=40), stream, tmp_path)
    before = trainer.heldout_loss()
    trainer.run()
    assert trainer.heldout_loss() < before - 0.3
    lines = [line for line in logged(tmp_path) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(2, 41, 2)) and lines[-1]["tokens"] == 40 * 2 * 16


def test_a_stopped_run_goes_on_exactly(recipe, stream, tmp_path):
    whole = fresh(recipe, stream, tmp_path / "whole")
    whole.run()
    fresh(recipe, stream, tmp_path / "parts").run(stop_after=8)
    with (tmp_path / "parts" / train.LOG_NAME).open("a") as file:
        file.write('{"step": 10, "loss": 0.0, "tokens": 1, "lr": 0, "seconds": 0}\n{"step": 12, "lo')  # a cut-off line
    second = fresh(replace(recipe, seed=recipe.seed), stream, tmp_path / "parts")
    torch.nn.init.normal_(second.model.embed.weight)  # what was there before resuming must not matter
    second.resume()
    assert second.step == 8
    second.run()
    for (name, p), q in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


def test_another_seed_is_another_run(recipe, stream, tmp_path):
    losses = [fresh(replace(recipe, seed=seed), stream, tmp_path / str(seed)).train_step() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_recipes_are_found_by_name():
    assert find_recipe("tiny-gated-deltanet").config.model_name == "tiny-gated-deltanet"
    with pytest.raises(ValueError, match="no recipe called 'tiny-gated-deltanets'.*did you mean 'tiny-gated-deltanet'"):
        find_recipe("tiny-gated-deltanets")


def test_a_checkpoint_must_fall_on_a_log_line():
    with pytest.raises(ValueError, match="Cadence.checkpoint must be a multiple of log=10, got 25"):
        Cadence(checkpoint=25)


@pytest.fixture
def little_library(monkeypatch, few_files):
    def some(split="train", include_tests=False, folder=None):
        return few_files if split == "train" else few_files[:1]

    monkeypatch.setattr(corpus, "standard_library", some)
    monkeypatch.setattr(train, "train_tokenizer", lambda texts: train_tokenizer(texts, 400))


def test_the_command_makes_a_folder_that_loads(little_library, recipe, tmp_path):
    train.train("small", recipe, tmp_path, stop_after=6)
    with pytest.raises(ValueError, match="already holds a run: pass --resume"):
        train.train("small", recipe, tmp_path)
    with pytest.raises(ValueError, match="cannot resume: recipe.muon_lr was 0.02, is now 0.1"):
        train.train("small", replace(recipe, muon_lr=0.1), tmp_path, resume=True)
    train.train("small", recipe, tmp_path, resume=True)
    model = HookedRecurrentModel.from_pretrained(tmp_path)
    assert model.to_string(model.to_tokens("def f():\n    pass\n", prepend_bos=False)[0]) == "def f():\n    pass\n"
    record = json.loads((tmp_path / train.RECORD_NAME).read_text())
    assert record["recipe"]["steps"] == 12 and record["data"]["fingerprint"] == corpus.fingerprint(
        corpus.standard_library()
    )
    assert [line["step"] for line in logged(tmp_path) if "loss" in line][-1] == 12


def test_nothing_to_resume(little_library, recipe, tmp_path):
    with pytest.raises(ValueError, match="no tokenizer.json"):
        train.train("small", recipe, tmp_path, resume=True)
