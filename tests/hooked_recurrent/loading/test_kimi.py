"""Kimi Linear without softmax layers and experts: logits equal transformers' (float32, random models of its own class).

Differences are largest absolute differences over the largest absolute logit.
"""

import json
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM

from hooked_recurrent import HookedRecurrentModel
from tests.hooked_recurrent.models import distance, tiny_model

BOUND = 1e-5
VOCABULARY = 101
LENGTHS = (1, 5, 64, 100, 129)


def config(**changes):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    sizes |= {"linear_num_heads": 4, "linear_head_dim": 6, "layer_types": ["linear_attention"] * 3}
    sizes |= {"mlp_layer_types": ["dense"] * 3, "initializer_range": 0.2, "num_local_experts": 4}
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return KimiLinearConfig(**(sizes | tokens | changes))


def official(**changes):
    """A KimiLinearForCausalLM of which every layer has work to do, with memories of many lengths."""
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(config(**changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("dt_bias"):
                weight.uniform_(-5.0, 0.0)
            elif name.endswith("A_log"):
                weight.uniform_(-1.0, 1.0)
            elif name.endswith("embed_tokens.weight"):
                weight.normal_(std=1.0)
            elif weight.ndim == 1:
                weight.add_(0.3 * torch.randn_like(weight))
    return model.eval().requires_grad_(False)


@lru_cache
def pair():
    theirs = official()
    return theirs, HookedRecurrentModel.from_hf(theirs).requires_grad_(False)


def logits_of(model, tokens):
    return model(input_ids=tokens, use_cache=False).logits


def tokens_of(batch, length, seed=0):
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_logits(as_users_run):
    theirs, ours = pair()
    for length in LENGTHS:
        tokens = tokens_of(3, length, seed=length)
        assert distance(ours(tokens), logits_of(theirs, tokens)) <= BOUND, length


def test_logits_after_splitting_anywhere(as_users_run):
    theirs, ours = pair()
    tokens = tokens_of(3, 129)
    expected = logits_of(theirs, tokens)
    for cuts in ([128], [1, 2, 16, 64], [3, 50, 51, 90]):
        state, pieces = None, []
        for start, stop in zip([0, *cuts], [*cuts, 129], strict=True):
            logits, state = ours(tokens[:, start:stop], state=state, return_state=True)
            pieces.append(logits)
        assert distance(torch.cat(pieces, dim=1), expected) <= BOUND, cuts


def test_forty_greedy_tokens(as_users_run):
    """use_cache=False: their cache cannot tell its length without a softmax layer."""
    theirs, ours = pair()
    tokens = tokens_of(3, 20)
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "use_cache": False}
    expected = theirs.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options)
    out = ours.generate(tokens, max_new_tokens=40)
    assert torch.equal(out, expected)
    best = ours(out[:, :-1])[:, 19:].topk(2, dim=-1).values
    assert (best[..., 0] - best[..., 1]).min() > 1e-5  # no near tie, so the comparison is not decided by rounding


def test_saved_by_them_read_by_us_and_back(tmp_path, as_users_run):
    theirs, ours = pair()
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = tokens_of(3, 33)
    read = HookedRecurrentModel.from_pretrained(tmp_path / "theirs")
    assert replace(read.cfg, model_name=ours.cfg.model_name) == ours.cfg
    assert torch.equal(read(tokens), ours(tokens))
    read.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "kimi_linear"
    back, report = KimiLinearForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert torch.equal(logits_of(back, tokens), logits_of(theirs, tokens))
    again = HookedRecurrentModel.from_pretrained(tmp_path / "ours")
    assert again.cfg.mixer == ours.cfg.mixer and torch.equal(again(tokens), ours(tokens))


def test_the_config_of_published_checkpoints(tmp_path, as_users_run):
    """Theirs names layers from 1 on in `linear_attn_config` and the dense MLPs by `first_k_dense_replace`."""
    _, ours = pair()
    ours.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for name in ("layer_types", "mlp_layer_types", "linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim"):
        del values[name]
    linear = {
        "num_heads": 4,
        "head_dim": 6,
        "short_conv_kernel_size": 4,
        "kda_layers": [1, 2, 3],
        "full_attn_layers": [],
    }
    path.write_text(json.dumps(values | {"linear_attn_config": linear, "first_k_dense_replace": 3}))
    assert torch.equal(HookedRecurrentModel.from_pretrained(tmp_path)(tokens_of(2, 9)), ours(tokens_of(2, 9)))
    path.write_text(json.dumps(values | {"linear_attn_config": linear, "first_k_dense_replace": 1}))
    with pytest.raises(ValueError, match="layer 1's MLP is a mixture of 256 experts"):
        HookedRecurrentModel.from_pretrained(tmp_path)


def test_models_that_kimi_linear_does_not_have_are_saved_as_kda(tmp_path):
    model = tiny_model(("kimi_delta_attention",) * 2, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "kda"


REFUSED = {
    "softmax": (
        {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        r"layer 1 is a softmax layer \(multi-head latent attention, 'full_attention'\)",
    ),
    "experts": (
        {"mlp_layer_types": ["dense", "dense", "sparse"]},
        r"layer 2's MLP is a mixture of 4 experts \('sparse'\); only dense MLPs are supported",
    ),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings=true is not supported"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, tmp_path, as_users_run):
    changes, words = REFUSED[case]
    pair()[0].save_pretrained(tmp_path)
    config(**changes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        HookedRecurrentModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        model = official()
        model.config = config(**changes)
        HookedRecurrentModel.from_hf(model)


@pytest.mark.parametrize("gone", [True, False], ids=["missing", "surplus"])
def test_checkpoints_that_do_not_fit(gone, tmp_path, as_users_run):
    pair()[1].save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.f_a_proj.weight"
    if gone:
        del tensors[name]
    else:
        tensors["model.layers.1.self_attn.g_proj.weight"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    words = f"lacks '{name}'" if gone else "does not know: 'model.layers.1.self_attn.g_proj.weight'"
    with pytest.raises(ValueError, match=words):
        HookedRecurrentModel.from_pretrained(tmp_path)
