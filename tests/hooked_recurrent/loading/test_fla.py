"""delta_net, gla and kda: logits equal flash-linear-attention's (float32, random models that its own classes make and save).

Differences are largest absolute differences over the largest absolute logit.
"""

import json
import sys
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.loading import delta_net, gla, kda
from hooked_recurrent.loading.checkpoint import export
from tests.hooked_recurrent.loading.official_fla import CLASSES, logits_of, official, tokens_of, without_kernels
from tests.hooked_recurrent.models import distance, tiny_model

BOUND = 1e-5
LENGTHS = (1, 5, 64, 100)
FAMILIES = {"delta_net": delta_net, "gla": gla, "kda": kda}
VARIANTS = {
    "delta_net": {},
    "delta_net ungated": {"use_gate": False},
    "delta_net as released": {"use_gate": False, "expand_k": 1.0, "use_output_norm": True, "qk_norm": "l2"},
    "delta_net negative eigenvalues": {"allow_neg_eigval": True},
    "delta_net constant beta": {"use_beta": False},
    "delta_net tied": {"tie_word_embeddings": True, "conv_size": 3},
    "delta_net unfused": {"fuse_norm": False, "norm_eps": 1e-3},
    "gla": {},
    "gla without convolutions": {"use_short_conv": False},
    "gla groups": {"num_kv_heads": 2},
    "gla one group": {"num_kv_heads": 1, "use_short_conv": False},
    "gla ungated": {"use_output_gate": False},
    "gla limited decay": {"clamp_min": -0.04},
    "gla unfused": {"fuse_norm": False, "tie_word_embeddings": True},
    "gla default mlp": {"intermediate_size": None, "hidden_ratio": 9},
    "kda": {},
    "kda square heads": {"expand_v": 1.0},
    "kda grouped values": {"num_v_heads": 8},
    "kda bounded": {"lower_bound": -5.0, "safe_gate": True},
    "kda loosely bounded": {"lower_bound": -9.0},
    "kda negative eigenvalues": {"allow_neg_eigval": True},
    "kda tied": {"tie_word_embeddings": True},
}


def kind_of(variant):
    return variant.split()[0]


