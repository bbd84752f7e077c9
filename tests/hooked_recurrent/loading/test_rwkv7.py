"""RWKV-7: logits equal those of the rwkv package, rwkv7_hf and flash-linear-attention (float32, random official checkpoints).

Differences are largest absolute differences over the largest absolute logit (or number of a state). The issue's bound is
1e-4, the aim 1e-5.
"""

import json
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from hooked_recurrent import HookedRecurrentModel, LayerState, RecurrentState
from hooked_recurrent.zoo.recipes import RECIPES
from hooked_recurrent.zoo.tokenizer import train_tokenizer
from tests.hooked_recurrent.loading.official_rwkv7 import (
    RANKS,
    VOCABULARY,
    convert,
    fla_model,
    official_tensors,
    run_fla,
    run_rwkv,
    tokens_of,
)
from tests.hooked_recurrent.models import distance

BOUND = 1e-5
HEADS = (64, 32)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Per head width: the .pth file, our model of it, and the rwkv package's."""
    folder = tmp_path_factory.mktemp("official")

    @lru_cache
    def of(d_head):
        file = folder / f"head-{d_head}.pth"
        torch.save(official_tensors(d_head), file)
        return file, HookedRecurrentModel.from_pretrained(file).requires_grad_(False), run_rwkv(file)

    return of


@pytest.fixture(scope="module")
def converted(official, tmp_path_factory):
    """Per head width: the folder that rwkv7_hf makes of the file, our model of it, and rwkv7_hf's."""
    folder = tmp_path_factory.mktemp("converted")

    @lru_cache
    def of(d_head):
        from rwkv7_hf import NativeRWKV7ForCausalLM

        saved = convert(official(d_head)[0], folder / f"head-{d_head}")
        theirs = NativeRWKV7ForCausalLM.from_pretrained(saved).eval().requires_grad_(False)
        return saved, HookedRecurrentModel.from_pretrained(saved).requires_grad_(False), theirs

    return of


def state_distance(ours, theirs):
    """Largest distance of any part of the two states; theirs keeps the matrix transposed."""
    pairs = []
    for layer, (shift, matrix, mlp) in zip(ours.layers, zip(*[iter(theirs)] * 3, strict=True), strict=True):
        pairs += [(layer.matrix[0], matrix.mT), (layer.shift_tail[0, 0], shift), (layer.mlp_tail[0, 0], mlp)]
    return max(distance(mine, other) for mine, other in pairs)


@pytest.mark.parametrize("length", [1, 17, 300])
@pytest.mark.parametrize("d_head", HEADS)
def test_the_rwkv_packages_logits_and_states(d_head, length, official, as_users_run):
    _, ours, run = official(d_head)
    tokens = tokens_of(length, seed=length)
    expected, their_state = run(tokens[0].tolist())
    logits, state = ours(tokens, return_state=True)
    assert distance(logits[0], expected) <= BOUND
    assert state_distance(state, their_state) <= BOUND


@pytest.mark.parametrize("cuts", [[1], [299], [17, 18, 64, 200], [150]], ids=str)
def test_logits_and_states_after_splitting(cuts, official, as_users_run):
    _, ours, run = official(64)
    tokens = tokens_of(300)
    expected, their_state = run(tokens[0].tolist())
    state, pieces = None, []
    for start, stop in zip([0, *cuts], [*cuts, 300], strict=True):
        logits, state = ours(tokens[:, start:stop], state=state, return_state=True)
        pieces.append(logits)
    assert distance(torch.cat(pieces, dim=1)[0], expected) <= BOUND
    assert state_distance(state, their_state) <= BOUND


