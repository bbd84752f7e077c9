"""Checkpoints that do not fit: each one is answered by one sentence that names the tensor, the file or the layer."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hooked_recurrent import AttentionConfig, HookedRecurrentModel
from hooked_recurrent.loading import load, qwen
from hooked_recurrent.loading.checkpoint import MemoryCheckpoint, export
from tests.hooked_recurrent.loading.official import MODELS, qwen3_5, qwen3_next, sizes, text_model
from tests.hooked_recurrent.models import HYBRID, tiny_config, tiny_model

KEY = "model.layers.1.linear_attn.A_log"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    text_model(layers="hybrid").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, original):
    """A fresh copy that a test may spoil."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((original / name).read_bytes())
    return tmp_path


def refuses(folder, words, error=ValueError):
    with pytest.raises(error, match=words):
        HookedRecurrentModel.from_pretrained(folder)


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reconfigure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_tensor(folder):
    rewrite(folder, lambda tensors: tensors.pop(KEY))
    refuses(folder, f"lacks '{KEY}'$")


def test_many_missing_tensors_are_counted(folder):
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.0." in name])
    refuses(folder, r"lacks 'model.layers.0[^']*', '[^']*', '[^']*' and \d+ more$")


def test_surplus_tensor(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.9.mystery": torch.zeros(1)}))
    refuses(folder, "has tensors that this model does not know: 'model.layers.9.mystery'")


def test_renamed_tensor(folder):
    rewrite(folder, lambda tensors: tensors.update({KEY.replace("A_log", "A_logs"): tensors.pop(KEY)}))
    refuses(folder, f"lacks '{KEY}' \\(it has '{KEY}s'\\) and has tensors that this model does not know: '{KEY}s'")


@pytest.mark.parametrize(
    "name", [KEY, "model.layers.3.self_attn.q_proj.weight", "model.layers.0.linear_attn.conv1d.weight"]
)
def test_wrong_shape(folder, name):
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(3, 7)}))
    refuses(folder, rf"tensor '{name}' has shape \(3, 7\), its config asks for \(\d+")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_tensors_that_are_not_finite(folder, bad):
    rewrite(folder, lambda tensors: tensors[KEY].fill_(bad))
    refuses(folder, f"tensor '{KEY}' of .* holds NaN or Inf")


def test_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refuses(folder, "model.safetensors is not a whole safetensors file")


def test_no_safetensors_at_all(folder):
    (folder / "model.safetensors").write_text("hello")
    refuses(folder, "is not a whole safetensors file")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuses(folder, "pytorch_model.bin was refused, and nothing in it was run")
    (folder / "pytorch_model.bin").rename(folder / "weights.h5")
    refuses(folder, "holds no model.safetensors .*; it holds config.json, weights.h5", FileNotFoundError)


@pytest.fixture
def shards(tmp_path):
    text_model(layers="linear").save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


def test_missing_shard(shards):
    (shards / "model-00002-of-00003.safetensors").unlink(missing_ok=True)
    gone = sorted(shards.glob("model-*.safetensors"))[0]
    gone.unlink()
    refuses(shards, f"lacks the shards .*{gone.name}.* that its index names", FileNotFoundError)


def test_truncated_shard(shards):
    shard = sorted(shards.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])
    refuses(shards, f"{shard.name} is not a whole safetensors file")


def test_an_index_that_names_the_wrong_shard(shards):
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    others = sorted(set(index["weight_map"].values()) - {index["weight_map"][KEY]})
    index["weight_map"][KEY] = others[0]
    path.write_text(json.dumps(index))
    refuses(shards, f"holds no tensor '{KEY}', though its index says so")


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": {}}'])
def test_an_index_that_is_none(shards, text):
    (shards / "model.safetensors.index.json").write_text(text)
    refuses(shards, "model.safetensors.index.json is no index of shards")


def test_no_config(folder):
    (folder / "config.json").unlink()
    refuses(folder, "has no config.json", FileNotFoundError)


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_config_that_is_none(folder, text):
    (folder / "config.json").write_text(text)
    refuses(folder, "config.json is no model config")


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("llama", "model type 'llama' is not supported; known are qwen3_5, qwen3_5_text, qwen3_next"),
        ("qwen3_5_moe", "model type 'qwen3_5_moe' is not supported; .*; the nearest is 'qwen3_5"),
        ("qwen3_nxt", "the nearest is 'qwen3_next'"),
        (None, "model type None is not supported"),
    ],
)
def test_unknown_model_type(folder, model_type, words):
    reconfigure(folder, model_type=model_type)
    refuses(folder, words)


def test_unknown_model_type_in_memory():
    model = text_model()
    model.config.model_type = "gpt2"
    with pytest.raises(ValueError, match="model type 'gpt2' is not supported"):
        HookedRecurrentModel.from_hf(model)


def next_config(**options):
    return qwen3_next.Qwen3NextConfig(**sizes("hybrid"), num_experts_per_tok=2, moe_intermediate_size=8, **options)


