"""Kimi Delta Attention: its roles and read-out by hand from the weights, what an edit reaches, its options, its start."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import rms_norm, softplus

from hooked_recurrent import HookedRecurrentModel, KimiDeltaAttentionConfig
from tests.hooked_recurrent.mixers.by_hand import EXACT, PREFIX, cached, model_with
from tests.hooked_recurrent.models import distance, tiny_config, tiny_model, tokens_of

STACK = ("kimi_delta_attention", "kimi_delta_attention")
NAMES = "q k v beta log_decay erase probe write_key write_value query read z".split()


@pytest.mark.parametrize("lower_bound", [None, -2.0])
def test_the_roles_are_what_the_recurrence_consumes(lower_bound):
    model = model_with(STACK[0], lower_bound=lower_bound)
    mixer = model.blocks[0].mixer
    x, at = cached(model, tokens_of(model), NAMES)
    raw = (x @ mixer.decay[0].weight.T @ mixer.decay[1].weight.T + mixer.dt_bias).unflatten(-1, (4, 3))
    rate = mixer.A_log.exp()[:, None]
    log_decay = -rate * softplus(raw) if lower_bound is None else -2.0 * torch.sigmoid(rate * raw)
    torch.testing.assert_close(at["log_decay"], log_decay, **EXACT)
    assert at["log_decay"].max() < 0 and (lower_bound is None or at["log_decay"].min() > lower_bound)
    key, query = (at[side] / (at[side].square().sum(-1, keepdim=True) + 1e-6).sqrt() for side in "kq")
    torch.testing.assert_close(at["write_key"], key, **EXACT)
    torch.testing.assert_close(at["probe"], log_decay.exp() * key, **EXACT)
    torch.testing.assert_close(at["erase"], -at["beta"][..., None] * key, **EXACT)
    torch.testing.assert_close(at["write_value"], at["beta"][..., None] * at["v"], **EXACT)
    torch.testing.assert_close(at["query"], query / 3**0.5, **EXACT)
    # grouped value attention: value heads 0 and 1 share a key, but not a decay
    assert torch.equal(at["k"][:, :, 0], at["k"][:, :, 1]) and not torch.equal(at["k"][:, :, 1], at["k"][:, :, 2])
    assert not torch.equal(at["log_decay"][:, :, 0], at["log_decay"][:, :, 1])


def test_the_erase_asks_the_state_that_has_decayed():
    """As the paper writes it: decay first, then replace what the key finds by a mix with the new value."""
    model = tiny_model(STACK, seed=1).requires_grad_(False)
    _, at = cached(model, tokens_of(model), NAMES)
    state, reads = torch.zeros(2, 4, 3, 5, dtype=torch.float64), []
    for t in range(12):
        key, beta = at["write_key"][:, t], at["beta"][:, t, :, None]
        state = at["log_decay"][:, t].exp()[..., None] * state
        found = torch.einsum("bhk,bhkv->bhv", key, state)
        state = state + key[..., None] * (beta * (at["v"][:, t] - found))[..., None, :]
        reads.append(torch.einsum("bhk,bhkv->bhv", at["query"][:, t], state))
    assert distance(torch.stack(reads, dim=1), at["read"]) <= 1e-12


@pytest.mark.parametrize("gate_bias", [False, True])
def test_the_read_out_by_hand(gate_bias):
    model = model_with(STACK[0], gate_bias=gate_bias)
    mixer = model.blocks[0].mixer
    x, at = cached(model, tokens_of(model), NAMES)
    gate = x @ mixer.gate[0].weight.T @ mixer.gate[1].weight.T
    gate = gate + mixer.gate[1].bias if gate_bias else gate
    z = rms_norm(at["read"], (5,), mixer.norm.weight, eps=1e-6) * gate.sigmoid().unflatten(-1, (4, 5))
    assert distance(z, at["z"]) <= 1e-12


def test_negative_eigenvalues_double_the_write_strength():
    one, other = model_with(STACK[0]), model_with(STACK[0], negative_eigenvalues=True)
    other.load_state_dict(one.state_dict())
    tokens = tokens_of(one)
    torch.testing.assert_close(
        2 * cached(one, tokens, NAMES)[1]["beta"], cached(other, tokens, NAMES)[1]["beta"], **EXACT
    )


CHANGED = {
    "q": ["query"],
    "k": ["erase", "probe", "write_key"],
    "v": ["write_value"],
    "beta": ["erase", "write_value"],
    "log_decay": ["log_decay"],
    "write_key": ["write_key"],
    "probe": ["probe"],
}


@pytest.mark.parametrize("hook", CHANGED)
def test_what_an_edit_changes(hook):
    """Upstream edits change the write and the erase; an edit of a role changes that role alone."""
    model = tiny_model(STACK).requires_grad_(False)
    tokens = tokens_of(model)
    _, plain = cached(model, tokens, NAMES)

    def change(tensor, hook):
        sign = 1 if hook.name.endswith("log_decay") else -1
        return sign * 0.5 * tensor.flip(-1) if tensor.ndim == 4 else 0.5 * tensor

    with model.hooks(fwd_hooks=[(PREFIX + hook, change)]):
        _, edited = cached(model, tokens, NAMES)
    roles = ["erase", "log_decay", "probe", "query", "write_key", "write_value"]
    assert [name for name in roles if not torch.equal(edited[name], plain[name])] == CHANGED[hook]
    assert distance(edited["z"], plain["z"]) > 1e-3


def test_starting_decays_span_many_time_scales():
    torch.manual_seed(0)
    cfg = replace(tiny_config(STACK), mixer=KimiDeltaAttentionConfig(n_heads=100, n_key_heads=2, d_k=4, d_v=5))
    mixer = HookedRecurrentModel(cfg).blocks[0].mixer
    step_size = softplus(mixer.dt_bias)
    assert 0.001 <= step_size.min() < 0.002 and 0.05 < step_size.max() <= 0.1
    half_life = math.log(2) / (step_size.view(100, 4) * mixer.A_log.exp()[:, None])
    assert (half_life < 4).any() and (half_life > 64).any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_key_heads": 3}, "n_key_heads must divide n_heads, got 3 and 4"),
        ({"n_key_heads": 8}, "n_key_heads must divide n_heads, got 8 and 4"),
        ({"d_k": 0}, "KimiDeltaAttentionConfig.d_k must be greater than 0, got 0"),
        ({"lower_bound": 0.0}, r"lower_bound must be below 0 \(a decay of 1\), got 0.0"),
    ],
)
def test_configs_that_make_no_sense(changes, words, as_users_run):
    with pytest.raises(ValueError, match=words):
        KimiDeltaAttentionConfig(**{"n_heads": 4, "n_key_heads": 2, "d_k": 3, "d_v": 5} | changes)
