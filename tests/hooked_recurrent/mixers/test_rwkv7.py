"""The RWKV-7 mixer: its hooks by name and shape, its roles and read-out by hand, and what an edit changes."""

import math
from functools import lru_cache

import pytest
import torch
from torch.nn import functional

from hooked_recurrent import ModelConfig, RecurrentState, RWKV7Config
from hooked_recurrent.layers.mlp import ChannelMix
from tests.hooked_recurrent.models import distance, tiny_config, tiny_model, tokens_of

STACK = ("rwkv7", "rwkv7")
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@lru_cache
def model_of():
    return tiny_model(STACK, seed=1).requires_grad_(False)


def cached(model, tokens, layer=1, **options):
    """Activations of a layer by what comes after "blocks.{l}.", its mixer's by the last part of their names."""
    prefix = f"blocks.{layer}."
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.startswith(prefix), **options)
    return {name.removeprefix(prefix).removeprefix("mixer.hook_"): tensor for name, tensor in cache.items()}


def before(x):
    """The position before each one; zeros before the first."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def mixed(x, mix):
    return x + (before(x) - x) * mix


def per_head(x, width):
    return x.unflatten(-1, (4, width))


def low_rank(x, lora, activation=lambda x: x):
    out = activation(x @ lora.down.weight.T) @ lora.up.weight.T
    return out if lora.bias is None else out + lora.bias


def test_the_vocabulary_and_its_shapes():
    model = model_of()
    lead = (2, 12)
    keys = ["q", "k", "iclr", "removal_key", "replacement_key", "log_decay", "erase", "probe", "write_key", "query"]
    shapes = {
        **dict.fromkeys(keys, (*lead, 4, 3)),
        **dict.fromkeys(["v", "value_gate", "write_value", "read", "bonus", "gate", "z"], (*lead, 4, 5)),
        **dict.fromkeys(["write", "state"], (*lead, 4, 3, 5)),
    }
    resid = ("resid_pre", "mixer_out", "resid_mid", "mlp_out", "resid_post")
    block = {
        **{f"hook_{name}": (*lead, 12) for name in resid},
        **{f"{ln}.hook_scale": (*lead, 1) for ln in ("ln1", "ln2")},
        **{f"{ln}.hook_normalized": (*lead, 12) for ln in ("ln1", "ln2")},
        **{f"mlp.hook_{name}": (*lead, 16) for name in ("pre", "post")},
    }
    at = cached(model, tokens_of(model))
    assert {name: tuple(tensor.shape) for name, tensor in at.items()} == shapes | block
    assert set(cached(model, tokens_of(model), layer=0)) == set(at) - {"value_gate"}
    assert {"ln_embed.hook_scale", "ln_embed.hook_normalized"} <= set(model.hook_dict)


def test_the_roles_are_what_the_recurrence_consumes():
    """By hand from the paper's equations: token shift, low-rank gates, values of layer 0, removal and replacement keys."""
    model, tokens = model_of(), tokens_of(model_of(), length=40)
    mixer, at = model.blocks[1].mixer, cached(model, tokens)
    x, first = at["ln1.hook_normalized"], cached(model, tokens, layer=0)["v"]
    torch.testing.assert_close(at["q"], per_head(mixed(x, mixer.mix_r) @ mixer.query.weight.T, 3), **EXACT)
    key = mixed(x, mixer.mix_k) @ mixer.key.weight.T
    torch.testing.assert_close(at["k"], per_head(key, 3), **EXACT)
    share = per_head(low_rank(mixed(x, mixer.mix_v), mixer.value_gate).sigmoid(), 5)
    torch.testing.assert_close(at["value_gate"], share, **EXACT)
    own = per_head(mixed(x, mixer.mix_v) @ mixer.value.weight.T, 5)
    torch.testing.assert_close(at["v"], (1 - share) * own + share * first, **EXACT)
    iclr = low_rank(mixed(x, mixer.mix_a), mixer.iclr).sigmoid()
    torch.testing.assert_close(at["iclr"], per_head(iclr, 3), **EXACT)
    removal = per_head(key * mixer.removal, 3)
    removal = removal / removal.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(at["removal_key"], removal, **EXACT)
    replacement = per_head(key * (1 + (iclr - 1) * mixer.replacement), 3)
    torch.testing.assert_close(at["replacement_key"], replacement, **EXACT)
    decay = torch.exp(-math.exp(-0.5) * low_rank(mixed(x, mixer.mix_w), mixer.decay, torch.tanh).sigmoid())
    torch.testing.assert_close(at["log_decay"], per_head(decay.log(), 3), **EXACT)
    assert -0.6066 < at["log_decay"].min() and at["log_decay"].max() < 0
    torch.testing.assert_close(at["erase"], -at["removal_key"] * at["iclr"], **EXACT)
    assert torch.equal(at["probe"], at["removal_key"]) and torch.equal(at["write_key"], at["replacement_key"])
    assert torch.equal(at["write_value"], at["v"]) and torch.equal(at["query"], at["q"])