def test_states_handed_from_one_library_to_the_other(official, as_users_run):
    """We go on from the rwkv package's state, and it goes on from ours: the logits are those of the whole text."""
    _, ours, run = official(64)
    tokens = tokens_of(120)
    expected, _ = run(tokens[0].tolist())
    _, theirs = run(tokens[0, :50].tolist())
    layers = [
        LayerState(
            matrix=theirs[3 * layer + 1].mT[None].clone(),
            shift_tail=theirs[3 * layer].view(1, 1, -1).clone(),
            mlp_tail=theirs[3 * layer + 2].view(1, 1, -1).clone(),
        )
        for layer in range(ours.cfg.n_layers)
    ]
    assert distance(ours(tokens[:, 50:], state=RecurrentState(tuple(layers), 50))[0], expected[50:]) <= BOUND
    _, state = ours(tokens[:, :50], return_state=True)
    handed = []
    for layer in state.layers:
        handed += [layer.shift_tail[0, 0].clone(), layer.matrix[0].mT.contiguous(), layer.mlp_tail[0, 0].clone()]
    logits, _ = run(tokens[0, 50:].tolist(), handed)
    assert distance(logits, expected[50:]) <= BOUND


def test_every_tensor_matters(official, as_users_run):
    """The comparison would see any tensor of the middle layer read wrongly: reversed, it moves the logits by far more."""
    file, ours, _ = official(64)
    tokens = tokens_of(65)
    changed = HookedRecurrentModel.from_pretrained(file).requires_grad_(False)
    for name, weight in changed.named_parameters():
        if name.startswith(("blocks.1.", "ln_embed.")):
            kept = weight.clone()
            weight.copy_(kept.flatten().flip(0).view_as(kept))
            assert distance(changed(tokens), ours(tokens)) > 50 * BOUND, name
            weight.copy_(kept)
    assert torch.equal(changed(tokens), ours(tokens))


