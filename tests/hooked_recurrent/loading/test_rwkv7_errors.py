"""RWKV-7 checkpoints that do not fit, official and converted: one sentence that names the tensor, the key or the version."""

import json
import os
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.loading import rwkv7
from hooked_recurrent.zoo.recipes import RECIPES
from tests.hooked_recurrent.loading.official_rwkv7 import official_tensors
from tests.hooked_recurrent.loading.test_torch_checkpoint import Hostile

LORA = "model.layers.1.attn.v_lora.lora.0.weight"


def refuses(name, words, error=ValueError):
    with pytest.raises(error, match=words):
        HookedRecurrentModel.from_pretrained(name)


@pytest.fixture
def official(tmp_path):
    """Writes an official file with its tensors changed."""

    def write(change=lambda tensors: None, name="model.pth"):
        tensors = official_tensors()
        change(tensors)
        torch.save(tensors, tmp_path / name)
        return tmp_path / name

    return write


OFFICIAL = {
    "missing": (lambda t: t.pop("blocks.1.att.k_a"), "lacks 'blocks.1.att.k_a'$"),
    "missing size": (lambda t: t.pop("blocks.0.att.g1"), "lacks 'blocks.0.att.g1'; expected RWKV-7"),
    "missing heads": (lambda t: t.pop("blocks.0.att.r_k"), "lacks 'blocks.0.att.r_k'; expected RWKV-7"),
    "missing layer": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith("blocks.1.") and "v1" not in name],
        r"lacks 'blocks.1.[^']*', '[^']*', '[^']*' and \d+ more$",
    ),
    "surplus": (
        lambda t: t.update({"blocks.1.ffn.s_emb.weight": torch.ones(2)}),
        "does not know: 'blocks.1.ffn.s_emb.weight'",
    ),
    "unread elsewhere": (
        lambda t: t.update({"blocks.0.att.v3": torch.ones(2)}),
        "does not know: 'blocks.0.att.v3'$",
    ),
    "rank": (
        lambda t: t.update({"blocks.2.att.w1": torch.ones(128, 9)}),
        r"'blocks.2.att.w1' has shape \(128, 9\), its config asks for \(128, 16\)",
    ),
    "vector": (
        lambda t: t.update({"blocks.1.att.x_r": torch.ones(128)}),
        r"'blocks.1.att.x_r' has shape \(128,\), its config asks for \(1, 1, 128\)",
    ),
    "no matrix": (
        lambda t: t.update({"blocks.0.att.w1": torch.ones(128)}),
        r"'blocks.0.att.w1' .* shape \(128,\); expected a matrix",
    ),
    "heads": (
        lambda t: t.update({"blocks.0.att.r_k": torch.ones(2, 60)}),
        r"2 heads of width 60 \(blocks.0.att.r_k\), which do not fill the residual stream of width 128",
    ),
    "nan": (lambda t: t["blocks.2.att.w0"].view(-1)[7:8].fill_(torch.nan), "'blocks.2.att.w0' of .* holds NaN or Inf"),
    "inf": (lambda t: t["head.weight"][3:4].fill_(torch.inf), "'head.weight' of .* holds NaN or Inf"),
}


@pytest.mark.parametrize("case", OFFICIAL)
def test_official_files_that_do_not_fit(case, official, as_users_run):
    change, words = OFFICIAL[case]
    refuses(official(change), words)


OTHERS = {
    4: ("att.time_decay", "att.time_first", "att.time_mix_k", "ffn.key.weight"),
    5: ("att.time_decay", "att.time_faaaa", "att.time_mix_k", "att.ln_x.weight", "att.gate.weight", "ffn.key.weight"),
    6: ("att.time_decay", "att.time_faaaa", "att.time_maa_x", "att.ln_x.weight", "att.time_decay_w1", "ffn.key.weight"),
}