def test_the_first_layer_keeps_its_own_values():
    model, tokens = model_of(), tokens_of(model_of())
    mixer, at = model.blocks[0].mixer, cached(model, tokens, layer=0)
    own = mixed(at["ln1.hook_normalized"], mixer.mix_v) @ mixer.value.weight.T
    torch.testing.assert_close(at["v"], per_head(own, 5), **EXACT)
    resid = model.ln_embed(model.embed(tokens))
    torch.testing.assert_close(at["hook_resid_pre"], resid, **EXACT)
    normed = functional.layer_norm(model.embed(tokens), (12,), model.ln_embed.weight, model.ln_embed.bias, 1e-6)
    torch.testing.assert_close(resid, normed, **EXACT)


def test_the_recurrence_and_the_read_out_by_hand():
    """In the papers' own orientation, S [d_v, d_k]: S = S diag(w) - S kappa (kappa * a)^T + v k^T, o = S r."""
    model, tokens = model_of(), tokens_of(model_of())
    mixer, at = model.blocks[1].mixer, cached(model, tokens)
    state, reads, states = torch.zeros(2, 4, 5, 3, dtype=torch.float64), [], []
    for t in range(12):
        kappa, iclr = at["removal_key"][:, t], at["iclr"][:, t]
        asked = torch.einsum("bhvk,bhk->bhv", state, kappa)
        state = state * at["log_decay"][:, t].exp()[:, :, None] - asked[..., None] * (kappa * iclr)[:, :, None]
        state = state + at["v"][:, t][..., None] * at["replacement_key"][:, t][:, :, None]
        states.append(state.transpose(-1, -2))
        reads.append(torch.einsum("bhvk,bhk->bhv", state, at["q"][:, t]))
    read = torch.stack(reads, dim=1)
    assert distance(at["read"], read) <= 1e-12
    assert distance(at["state"], torch.stack(states, dim=1)) <= 1e-12
    spread = ((read - read.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + 64e-5).sqrt()
    normed = (read - read.mean(-1, keepdim=True)) / spread
    normed = normed * per_head(mixer.norm_weight, 5) + per_head(mixer.norm_bias, 5)
    bonus = (at["q"] * at["replacement_key"] * mixer.bonus).sum(-1, keepdim=True) * at["v"]
    assert distance(at["bonus"], bonus) <= 1e-12
    gate = per_head(low_rank(mixed(at["ln1.hook_normalized"], mixer.mix_g), mixer.gate, torch.sigmoid), 5)
    assert distance(at["gate"], gate) <= 1e-12
    assert distance(at["z"], (normed + bonus) * gate) <= 1e-12
    assert distance(at["hook_mixer_out"], torch.einsum("bphv,hvm->bpm", at["z"], mixer.W_O)) <= 1e-12


def test_the_channel_mix_by_hand():
    model, tokens = model_of(), tokens_of(model_of())
    mlp, at = model.blocks[1].mlp, cached(model, tokens)
    x = at["ln2.hook_normalized"]
    assert isinstance(mlp, ChannelMix)
    hidden = (mixed(x, mlp.mix) @ mlp.up.weight.T).clamp(min=0) ** 2
    assert distance(at["mlp.hook_post"], hidden) <= 1e-12
    assert distance(at["hook_mlp_out"], hidden @ mlp.down.weight.T) <= 1e-12


ROLES = ["bonus", "erase", "gate", "log_decay", "probe", "query", "write_key", "write_value"]
CHANGED = {
    "q": ["bonus", "query"],
    "k": ["bonus", "erase", "probe", "write_key"],
    "v": ["bonus", "write_value"],
    "value_gate": ["bonus", "write_value"],
    "iclr": ["bonus", "erase", "write_key"],
    "removal_key": ["erase", "probe"],
    "replacement_key": ["bonus", "write_key"],
    **{role: [role] for role in ROLES},
}


@pytest.mark.parametrize("hook", CHANGED)
def test_what_an_edit_changes(hook):
    """Upstream hooks change every role that is made of them; downstream hooks change their own role alone."""
    model, tokens = model_of(), tokens_of(model_of())
    plain = cached(model, tokens)

    def change(tensor, hook):
        return -0.5 * tensor.flip(-1) if hook.name.endswith(("q", "k", "v")) else 0.5 * tensor

    with model.hooks(fwd_hooks=[(f"blocks.1.mixer.hook_{hook}", change)]):
        edited = cached(model, tokens)
    assert [name for name in ROLES if not torch.equal(edited[name], plain[name])] == CHANGED[hook]
    assert not torch.equal(edited["z"], plain["z"])


def test_an_edit_of_the_first_layers_values_reaches_the_layers_above():
    model, tokens = model_of(), tokens_of(model_of())
    plain = cached(model, tokens)
    with model.hooks(fwd_hooks=[("blocks.0.mixer.hook_v", lambda v, hook: v + 1.0)]):
        edited = cached(model, tokens)
    with model.hooks(fwd_hooks=[("blocks.0.mixer.hook_write_value", lambda v, hook: v + 1.0)]):
        written = cached(model, tokens)
    # Not through the residual stream alone: at the same layer input, the shared value differs by what was added.
    for run, added in ((edited, 1.0), (written, 0.0), (plain, 0.0)):
        own = per_head(
            mixed(run["ln1.hook_normalized"], model.blocks[1].mixer.mix_v) @ model.blocks[1].mixer.value.weight.T, 5
        )
        first = cached(model, tokens, layer=0)["v"] + added
        torch.testing.assert_close(run["v"], own + (first - own) * run["value_gate"], **EXACT)


def test_the_state_holds_the_matrix_and_both_last_positions(tmp_path):
    model, tokens = model_of(), tokens_of(model_of())
    _, state = model(tokens, return_state=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.layers[1].tensors().items()}
    assert shapes == {"matrix": (2, 4, 3, 5), "shift_tail": (2, 1, 12), "mlp_tail": (2, 1, 12)}
    at = cached(model, tokens)
    assert distance(state.layers[1].shift_tail, at["ln1.hook_normalized"][:, -1:]) <= 1e-12
    assert distance(state.layers[1].mlp_tail, at["ln2.hook_normalized"][:, -1:]) <= 1e-12
    loaded = RecurrentState.load(state.save(tmp_path / "state.safetensors"))
    assert torch.equal(model(tokens, state=loaded), model(tokens, state=state))


def test_heads_start_with_slow_and_fast_channels():
    """RWKV-LM starts decays from nearly 1 to nearly exp(-0.6) a token, within every head and across heads."""
    model = tiny_model(STACK, d_k=16, n_heads=4, n_key_heads=4)
    fresh = type(model)(model.cfg)
    start = torch.exp(-math.exp(-0.5) * fresh.blocks[1].mixer.decay.bias.sigmoid()).unflatten(0, (4, 16))
    assert start.max() > 0.999 and start.min() < 0.6
    slow = start.mean(-1)
    assert (slow[:-1] > slow[1:]).all()


def test_configs_that_make_no_sense(as_users_run):
    with pytest.raises(ValueError, match="RWKV7Config.iclr_rank must be greater than 0, got 0"):
        RWKV7Config(n_heads=4, d_k=3, d_v=3, decay_rank=2, iclr_rank=0, value_rank=2, gate_rank=2)
    good = tiny_config(STACK).to_dict() | {"mixer": tiny_config(STACK).mixer}
    with pytest.raises(ValueError, match="norm must be 'rms' or 'layer', got 'batch'"):
        ModelConfig.from_dict(good | {"norm": "batch"})
    with pytest.raises(ValueError, match="mlp must be 'swiglu' or 'channel_mix', got 'gelu'"):
        ModelConfig.from_dict(good | {"mlp": "gelu"})


def test_a_state_of_another_rule_is_refused(as_users_run):
    """Same matrix shapes, other tails: what a token shift keeps is not what a convolution keeps."""
    model = model_of()
    _, foreign = tiny_model(("mamba2", "mamba2"))(tokens_of(model), return_state=True)
    with pytest.raises(ValueError, match="holds matrix and conv_tail, but .* keeps matrix and shift_tail and mlp_tail"):
        model(tokens_of(model), state=foreign)
