"""Gated Linear Attention: its roles and read-out by hand from the weights, its options, what its state holds."""

import pytest
import torch

from hooked_recurrent import GatedLinearAttentionConfig
from tests.hooked_recurrent.mixers.by_hand import EXACT, PREFIX, cached, model_with
from tests.hooked_recurrent.models import distance, tokens_of

STACK = ("gated_linear_attention", "gated_linear_attention")
NAMES = "q k v log_decay write_key write_value query read z".split()


@pytest.mark.parametrize("conv_size", [None, 3])
def test_the_roles_are_what_the_recurrence_consumes(conv_size):
    model = model_with(STACK[0], conv_size=conv_size, decay_divisor=4.0)
    mixer = model.blocks[0].mixer
    x, at = cached(model, tokens_of(model), NAMES)
    assert f"{PREFIX}erase" not in model.hook_dict
    raw = x @ mixer.decay[0].weight.T @ mixer.decay[1].weight.T + mixer.decay[1].bias
    groups = raw.sigmoid().log().unflatten(-1, (2, 3)) / 4
    torch.testing.assert_close(at["log_decay"], groups.repeat_interleave(2, dim=2), **EXACT)
    assert (at["log_decay"] < 0).all()
    assert torch.equal(at["write_key"], at["k"]) and torch.equal(at["write_value"], at["v"])
    torch.testing.assert_close(at["query"], at["q"] / 3**0.5, **EXACT)
    # heads 0 and 1 share key, value and decay, 1 and 2 do not; every head has its own query
    for name in ("k", "v", "log_decay"):
        assert torch.equal(at[name][:, :, 0], at[name][:, :, 1])
        assert not torch.equal(at[name][:, :, 1], at[name][:, :, 2])
    assert not torch.equal(at["q"][:, :, 0], at["q"][:, :, 1])
    if conv_size is None:  # plain projections, without an activation
        torch.testing.assert_close(at["q"].flatten(2), x @ mixer.query.weight.T, **EXACT)
        torch.testing.assert_close(at["v"][:, :, ::2].flatten(2), x @ mixer.value.weight.T, **EXACT)


def test_decays_are_held_at_their_limit():
    free, held = model_with(STACK[0]), model_with(STACK[0], min_log_decay=-0.2)
    held.load_state_dict(free.state_dict())
    tokens = tokens_of(free)
    log_decay = cached(free, tokens, NAMES)[1]["log_decay"]
    assert log_decay.min() < -0.2 < log_decay.max()
    torch.testing.assert_close(cached(held, tokens, NAMES)[1]["log_decay"], log_decay.clamp(min=-0.2), **EXACT)


@pytest.mark.parametrize("gated", [False, True])
def test_the_read_out_by_hand(gated):
    model = model_with(STACK[0], output_gate=gated)
    mixer = model.blocks[0].mixer
    x, at = cached(model, tokens_of(model), NAMES)
    state, reads = torch.zeros(2, 4, 3, 5, dtype=torch.float64), []
    for t in range(12):
        decay = at["log_decay"][:, t].exp()[..., None]
        state = decay * state + at["k"][:, t, :, :, None] * at["v"][:, t, :, None, :]
        reads.append((state * at["query"][:, t, :, :, None]).sum(2))
    assert distance(torch.stack(reads, dim=1), at["read"]) <= 1e-12
    z = torch.nn.functional.rms_norm(at["read"], (5,), mixer.norm.weight, eps=1e-6)
    if gated:
        z = z * torch.nn.functional.silu(mixer.gate(x)).unflatten(-1, (4, 5))
    assert distance(z, at["z"]) <= 1e-12


@pytest.mark.parametrize("conv_size", [None, 3])
def test_the_state_holds_a_tail_where_there_are_convolutions(conv_size):
    model = model_with(STACK[0], conv_size=conv_size)
    tokens = tokens_of(model)
    whole = model(tokens)
    first, state = model(tokens[:, :5], return_state=True)
    names = {"matrix"} if conv_size is None else {"matrix", "conv_tail"}
    assert set(state.layers[0].tensors()) == names == set(model.blocks[0].remembers())
    rest = model(tokens[:, 5:], state=state)
    assert distance(torch.cat([first, rest], dim=1), whole) <= 1e-10


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_key_value_heads": 3}, "n_key_value_heads must divide n_heads, got 3 and 4"),
        ({"decay_rank": 0}, "GatedLinearAttentionConfig.decay_rank must be greater than 0, got 0"),
        ({"decay_divisor": 0.0}, "GatedLinearAttentionConfig.decay_divisor must be greater than 0"),
        ({"conv_size": 0}, "GatedLinearAttentionConfig.conv_size must be greater than 0"),
        ({"min_log_decay": 0.1}, r"min_log_decay must be at most 0 \(a decay of 1\), got 0.1"),
    ],
)
def test_configs_that_make_no_sense(changes, words, as_users_run):
    with pytest.raises(ValueError, match=words):
        GatedLinearAttentionConfig(**{"n_heads": 4, "n_key_value_heads": 2, "d_k": 3, "d_v": 5} | changes)
