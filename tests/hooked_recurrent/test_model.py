"""The model's surface: outputs, losses, weights by transformer_lens's names, training, dtypes."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from hooked_recurrent import GatedDeltaNetConfig, HookedRecurrentModel, ModelConfig, WriteEdit
from hooked_recurrent.mixers import base
from hooked_recurrent.model import next_token_loss
from tests.hooked_recurrent.models import ALL_LINEAR, HYBRID, distance, over_stacks, tiny_config, tiny_model, tokens_of


@pytest.fixture(scope="module")
def model():
    return tiny_model(HYBRID, seed=1, tied=False).requires_grad_(False)


@pytest.fixture(scope="module")
def tokens(model):
    return tokens_of(model)


def test_return_types(model, tokens):
    logits = model(tokens)
    assert logits.shape == (2, 12, 29) and model(tokens, return_type=None) is None
    loss = model(tokens, return_type="loss")
    log_probabilities = logits[:, :-1].log_softmax(-1)
    by_hand = -log_probabilities.gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(loss, by_hand.mean(), rtol=1e-12, atol=0)
    both = model(tokens, return_type="both")
    assert torch.equal(both[0], logits) and torch.equal(both[1], loss)
    each = model(tokens, return_type="loss", loss_per_token=True)
    assert each.shape == (2, 11)
    torch.testing.assert_close(each, by_hand, rtol=1e-12, atol=0)
    output, state = model(tokens, return_type="both", return_state=True)
    assert torch.equal(output[0], logits) and state.position == 12
    assert model(tokens, return_type=None, return_state=True)[0] is None


def test_uniform_logits_cost_log_of_the_vocabulary():
    loss = next_token_loss(torch.zeros(1, 4, 29), torch.zeros(1, 4, dtype=torch.long))
    assert abs(loss.item() - math.log(29)) < 1e-6


def test_rows_and_prefixes_do_not_know_of_the_rest(model, tokens):
    logits = model(tokens)
    assert distance(model(tokens[[1]]), logits[[1]]) <= 1e-12
    assert distance(model(tokens[:, :7]), logits[:, :7]) <= 1e-12


def test_weights_by_name(model):
    assert model.W_E.shape == (29, 12) and model.W_U.shape == (12, 29)
    tied = tiny_model()
    assert "unembed.weight" not in tied.state_dict() and torch.equal(tied.W_U, tied.W_E.T)
    assert tied.W_O.shape == (2, 4, 5, 12)
    with pytest.raises(ValueError, match=r"W_O differ in shape.*model.blocks\[layer\].W_O"):
        model.W_O  # noqa: B018
    assert model.blocks[0].W_O.shape == (4, 5, 12) and model.blocks[1].W_O.shape == (4, 6, 12)
    assert model.blocks[0].recurrent and not model.blocks[1].recurrent
    assert model.device == torch.device("cpu") and model.dtype == torch.float64
    assert tied.parameter_count() == sum(p.numel() for p in tied.parameters()) == model_size(tied)


def model_size(model):
    """Weights counted from the config alone."""
    cfg, mixer = model.cfg, model.cfg.mixer
    keys, values = mixer.n_key_heads * mixer.d_k, mixer.n_heads * mixer.d_v
    width = 2 * keys + values
    delta = (
        cfg.d_model * (width + 2 * values + 2 * mixer.n_heads) + width * mixer.conv_size + mixer.d_v + 2 * mixer.n_heads
    )
    per_layer = delta + 3 * cfg.d_model * cfg.d_mlp + 2 * cfg.d_model
    return cfg.d_vocab * cfg.d_model + cfg.n_layers * per_layer + cfg.d_model


def test_the_residual_stream_is_the_sum_of_its_parts(model, tokens):
    _, cache = model.run_with_cache(tokens)
    for layer in (0, 2):
        z = cache[f"blocks.{layer}.mixer.hook_z"]
        mixed = torch.einsum("bphv,hvm->bpm", z, model.blocks[layer].W_O)
        assert distance(mixed, cache[f"blocks.{layer}.hook_mixer_out"]) <= 1e-12
        middle = cache[f"blocks.{layer}.hook_resid_pre"] + mixed
        assert distance(middle, cache[f"blocks.{layer}.hook_resid_mid"]) <= 1e-12
    final = cache["ln_final.hook_normalized"] @ model.W_U
    assert distance(final, model(tokens)) <= 1e-12


@over_stacks
def test_it_learns(layer_types):
    """Thirty steps on one text: the loss falls, and every weight gets a gradient."""
    torch.manual_seed(0)
    model = HookedRecurrentModel(tiny_config(layer_types, tied=False))
    tokens = tokens_of(model, batch=4, length=40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = model(tokens, return_type="loss")
        optimizer.zero_grad()
        loss.backward()
        if not losses:
            assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(29)) < 0.05 and losses[-1] < 0.8 * losses[0]


def test_gradients_of_the_chunked_model_equal_those_of_the_stepped_one():
    model = tiny_model(HYBRID, seed=1)
    tokens = tokens_of(model, length=70)
    gradients = []
    for backend in ("step", "chunked"):
        gradients.append(
            torch.autograd.grad(model(tokens, return_type="loss", backend=backend), list(model.parameters()))
        )
    for (name, _), stepped, chunked in zip(model.named_parameters(), *gradients, strict=True):
        assert distance(chunked, stepped) <= 1e-9, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_keep_wide_states(dtype):
    exact = tiny_model(HYBRID, seed=1, dtype=torch.float32).requires_grad_(False)
    model = copy.deepcopy(exact).to(dtype)
    tokens = tokens_of(model)
    (logits, state), cache = model.run_with_cache(tokens, return_state=True)
    assert logits.dtype == dtype and state.layers[0].matrix.dtype == torch.float32
    assert state.layers[1].keys.dtype == dtype
    assert cache["blocks.0.mixer.hook_log_decay"].dtype == torch.float32
    assert distance(logits.float(), exact(tokens)) <= 0.1


def test_an_idle_function_on_hook_write_costs_no_precision():
    """The matrix of a write is as wide as the state: in bfloat16 it must not be rounded once more."""
    model = tiny_model(seed=1, dtype=torch.bfloat16).requires_grad_(False)
    tokens = tokens_of(model)
    name = "blocks.0.mixer.hook_read"
    _, plain = model.run_with_cache(tokens, names_filter=name)
    with model.hooks(fwd_hooks=[("blocks.0.mixer.hook_write", lambda write, hook: None)]):
        _, hooked = model.run_with_cache(tokens, names_filter=name)
    assert distance(hooked[name], plain[name]) <= 1e-5


def test_edits_of_another_dtype_are_taken(model, tokens):
    sides = {"key": torch.ones(3), "value": torch.ones(5)}
    narrow = model(tokens, edits=[WriteEdit(0, 1, 4, **sides)])
    wide = model(tokens, edits=[WriteEdit(0, 1, 4, **{name: side.double() for name, side in sides.items()})])
    assert narrow.dtype == torch.float64 and torch.equal(narrow, wide)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_permanent_and_context_hooks(direction, tokens):
    model = tiny_model(HYBRID, seed=1)
    calls = []
    model.add_hook("blocks.0.hook_resid_post", lambda tensor, hook: calls.append(hook.name), dir=direction)
    model.add_hook(
        lambda name: name.endswith("1.hook_mlp_out"), lambda tensor, hook: calls.append(hook.name), dir=direction
    )
    model(tokens, return_type="loss").backward()
    assert sorted(calls) == ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]
    model.reset_hooks()
    model(tokens, return_type="loss").backward()
    assert len(calls) == 2


def test_a_call_inside_a_hook_leaves_the_outer_call_as_it_was(model, tokens):
    """A function may run the model itself, say on another text, without moving the positions of the call it sits in."""
    inner, seen = [], []

    def run_another(tensor, hook):
        if not inner:  # the inner call fires this function too
            inner.append(None)
            inner.append(model(tokens[:, :3]))

    def note(tensor, hook):
        if len(inner) != 1:
            seen.append(hook.positions.tolist())

    edits = [WriteEdit(2, 1, 8, "delete")]
    for name in ("hook_embed", "blocks.0.mixer.hook_state"):
        inner.clear(), seen.clear()
        points = ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.2.mixer.hook_q"]
        hooks = [(name, run_another), *((point, note) for point in points)]
        with model.hooks(fwd_hooks=hooks):
            logits, cache = model.run_with_cache(tokens, edits=edits)
        assert seen == [list(range(12))] * 3
        assert distance(logits, model(tokens, edits=edits)) <= 1e-12
        assert distance(inner[1], model(tokens[:, :3])) <= 1e-12
        assert cache.state(2, 0, 11).shape == (2, 3, 5)


BAD_CONFIGS = {
    "kind": ({"layer_types": ("gated_delta_net", "mamba")}, "layer 1 is of type 'mamba'"),
    "attention missing": ({"layer_types": ("attention",)}, "attention must be given exactly when"),
    "d_model": ({"d_model": 0}, "ModelConfig.d_model must be greater than 0, got 0"),
    "no layers": ({"layer_types": ()}, "ModelConfig.n_layers must be greater than 0"),
    "eps": ({"norm_eps": float("nan")}, "norm_eps must be greater than 0, got nan"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_configs_that_make_no_model(case):
    changes, words = BAD_CONFIGS[case]
    with pytest.raises(ValueError, match=words):
        replace(tiny_config(), **changes)


def test_configs_refuse_unknown_keys_and_go_to_plain_values():
    with pytest.raises(ValueError, match="has no field 'd_modl'; did you mean 'd_model'"):
        ModelConfig.from_dict({"d_modl": 3})
    with pytest.raises(ValueError, match="n_key_heads must divide n_heads, got 3 and 4"):
        GatedDeltaNetConfig(n_heads=4, n_key_heads=3, d_k=2, d_v=2)
    mixer = tiny_config().mixer
    assert GatedDeltaNetConfig.from_dict(mixer.to_dict()) == mixer
    cfg = tiny_config(HYBRID)
    assert (cfg.n_layers, cfg.n_heads, cfg.d_k, cfg.d_v, cfg.d_head, cfg.recurrent_layers) == (3, 4, 3, 5, 5, (0, 2))
    assert tiny_config(ALL_LINEAR).attention is None


@pytest.mark.parametrize("backend", ["step", "chunked"])
def test_the_config_or_the_call_names_the_scan(backend, monkeypatch):
    model = tiny_model(ALL_LINEAR)
    ran = []
    original = base.edited_scan

    def watched(*args, **options):
        ran.append(options["backend"])
        return original(*args, **options)

    monkeypatch.setattr(base, "edited_scan", watched)
    tokens = torch.arange(6)[None]
    model(tokens)
    model(tokens, backend=backend)
    model.cfg = replace(model.cfg, backend=backend)
    model(tokens)
    assert set(ran[: len(ran) // 3]) == {"auto"} and set(ran[len(ran) // 3 :]) == {backend}
    with pytest.raises(ValueError, match="backend must be 'auto' or 'step' or 'chunked' or 'triton', got 'fast'"):
        replace(model.cfg, backend="fast")
