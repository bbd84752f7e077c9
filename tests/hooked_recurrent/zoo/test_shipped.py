"""The shipped models themselves: real language models, with memories worth studying, that other libraries load too."""

import pytest
import torch

from hooked_recurrent import HookedRecurrentModel, RecurrentState
from hooked_recurrent.loading.describe import describe_models
from hooked_recurrent.zoo.bundled import bundled_models
from hooked_recurrent.zoo.corpus import standard_library
from hooked_recurrent.zoo.evaluate import evaluate
from hooked_recurrent.zoo.recipes import RECIPES
from tests.hooked_recurrent.loading.official_rwkv7 import fla_model, run_fla

RULES = {"tiny-gated-deltanet": "gated_delta_net", "tiny-mamba2": "mamba2", "tiny-rwkv7": "rwkv7"}


@pytest.fixture(scope="module", params=RULES)
def model(request):
    return HookedRecurrentModel.from_pretrained(request.param)


@pytest.fixture(scope="module")
def evaluation(model):
    """Four held-out files of middling length; the card has the figures of all of them."""
    files = [file for file in standard_library("heldout") if 4_000 < file.n_bytes < 12_000][:4]
    assert files
    return evaluate(model, files)


def test_every_recipe_is_shipped():
    assert list(bundled_models()) == list(RULES) == list(RECIPES)
    for name, recipe in RECIPES.items():
        assert recipe.config.mixer.rule == RULES[name] and recipe.config.model_name == name


def test_beats_xz_on_each_held_out_file(evaluation):
    assert evaluation.bits_per_byte < evaluation.xz_bits_per_byte_each_file
    for score in evaluation.files:
        assert score.bits < 8 * score.xz_bytes, score.name


def test_heads_remember_over_many_time_scales(evaluation):
    medians = sorted(life.median for life in evaluation.half_lives)
    assert medians[0] < 4
    assert medians[-1] > 64
    assert sum(median > 16 for median in medians) >= len(medians) / 4


def logits_of_others(name, tokens):
    """What the official class makes of the shipped folder."""
    folder = bundled_models()[name]
    if RULES[name] == "rwkv7":
        theirs, report = fla_model(folder)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        return run_fla(theirs, tokens)
    import transformers

    # by its own name: flash-linear-attention, once imported, answers for "mamba2"
    official = {"mamba2": transformers.Mamba2ForCausalLM, "gated_delta_net": transformers.Qwen3_5ForCausalLM}
    with torch.no_grad():
        return official[RULES[name]].from_pretrained(folder).eval()(tokens, use_cache=False).logits


def test_the_official_class_loads_it_and_agrees(model):
    from transformers import AutoTokenizer

    name = model.cfg.model_name
    tokenizer = AutoTokenizer.from_pretrained(bundled_models()["tiny-mamba2"])  # one tokenizer for all
    text = "def area(self):\n    return self.width * self."
    tokens = model.to_tokens(text)
    assert tokens[0, 1:].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = logits_of_others(name, tokens)
    with torch.no_grad():
        ours = model(tokens)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()  # float32


def test_it_goes_on_from_a_saved_state(model, tmp_path):
    """Hooks fire in the continuation as they did in the whole text."""
    tokens = model.to_tokens("class Reader:\n    def read(self, size):\n        return self.buffer[:size]\n")
    name = "blocks.2.mixer.hook_write_value"
    whole, cache = model.run_with_cache(tokens, names_filter=name)
    _, state = model(tokens[:, :9], return_state=True)
    state = RecurrentState.load(state.save(tmp_path / "state.safetensors"))
    rest, more = model.run_with_cache(tokens[:, 9:], names_filter=name, state=state)
    assert (rest - whole[:, 9:]).abs().max() <= 1e-5 * whole.abs().max()  # float32
    assert (more[name] - cache[name][:, 9:]).abs().max() <= 1e-5 * cache[name].abs().max()


def test_description_is_read_off_the_files(model):
    row = next(row for row in describe_models() if row["name"] == model.cfg.model_name)
    assert row["parameters"] == model.parameter_count()
    assert (row["layers"], row["rule"]) == (model.cfg.n_layers, RULES[model.cfg.model_name])
    assert (row["heads"], row["d_k"], row["d_v"]) == (model.cfg.n_heads, model.cfg.d_k, model.cfg.d_v)