@pytest.mark.parametrize("version", OTHERS)
def test_other_versions_of_rwkv(version, tmp_path, as_users_run):
    names = ["emb.weight", "blocks.0.ln0.weight", *(f"blocks.0.{part}" for part in OTHERS[version]), "head.weight"]
    file = tmp_path / "model.pth"
    torch.save({name: torch.ones(4, 4) for name in names}, file)
    words = f"{file} is an RWKV-{version} checkpoint; expected RWKV-7 in RWKV-LM's layout (x070)"
    refuses(file, f"^{re.escape(words)}$")


def test_other_files(tmp_path, as_users_run):
    file = tmp_path / "model.pth"
    torch.save({f"layer{i}": torch.ones(2) for i in range(4)}, file)
    refuses(file, r"is no RWKV checkpoint: it holds 'layer0', 'layer1', 'layer2', \.\.\.; expected RWKV-7")
    torch.save({}, file)
    refuses(file, "it holds nothing; expected RWKV-7")
    torch.save({"model.layers.0.attn.r_k": torch.ones(2, 2)}, file)
    refuses(file, "is in transformers' layout, .*: give the folder that holds its config.json")
    (tmp_path / "model.gguf").write_text("GGUF")
    refuses(tmp_path / "model.gguf", "model.gguf is no file of weights .*; expected RWKV-7's .pth or .safetensors")
    (tmp_path / "model.safetensors").write_text("hello")
    refuses(tmp_path / "model.safetensors", "is not a whole safetensors file")


@pytest.mark.parametrize("name", ["nowhere.pth", "folder/nowhere.pth", "./nowhere.pth"])
def test_files_that_are_not_there(name, as_users_run):
    """None is taken for a repository of the hub."""
    refuses(name, f"'{name}' is neither a folder, .*, nor a file, nor bundled")


