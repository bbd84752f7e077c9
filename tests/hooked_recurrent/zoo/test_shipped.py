"""The shipped model itself: a real language model, with memory worth studying, that transformers loads too."""

import pytest
import torch

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.loading.describe import describe_models
from hooked_recurrent.zoo.bundled import bundled_models
from hooked_recurrent.zoo.corpus import standard_library
from hooked_recurrent.zoo.evaluate import evaluate

NAME = "tiny-gated-deltanet"


@pytest.fixture(scope="module")
def model():
    return HookedRecurrentModel.from_pretrained(NAME)


@pytest.fixture(scope="module")
def evaluation(model):
    """Four held-out files of middling length; the card has the figures of all of them."""
    files = [file for file in standard_library("heldout") if 4_000 < file.n_bytes < 12_000][:4]
    assert files
    return evaluate(model, files)


def test_beats_xz_on_each_held_out_file(evaluation):
    assert evaluation.bits_per_byte < evaluation.xz_bits_per_byte_each_file
    for score in evaluation.files:
        assert score.bits < 8 * score.xz_bytes, score.name


def test_heads_remember_over_many_time_scales(evaluation):
    medians = sorted(life.median for life in evaluation.half_lives)
    assert medians[0] < 4
    assert medians[-1] > 64
    assert sum(median > 16 for median in medians) >= len(medians) / 3


def test_transformers_loads_it_and_agrees(model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = bundled_models()[NAME]
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def area(self):\n    return self.width * self."
    tokens = model.to_tokens(text)
    assert tokens[0, 1:].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
        ours = model(tokens)
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()  # float32


def test_description_is_read_off_the_files(model):
    row = next(row for row in describe_models() if row["name"] == NAME)
    assert row["parameters"] == model.parameter_count()
    assert (row["layers"], row["rule"]) == (model.cfg.n_layers, "gated_delta_net")
    assert (row["heads"], row["d_k"], row["d_v"]) == (model.cfg.n_heads, model.cfg.d_k, model.cfg.d_v)