def test_mixtures_of_experts_are_refused_by_layer():
    model = qwen3_next.Qwen3NextForCausalLM(next_config(num_experts=4, mlp_only_layers=[0], decoder_sparse_step=1))
    with pytest.raises(ValueError, match="layer 1's MLP is a mixture of 4 experts; only dense MLPs are supported"):
        HookedRecurrentModel.from_hf(model)
    sparse_never = next_config(num_experts=4, mlp_only_layers=[0, 1, 2, 3])
    assert qwen.config_from_hf(sparse_never, "dense after all").n_layers == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "of type 'linear' are not supported",
        ),
        (
            {"layer_types": ["linear_attention", "sliding_attention", "full_attention", "full_attention"]},
            "sliding_attention",
        ),
    ],
)
def test_what_the_family_leaves_out_is_refused_by_name(changes, words):
    config = qwen3_5.Qwen3_5TextConfig(**sizes("hybrid"))
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match=words):
        qwen.config_from_hf(config, "model")


def test_unknown_names(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "bundled_models", lambda: {"tiny-gated-deltanet": tmp_path})
    for name, words in (
        ("tiny-gated-deltnet", "neither a folder, .* nor bundled .*; did you mean 'tiny-gated-deltanet'"),
        ("./nowhere", "'./nowhere' is neither a folder"),
        (tmp_path / "nowhere", "nowhere' is neither a folder"),
        ("a/b/c", "'a/b/c' is neither a folder, nor a hub name 'owner/name'"),
        ("", "'' is neither a folder"),
    ):
        with pytest.raises(ValueError, match=words):
            HookedRecurrentModel.from_pretrained(name)


def test_a_bundled_name_leads_to_its_folder(folder, monkeypatch):
    monkeypatch.setattr(load, "bundled_models", lambda: {"tiny-gated-deltanet": folder})
    model = HookedRecurrentModel.from_pretrained("tiny-gated-deltanet")
    assert model.cfg.model_name == "tiny-gated-deltanet"


def test_a_hub_that_cannot_be_reached():
    with pytest.raises(ValueError, match="could not fetch 'nobody/nothing' from the hub"):
        HookedRecurrentModel.from_pretrained("nobody/nothing")


def test_a_hub_name_is_fetched(folder, monkeypatch):
    import huggingface_hub

    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert HookedRecurrentModel.from_pretrained("owner/name").cfg.model_name == "owner/name"
    assert asked == [("owner/name", load.HUB_FILES)] and not any("bin" in pattern for pattern in load.HUB_FILES)


def test_an_entry_that_fills_nothing_is_noticed(monkeypatch):
    """A family file that forgot one of our weights: fill says which."""
    model = text_model()
    entries = qwen.entries

    def forgetful(cfg, names, model_type):
        return (entry for entry in entries(cfg, names, model_type) if "A_log" not in entry.theirs)

    checkpoint = MemoryCheckpoint({n: t for n, t in model.state_dict().items() if "A_log" not in n}, "memory")
    monkeypatch.setattr(qwen, "entries", forgetful)
    with pytest.raises(
        ValueError, match="no checkpoint tensor is assigned to blocks.0.mixer.A_log, blocks.1.mixer.A_log"
    ):
        cfg = qwen.config_from_hf(model.config, "model")
        load._build(model.config.model_type, cfg, checkpoint, None, torch.float32, "cpu")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("value_heads", [2, 4])
def test_every_layout_goes_there_and_back(kind, value_heads):
    """export after fill gives the checkpoint's own tensors, bit by bit, so the two directions of each entry agree."""
    theirs = MODELS[kind](layers="hybrid", value_heads=value_heads, attention_bias=True)
    ours = HookedRecurrentModel.from_hf(theirs)
    tensors = theirs.state_dict()
    entries = qwen.entries(ours.cfg, list(tensors), theirs.config.model_type)
    back = export(ours, entries)
    assert {name for name in tensors if not qwen.ignored(name)} == set(back)
    for name, tensor in back.items():
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("d_head", [6, 44, 52, 86, 256])
def test_every_rotary_width_survives_the_config(d_head):
    """The file holds a fraction, of which readers take the whole part: no even width may lose two dimensions on the way."""
    for rotary_dims in range(0, d_head + 1, 2):
        attention = AttentionConfig(n_heads=4, n_key_value_heads=2, d_head=d_head, rotary_dims=rotary_dims)
        written = qwen.config_to_hf(replace(tiny_config(HYBRID), attention=attention))
        read = qwen.config_from_hf(qwen3_5.Qwen3_5TextConfig(**written), "unnamed")
        assert read.attention == attention


def test_a_model_that_the_layout_cannot_say_is_not_saved(tmp_path):
    model = tiny_model(HYBRID)
    object.__setattr__(model.cfg, "norm_eps", 1e-3)
    with pytest.raises(ValueError, match="one epsilon for every norm; this model has several"):
        model.save_pretrained(tmp_path / "model")