@pytest.mark.parametrize("keep", [100, 5000, -2000], ids=str)
def test_truncated_files(keep, official, as_users_run):
    file = official()
    file.write_bytes(file.read_bytes()[:keep])
    refuses(file, "model.pth was refused, and nothing in it was run: it is damaged")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_malicious_pickle_is_refused_and_runs_nothing(zipped, tmp_path, as_users_run):
    file, trap = tmp_path / "model.pth", tmp_path / "it ran"
    torch.save(official_tensors() | {"extra": Hostile(trap)}, file, _use_new_zipfile_serialization=zipped)
    words = (
        f"{file} was refused, and nothing in it was run: it asks for {os.mkdir.__module__}.mkdir, which is no tensor"
    )
    for name in (file, tmp_path):  # by its name, and as the only .pth of its folder
        refuses(name, f"^{re.escape(words)}$")
        assert not trap.exists()
    torch.load(file, weights_only=False)  # the trap is real
    assert trap.exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small model in transformers' layout."""
    torch.manual_seed(0)
    recipe = RECIPES["tiny-rwkv7"].config
    cfg = replace(recipe, d_vocab=32, d_mlp=64, layer_types=("rwkv7",) * 2, tied_embeddings=False)
    return HookedRecurrentModel(cfg).save_pretrained(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def changed(saved, tmp_path):
    """Writes it with its config and tensors changed."""

    def write(config=None, change=lambda tensors: None, without=()):
        tensors = load_file(saved / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        raw = json.loads((saved / "config.json").read_text()) | (config or {})
        (tmp_path / "config.json").write_text(json.dumps({key: raw[key] for key in raw if key not in without}))
        return tmp_path

    return write


CONFIGS = {
    "softmax layers": ({"attn": {"layers": [1], "num_heads": 2}}, r"softmax layers \(attn .*\) are not supported"),
    "activation": ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported, only 'sqrelu'"),
    "norm_first": ({"norm_first": False}, "norm_first=false is not supported"),
    "norm_bias": ({"norm_bias": False}, "norm_bias=false is not supported"),
    "value_dim": ({"value_dim": [128, 256]}, r"value_dim \[128, 256\] is not supported, only hidden_size 128"),
    "one value_dim": ({"value_dim": 256}, "value_dim 256 is not supported"),
    "attention width": ({"attention_hidden_size": 256}, "attention_hidden_size 256 is not supported"),
    "heads": ({"head_dim": 48}, r"heads of width 48 \(num_heads 4\) do not divide hidden_size 128"),
    "number of heads": ({"head_dim": None, "num_heads": 3}, r"heads of width 42 \(num_heads 3\) do not divide"),
    "no heads": ({"head_dim": None, "num_heads": None}, "has neither head_dim nor num_heads"),
    "no width": ({"hidden_size": None}, "this rwkv7 config has no hidden_size"),
    "rank": ({"v_low_rank_dim": 24}, rf"'{LORA}' has shape \(16, 128\), its config asks for \(24, 128\)"),
    "layers": ({"num_hidden_layers": 3}, r"lacks 'model.layers.2.[^']*', '[^']*', '[^']*' and \d+ more$"),
    "vocabulary": (
        {"vocab_size": 33},
        r"'model.embeddings.weight' has shape \(32, 128\), its config asks for \(33, 128\)",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_do_not_fit(case, changed, as_users_run):
    config, words = CONFIGS[case]
    refuses(changed(config), words)


TENSORS = {
    "missing": (lambda t: t.pop("model.layers.1.attn.x_a"), "lacks 'model.layers.1.attn.x_a'$"),
    "surplus": (lambda t: t.update({"model.extra": torch.ones(2)}), "does not know: 'model.extra'$"),
    "nan": (lambda t: t["model.norm.bias"].fill_(torch.nan), "'model.norm.bias' of .* holds NaN or Inf"),
    "shape": (
        lambda t: t.update({"model.layers.0.attn.r_k": torch.ones(2, 64)}),
        r"'model.layers.0.attn.r_k' has shape \(2, 64\), its config asks for \(4, 32\)",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(case, changed, as_users_run):
    change, words = TENSORS[case]
    refuses(changed(change=change), words)


def test_an_open_rank_that_no_tensor_tells(changed, as_users_run):
    folder = changed({"v_low_rank_dim": None}, lambda tensors: tensors.pop(LORA))
    refuses(folder, f"the config leaves v_low_rank_dim open, and {folder} lacks '{LORA}' to tell it")


def test_a_number_of_heads_says_their_width(changed):
    """As in fla: head_dim decides, num_heads only where it is missing; with neither class's defaults missing."""
    for config in ({"head_dim": None}, {"num_heads": None}, {"num_heads": 99}):
        mixer = HookedRecurrentModel.from_pretrained(changed(config)).cfg.mixer
        assert (mixer.n_heads, mixer.d_k) == (4, 32)
    bare = changed(
        without=["norm_eps", "norm_bias", "norm_first", "hidden_act", "value_dim", "attn", "tie_word_embeddings"]
    )
    cfg = HookedRecurrentModel.from_pretrained(bare).cfg
    assert (cfg.norm_eps, cfg.tied_embeddings) == (1e-5, False)


def test_models_that_the_layout_cannot_say_are_not_saved():
    cfg = RECIPES["tiny-rwkv7"].config
    for changes, words in (
        ({"embed_norm": False}, "the rwkv7 layout is an RWKV-7 mixer with .* this model differs"),
        ({"norm": "rms"}, "this model differs"),
        ({"d_mlp": None}, "this model differs"),
        ({"mixer": replace(cfg.mixer, n_heads=2)}, "residual stream of 128; this model has 2 heads of width 32 and 32"),
        ({"norm_eps": 1e-6}, "epsilon head width 32 x norm_eps 1e-06; this model does so with 0.00032"),
    ):
        with pytest.raises(ValueError, match=words):
            rwkv7.config_to_hf(replace(cfg, **changes))