@lru_cache
def pair(variant):
    """Their model and ours, converted in memory; batches are always of 3 different texts."""
    theirs = official(kind_of(variant), **VARIANTS[variant])
    return theirs, HookedRecurrentModel.from_hf(theirs).requires_grad_(False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(variant, as_users_run):
    theirs, ours = pair(variant)
    for length in LENGTHS:
        tokens = tokens_of(3, length, seed=length)
        assert distance(ours(tokens), logits_of(theirs, tokens)) <= BOUND, length


@pytest.mark.parametrize("variant", ["delta_net", "gla", "gla without convolutions", "kda", "kda bounded"])
def test_logits_after_splitting_anywhere(variant, as_users_run):
    theirs, ours = pair(variant)
    tokens = tokens_of(3, 100)
    expected = logits_of(theirs, tokens)
    generator = torch.Generator().manual_seed(1)
    for cuts in ([99], [1, 2, 16, 64], torch.randint(1, 100, (6,), generator=generator).tolist()):
        edges = [0, *sorted(set(cuts)), 100]
        state, pieces = None, []
        for start, stop in zip(edges[:-1], edges[1:], strict=True):
            logits, state = ours(tokens[:, start:stop], state=state, return_state=True)
            pieces.append(logits)
        assert distance(torch.cat(pieces, dim=1), expected) <= BOUND, cuts


@pytest.mark.parametrize("kind", CLASSES)
def test_our_float64_model_agrees_with_both(kind, as_users_run):
    theirs, ours = pair(kind)
    exact = HookedRecurrentModel.from_hf(theirs).double()
    tokens = tokens_of(3, 100)
    reference = exact(tokens, backend="step")
    assert distance(exact(tokens), reference) <= 1e-10
    assert distance(ours(tokens).double(), reference) <= BOUND
    assert distance(logits_of(theirs, tokens).double(), reference) <= BOUND


@pytest.mark.parametrize("kind", CLASSES)
def test_every_part_matters(kind, as_users_run):
    """The comparison would see a wrong mixer, norm, memory, decay or erase: without any of them the logits are far off."""
    theirs, ours = pair(kind)
    tokens = tokens_of(3, 65)
    expected = logits_of(theirs, tokens)
    parts = ["hook_mixer_out", "hook_mlp_out"]
    parts += [f"mixer.hook_{role}" for role in ("q", "k", "v", "beta", "log_decay", "erase", "state", "z")]
    for name in (f"blocks.1.{part}" for part in parts):
        if name in ours.hook_dict and not (kind == "delta_net" and name.endswith("log_decay")):
            without = ours.run_with_hooks(tokens, fwd_hooks=[(name, lambda tensor, hook: 0 * tensor)])
            assert distance(without, expected) > 100 * BOUND, name


@pytest.mark.parametrize("kind", CLASSES)
def test_hidden_states_of_every_layer(kind, as_users_run):
    theirs, ours = pair(kind)
    tokens = tokens_of(3, 33)
    with without_kernels():
        hidden = theirs(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states
    _, cache = ours.run_with_cache(tokens)
    for layer in range(ours.cfg.n_layers):
        assert distance(cache[f"blocks.{layer}.hook_resid_pre"], hidden[layer]) <= BOUND
    assert distance(cache["ln_final.hook_normalized"], hidden[-1]) <= BOUND


@pytest.mark.parametrize("kind", CLASSES)
def test_narrow_weights_keep_a_float32_memory(kind, as_users_run):
    """bfloat16: as near to the float32 model of the same weights as theirs is; the states are float32."""
    theirs = official(kind, **VARIANTS[kind]).bfloat16()
    narrow = HookedRecurrentModel.from_hf(theirs).requires_grad_(False)
    tokens = tokens_of(3, 65)
    logits, state = narrow(tokens, return_state=True)
    assert logits.dtype == narrow.dtype == torch.bfloat16 and state.layers[0].matrix.dtype == torch.float32
    expected = HookedRecurrentModel.from_hf(theirs).float()(tokens)
    error = (logits.float() - expected).norm() / expected.norm()
    their_error = (logits_of(theirs, tokens).float() - expected).norm() / expected.norm()
    assert error <= 1.2 * their_error <= 0.1
    _, cache = narrow.run_with_cache(tokens, names_filter="blocks.0.mixer.hook_log_decay")
    assert cache["blocks.0.mixer.hook_log_decay"].dtype == torch.float32


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_by_them_read_by_us_and_back(variant, tmp_path, monkeypatch, as_users_run):
    theirs, ours = pair(variant)
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = tokens_of(3, 33)
    with monkeypatch.context() as patch:  # their package is not needed
        patch.setitem(sys.modules, "fla", None)
        read = HookedRecurrentModel.from_pretrained(tmp_path / "theirs")
        read.save_pretrained(tmp_path / "ours")
        again = HookedRecurrentModel.from_pretrained(tmp_path / "ours")
    assert replace(read.cfg, model_name=ours.cfg.model_name) == ours.cfg
    assert replace(again.cfg, model_name=ours.cfg.model_name) == ours.cfg
    assert torch.equal(read(tokens), ours(tokens)) and torch.equal(again(tokens), ours(tokens))
    model_class = CLASSES[kind_of(variant)][1]
    back, report = model_class.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert torch.equal(logits_of(back.eval(), tokens), logits_of(theirs, tokens))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layout_goes_there_and_back(variant):
    """export after fill gives the checkpoint's own tensors, bit by bit, so the two directions of each entry agree."""
    theirs, ours = pair(variant)
    tensors = theirs.state_dict()
    family = FAMILIES[kind_of(variant)]
    back = export(ours, family.entries(ours.cfg, list(tensors), family.SAVED_AS))
    if ours.cfg.tied_embeddings:
        tensors.pop("lm_head.weight")
    assert set(back) == set(tensors)
    for name, tensor in back.items():
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("kind", CLASSES)
def test_what_a_config_leaves_out_has_their_default(kind):
    """Only sizes in config.json: ours are then those of the config that their class makes of it."""
    family, config_class = FAMILIES[kind], CLASSES[kind][0]
    bare = family.config_from_mapping({"model_type": kind}, "bare")
    assert bare == family.config_from_mapping(config_class().to_dict(), "bare")
    assert bare.n_layers == 24 and bare.d_model == 2048


@pytest.mark.parametrize("d_k", [3, 6, 7, 44, 64, 86, 100])
def test_every_width_of_values_survives_the_config(d_k):
    """The file holds a ratio, of which readers take the whole part."""
    cfg = tiny_model(("kimi_delta_attention",) * 2).cfg
    for d_v in range(1, 2 * d_k + 1):
        made = replace(cfg, mixer=replace(cfg.mixer, d_k=d_k, d_v=d_v))
        written = kda.config_to_hf(made)
        assert kda.config_from_mapping(written, "unnamed").mixer == made.mixer
        assert int(d_k * written["expand_v"]) == d_v


REFUSED = {
    "delta_net softmax layers": ({"attn": {"layers": [1], "num_heads": 4}}, "softmax layers .attn .*layers.* are not"),
    "gla softmax layers": (
        {"attn": {"layers": [1], "num_heads": 4}},
        "this gla config cannot be loaded: softmax layers",
    ),
    "kda depth": ({"attnres_block_size": 2}, r"attention over the depth \(attnres_block_size 2\)"),
    "delta_net activation": ({"hidden_act": "powlu"}, "hidden_act 'powlu' is not supported, only 'swish'"),
    "delta_net qk activation": ({"qk_activation": "elu"}, "qk_activation 'elu' is not supported, only 'silu'"),
    "delta_net qk norm": ({"qk_norm": "sum"}, "qk_norm 'sum' is not supported, only 'l2'"),
    "delta_net convolutions": ({"use_short_conv": False}, "use_short_conv=false is not supported"),
    "kda convolutions": ({"use_short_conv": False}, "use_short_conv=false is not supported"),
    "gla feature map": ({"feature_map": "relu"}, "feature_map 'relu' is not supported"),
    "gla norm": ({"elementwise_affine": False}, "elementwise_affine=false is not supported"),
    "gla heads": ({"expand_k": 0.7}, "hidden_size 32 times expand_k 0.7 is 22.4, which is no whole width for 4 heads"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_configs_are_refused(case, tmp_path, as_users_run):
    changes, words = REFUSED[case]
    kind = kind_of(case)
    pair(kind)[0].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=words):
        HookedRecurrentModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [{"attnres_block_size": 2}, {"use_short_conv": False}], ids=str)
def test_what_models_in_memory_are_refused(change):
    with pytest.raises(ValueError, match="this kda config cannot be loaded"):
        HookedRecurrentModel.from_hf(official("kda", **change))


BROKEN = {
    "delta_net missing": (
        lambda t: t.pop("model.layers.1.attn.b_proj.weight"),
        "lacks 'model.layers.1.attn.b_proj.weight'",
    ),
    "gla surplus": (lambda t: t.update({"model.extra": torch.ones(32)}), "does not know: 'model.extra'"),
    "kda bias": (lambda t: t.pop("model.layers.2.attn.g_proj.1.bias"), "lacks 'model.layers.2.attn.g_proj.1.bias'"),
    "kda shape": (
        lambda t: t.update({"model.layers.0.attn.dt_bias": torch.ones(4)}),
        r"'model.layers.0.attn.dt_bias' has shape \(4,\), its config asks for \(24,\)",
    ),
    "gla nan": (lambda t: t["model.norm.weight"].fill_(torch.nan), "'model.norm.weight' .* holds NaN or Inf"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_checkpoints_that_do_not_fit(case, tmp_path, as_users_run):
    change, words = BROKEN[case]
    pair(kind_of(case))[0].save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=words):
        HookedRecurrentModel.from_pretrained(tmp_path)


UNSAYABLE = {
    "kimi_delta_attention": ({"lower_bound": -1.0, "gate_bias": False}, "bias on the output gate; this model has none"),
    "gated_linear_attention": ({}, "decay_rank 16 and decay_divisor 16.0; this model has 3 and 4.0"),
    "delta_net": ({"norm_eps": 1e-3}, "one epsilon for every norm; this model has several"),
}


@pytest.mark.parametrize("rule", UNSAYABLE)
def test_a_model_that_the_layout_cannot_say_is_not_saved(rule, tmp_path, as_users_run):
    changes, words = UNSAYABLE[rule]
    model = tiny_model((rule, rule), dtype=torch.float32)
    model.cfg = replace(model.cfg, mixer=replace(model.cfg.mixer, **changes))
    with pytest.raises(ValueError, match=words):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("changes", [{"norm_offset": 1.0}, {"d_mlp": None}, {"residual_in_fp32": True}], ids=str)
def test_blocks_that_the_layouts_do_not_have_are_not_saved(changes):
    cfg = replace(tiny_model(("delta_net",) * 2).cfg, **changes)
    with pytest.raises(ValueError, match="plain RMSNorms and a SwiGLU in every block; this model differs"):
        delta_net.config_to_hf(cfg)
