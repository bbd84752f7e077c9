"""Gated DeltaNet: its roles and read-out by hand from the weights, what an edit upstream or downstream reaches, its start."""

import math
from dataclasses import replace

import pytest
import torch

from hooked_recurrent import GatedDeltaNetConfig, HookedRecurrentModel
from hooked_recurrent.scan.step import step_scan
from tests.hooked_recurrent.models import distance, tiny_config, tiny_model, tokens_of


def test_the_roles_are_what_the_recurrence_consumes():
    """By hand from the upstream hooks and the weights: normalised, scaled, heads expanded, log and sign as documented."""
    model = tiny_model().requires_grad_(False)
    _, cache = model.run_with_cache(tokens_of(model))
    mixer = model.blocks[0].mixer
    at = {
        name: cache[f"blocks.0.mixer.hook_{name}"]
        for name in "q k v beta log_decay erase probe write_key query".split()
    }
    x = cache["blocks.0.ln1.hook_normalized"]
    log_decay = -mixer.A_log.exp() * torch.nn.functional.softplus(mixer.dt(x) + mixer.dt_bias)
    key = at["k"] / (at["k"].square().sum(-1, keepdim=True) + 1e-6).sqrt()
    query = at["q"] / (at["q"].square().sum(-1, keepdim=True) + 1e-6).sqrt() / 3**0.5
    torch.testing.assert_close(at["log_decay"], log_decay, rtol=1e-12, atol=1e-12)
    assert (at["log_decay"] < 0).all() and ((0 < at["beta"]) & (at["beta"] < 1)).all()
    torch.testing.assert_close(at["write_key"], key, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(at["probe"], key, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(at["query"], query, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(at["erase"], -(log_decay.exp() * at["beta"])[..., None] * key, rtol=1e-12, atol=1e-12)
    value = cache["blocks.0.mixer.hook_write_value"]
    torch.testing.assert_close(value, at["beta"][..., None] * at["v"], rtol=1e-12, atol=1e-12)
    # grouped value attention: value heads 0 and 1 share key head 0
    assert torch.equal(at["k"][:, :, 0], at["k"][:, :, 1]) and not torch.equal(at["k"][:, :, 1], at["k"][:, :, 2])


def test_upstream_edits_change_write_and_erase_and_downstream_edits_the_write_alone():
    model = tiny_model().requires_grad_(False)
    tokens = tokens_of(model)
    names = [f"blocks.0.mixer.hook_{name}" for name in ("erase", "probe", "write_key", "write_value")]
    _, plain = model.run_with_cache(tokens, names_filter=names)

    def changed(hook):
        def flip(tensor, hook):
            return -0.5 * tensor.flip(-1) if tensor.ndim == 4 else 0.5 * tensor

        with model.hooks(fwd_hooks=[(f"blocks.0.mixer.{hook}", flip)]):
            _, cache = model.run_with_cache(tokens, names_filter=names)
        return [name.rpartition("hook_")[2] for name in names if not torch.equal(cache[name], plain[name])]

    assert changed("hook_k") == ["erase", "probe", "write_key"]
    assert changed("hook_beta") == ["erase", "write_value"]
    assert changed("hook_v") == ["write_value"]
    assert changed("hook_write_key") == ["write_key"]
    assert changed("hook_write_value") == ["write_value"]
    assert changed("hook_erase") == ["erase"]
    assert changed("hook_log_decay") == []


def test_a_layer_is_its_recurrence_read_out():
    """hook_read, by hand from the states; hook_z, by hand from the reads and the gate."""
    model = tiny_model(seed=1).requires_grad_(False)
    tokens = tokens_of(model)
    _, cache = model.run_with_cache(tokens)
    mixer = model.blocks[1].mixer
    states = cache.state(1, slice(None), slice(None))
    read = torch.einsum("bphkv,bphk->bphv", states, cache["blocks.1.mixer.hook_query"])
    assert distance(read, cache["blocks.1.mixer.hook_read"]) <= 1e-12
    gate = mixer.gate(cache["blocks.1.ln1.hook_normalized"]).unflatten(-1, (4, 5))
    normalized = torch.nn.functional.rms_norm(read, (5,), mixer.norm.weight, eps=1e-6)
    z = normalized * torch.nn.functional.silu(gate)
    assert distance(z, cache["blocks.1.mixer.hook_z"]) <= 1e-12


def test_starting_decays_span_many_time_scales():
    torch.manual_seed(0)
    cfg = replace(tiny_config(), mixer=GatedDeltaNetConfig(n_heads=400, n_key_heads=2, d_k=3, d_v=5))
    mixer = HookedRecurrentModel(cfg).blocks[0].mixer
    step_size = torch.nn.functional.softplus(mixer.dt_bias)
    assert 0.001 <= step_size.min() < 0.002 and 0.05 < step_size.max() <= 0.1
    assert 0.8 < step_size.log10().std() / (2 / 12**0.5) < 1.2  # log-uniform over two decades
    half_life = math.log(2) / (step_size * mixer.A_log.exp())
    assert (half_life < 4).any() and (half_life > 64).any()


ROLES = ["log_decay", "erase", "probe", "write_key", "write_value", "query"]


@pytest.mark.parametrize("role", [None, "q", "k", "v", "beta", *ROLES])
@pytest.mark.parametrize("length", [1, 12])
def test_the_hooks_show_what_the_recurrence_consumes(role, length):
    """The step reference over the cached roles gives the layer's reads, whichever one of them a function has changed."""
    model = tiny_model(seed=1).requires_grad_(False)
    tokens = tokens_of(model, length=length)
    _, state = model(tokens_of(model, length=5, seed=1), return_state=True)

    def change(tensor, hook):
        return 0.5 * tensor if tensor.ndim == 3 else -0.5 * tensor.flip(-1)

    with model.hooks(fwd_hooks=[(f"blocks.0.mixer.hook_{role}", change)] if role else []):
        _, cache = model.run_with_cache(tokens, state=state)
    read, _ = step_scan(cache.factors(0), state.layers[0].matrix)
    assert distance(read, cache["blocks.0.mixer.hook_read"]) <= 1e-12


@pytest.mark.parametrize("side", ["key", "value"])
def test_an_edit_of_one_side_of_the_write_is_an_edit_of_its_matrix(side):
    """hook_write_key and hook_write_value change the write alone: the erase stays what the model computed."""
    model = tiny_model(seed=1).requires_grad_(False)
    tokens = tokens_of(model)
    _, native = model.run_with_cache(tokens)
    sides = {name: native[f"blocks.0.mixer.hook_write_{name}"] for name in ("key", "value")}
    sides[side] = -0.5 * sides[side].flip(-1)
    matrix = sides["key"][..., :, None] * sides["value"][..., None, :]
    by_side = model.run_with_hooks(
        tokens, fwd_hooks=[(f"blocks.0.mixer.hook_write_{side}", lambda x, hook: sides[side])]
    )
    by_matrix = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.mixer.hook_write", lambda x, hook: matrix)])
    assert distance(by_side, by_matrix) <= 1e-12
    assert distance(by_side, model(tokens)) > 1e-3