@pytest.mark.parametrize("d_head", HEADS)
def test_the_config_is_read_off_the_tensors(d_head, official):
    file, ours, _ = official(d_head)
    cfg, mixer = ours.cfg, ours.cfg.mixer
    assert (cfg.d_model, cfg.d_vocab, cfg.d_mlp, cfg.n_layers) == (128, VOCABULARY, 256, 3)
    assert (mixer.n_heads, mixer.d_k, mixer.d_v) == (128 // d_head, d_head, d_head)
    ranks = {"w": mixer.decay_rank, "a": mixer.iclr_rank, "v": mixer.value_rank, "g": mixer.gate_rank}
    assert ranks == RANKS
    assert (cfg.norm_eps, mixer.norm_eps, cfg.tied_embeddings) == (1e-5, 64e-5, False)
    assert cfg.model_name == str(file) and not ours.training and ours.tokenizer is None


def test_the_ways_to_name_a_file(official, tmp_path, monkeypatch):
    """As text, from the home folder, as the only .pth of a folder, and as safetensors: the same model."""
    file, ours, _ = official(64)
    tensors = torch.load(file, weights_only=True)
    (tmp_path / "only.pth").write_bytes(file.read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [str(file), "~/only.pth", tmp_path, str(tmp_path)]
    monkeypatch.chdir(tmp_path)
    names.append("only.pth")
    (tmp_path / "other").mkdir()
    save_file(tensors, tmp_path / "other" / "weights.safetensors")
    names.append(tmp_path / "other" / "weights.safetensors")
    tokens = tokens_of(9)
    for name in names:
        assert torch.equal(HookedRecurrentModel.from_pretrained(name)(tokens), ours(tokens)), name
    (tmp_path / "second.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="several checkpoints: name one of only.pth, second.pth"):
        HookedRecurrentModel.from_pretrained(tmp_path)


def test_what_the_first_layer_does_not_read_may_be_missing(official, tmp_path):
    file, ours, _ = official(64)
    tensors = torch.load(file, weights_only=True)
    for name in ("v0", "v1", "v2"):
        del tensors[f"blocks.0.att.{name}"]
    torch.save(tensors, tmp_path / "model.pth")
    tokens = tokens_of(9)
    assert torch.equal(HookedRecurrentModel.from_pretrained(tmp_path / "model.pth")(tokens), ours(tokens))


def test_a_single_layer(tmp_path):
    torch.save(official_tensors(n_layers=1), tmp_path / "model.pth")
    ours = HookedRecurrentModel.from_pretrained(tmp_path / "model.pth").requires_grad_(False)
    tokens = tokens_of(17)
    assert distance(ours(tokens)[0], run_rwkv(tmp_path / "model.pth")(tokens[0].tolist())[0]) <= BOUND


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_the_dtype_argument_decides(stored, tmp_path):
    tensors = {name: tensor.to(stored) for name, tensor in official_tensors().items()}
    file = tmp_path / "model.pth"
    torch.save(tensors, file)
    tokens = tokens_of(17)
    wide = HookedRecurrentModel.from_pretrained(file).requires_grad_(False)
    assert {weight.dtype for weight in wide.parameters()} == {torch.float32}
    assert distance(wide(tokens)[0], run_rwkv(file)(tokens[0].tolist())[0]) <= BOUND
    narrow = HookedRecurrentModel.from_pretrained(file, dtype=stored).requires_grad_(False)
    assert narrow.dtype == stored and torch.equal(
        narrow.blocks[1].mixer.decay.bias, tensors["blocks.1.att.w0"].flatten()
    )
    exact = HookedRecurrentModel.from_pretrained(file, dtype=torch.float64).requires_grad_(False)
    assert distance(wide(tokens).double(), exact(tokens)) <= BOUND
    for weight in narrow.parameters():
        assert weight.is_contiguous()


@pytest.mark.parametrize("length", [1, 17, 300])
@pytest.mark.parametrize("d_head", HEADS)
def test_rwkv7_hf_gives_the_same_logits(d_head, length, converted, as_users_run):
    _, ours, theirs = converted(d_head)
    assert ours.cfg.mixer.d_k == d_head and ours.cfg.mixer.norm_eps == d_head * 1e-5
    tokens = tokens_of(length, batch=2, seed=length)
    assert distance(ours(tokens), theirs(input_ids=tokens, use_cache=False).logits) <= BOUND


def test_official_and_converted_are_one_model(official, converted):
    """At a head width of 64 all layouts mean the same; at others rwkv7_hf's converter changes an epsilon, and we obey it."""
    tokens = tokens_of(40)
    assert torch.equal(official(64)[1](tokens), converted(64)[1](tokens))
    assert replace(official(64)[1].cfg, model_name="", n_ctx=1) == replace(converted(64)[1].cfg, model_name="", n_ctx=1)
    assert official(32)[1].cfg.mixer.norm_eps == 2 * converted(32)[1].cfg.mixer.norm_eps


@pytest.mark.parametrize("d_head", HEADS)
@pytest.mark.parametrize("length", [1, 17, 100])
def test_fla_gives_the_same_logits(d_head, length, converted, as_users_run):
    folder, ours, _ = converted(d_head)
    theirs, report = fla_model(folder)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens = tokens_of(length, batch=2, seed=length)
    assert distance(ours(tokens), run_fla(theirs, tokens)) <= BOUND
    again = HookedRecurrentModel.from_hf(theirs).requires_grad_(False)
    assert torch.equal(again(tokens), ours(tokens))


def random_model(cfg):
    """A model of this config in which no weight keeps its first value."""
    torch.manual_seed(0)
    model = HookedRecurrentModel(cfg).requires_grad_(False)
    for weight in model.parameters():
        weight += 0.05 * torch.randn_like(weight)
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("d_head", HEADS)
def test_what_we_save_fla_and_rwkv7_hf_load(d_head, tied, tmp_path, as_users_run):
    """From the bundled model's own config, 128 wide: fla misses nothing, and its logits are ours."""
    recipe = RECIPES["tiny-rwkv7"].config
    heads = {"n_heads": 128 // d_head, "d_k": d_head, "d_v": d_head, "norm_eps": d_head * 1e-5}
    cfg = replace(recipe, tied_embeddings=tied, d_vocab=VOCABULARY, mixer=replace(recipe.mixer, **heads))
    model = random_model(cfg)
    folder = model.save_pretrained(tmp_path / "saved")
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) == (not tied)
    theirs, report = fla_model(folder)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokens = tokens_of(40, batch=2)
    assert distance(run_fla(theirs, tokens), model(tokens)) <= BOUND
    again = HookedRecurrentModel.from_pretrained(folder)
    assert replace(again.cfg, model_name=cfg.model_name) == cfg
    assert torch.equal(again(tokens), model(tokens))
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    assert torch.equal(HookedRecurrentModel.from_hf(theirs)(tokens), model(tokens))
    if not tied:  # rwkv7_hf has no tied embeddings
        from rwkv7_hf import RWKV7ForCausalLM

        other = RWKV7ForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
        assert distance(other(input_ids=tokens, use_cache=False).logits, model(tokens)) <= BOUND


def test_the_bundled_recipe_can_be_saved(tmp_path, as_users_run):
    cfg = RECIPES["tiny-rwkv7"].config
    model = random_model(cfg)
    again = HookedRecurrentModel.from_pretrained(model.save_pretrained(tmp_path))
    assert again.cfg.mixer == cfg.mixer and replace(again.cfg, model_name=cfg.model_name) == cfg
    tokens = tokens_of(20)
    assert torch.equal(again(tokens), model(tokens))


def test_a_tokenizer_in_transformers_format_is_saved_and_loaded(tmp_path, caplog, as_users_run):
    """As the bundled model has one; transformers reads it though it does not know the model's type, and without a warning."""
    tokenizer = train_tokenizer(["def f(x):\n    return x\n"] * 3, vocab_size=280)
    model = random_model(RECIPES["tiny-rwkv7"].config)
    model.tokenizer = tokenizer
    again = HookedRecurrentModel.from_pretrained(model.save_pretrained(tmp_path))
    assert again.to_tokens("def g(y)").tolist() == [[0, *tokenizer.encode("def g(y)")]]
    assert torch.equal(again("def g(y)"), model("def g(y)"))
    assert "rwkv7" not in caplog.text


def test_an_official_file_saved_and_loaded(official, tmp_path):
    _, ours, _ = official(64)
    folder = ours.save_pretrained(tmp_path / "saved")
    tokens = tokens_of(20)
    assert torch.equal(HookedRecurrentModel.from_pretrained(folder)(tokens), ours(tokens))
    with pytest.raises(ValueError, match="epsilon head width 32 x norm_eps 1e-05; this model does so with 0.00064"):
        official(32)[1].save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_ranks_that_the_config_leaves_open(converted, tmp_path):
    folder, ours, _ = converted(64)
    raw = json.loads((folder / "config.json").read_text())
    keys = [f"{part}_low_rank_dim" for part in ("decay", "a", "v", "gate")] + ["intermediate_size"]
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    for open_keys in ({key: None for key in keys}, {}):
        closed = {key: value for key, value in raw.items() if key not in keys}
        (tmp_path / "config.json").write_text(json.dumps(closed | open_keys))
        again = HookedRecurrentModel.from_pretrained(tmp_path)
        assert again.cfg.mixer == ours.cfg.mixer and again.cfg.d_mlp == ours.cfg.d_mlp
        assert torch.equal(again(tokens_of(9)), ours(tokens_of(9)))


def test_the_older_tensor_of_six_mixes(converted, tmp_path):
    folder, ours, _ = converted(64)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(3):
        start = f"model.layers.{layer}.attn.x_"
        tensors[f"{start}x"] = torch.cat([tensors.pop(start + part).view(1, -1) for part in "rwkvag"])
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert torch.equal(HookedRecurrentModel.from_pretrained(tmp_path)(tokens_of(9)), ours(tokens_of(9)))


def test_every_part_matters(official, as_users_run):
    """Without the matrix memory, what goes past it, or the MLP, the logits are far away."""
    _, ours, _ = official(64)
    tokens = tokens_of(40)
    for name in ("mixer.hook_state", "mixer.hook_bonus", "mixer.hook_value_gate", "mixer.hook_gate", "hook_mlp_out"):
        silenced = [(f"blocks.1.{name}", lambda tensor, hook: 0 * tensor)]
        assert distance(ours.run_with_hooks(tokens, fwd_hooks=silenced), ours(tokens)) > 100 * BOUND, name
