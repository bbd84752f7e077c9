"""The Mamba-2 mixer: its hooks by name and shape, its roles by hand, and what an edit upstream or downstream changes."""

from functools import lru_cache

import pytest
import torch

from hooked_recurrent import HookedRecurrentModel, Mamba2Config, ModelConfig
from tests.hooked_recurrent.models import distance, tiny_config, tiny_model, tokens_of

STACK = ("mamba2", "mamba2")
EXACT = {"rtol": 1e-12, "atol": 1e-12}
PREFIX = "blocks.0.mixer.hook_"


@lru_cache
def model_of():
    return tiny_model(STACK, seed=1).requires_grad_(False)


def cached(model, tokens, **options):
    """Activations of layer 0's mixer by the last part of their names."""
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.startswith("blocks.0."), **options)
    return {name.removeprefix(PREFIX): tensor for name, tensor in cache.items()}


def test_the_vocabulary_and_its_shapes():
    """Design, section 3: no erase and no probe; a block without MLP has neither resid_mid nor mlp_out nor ln2."""
    model = model_of()
    at = cached(model, tokens_of(model))
    lead = (2, 12)
    shapes = {
        **dict.fromkeys(["q", "k", "write_key", "query"], (*lead, 4, 3)),
        **dict.fromkeys(["v", "write_value", "read", "skip", "gate", "z"], (*lead, 4, 5)),
        **dict.fromkeys(["dt", "log_decay"], (*lead, 4)),
        **dict.fromkeys(["write", "state"], (*lead, 4, 3, 5)),
    }
    block = {
        **{f"blocks.0.hook_{name}": (*lead, 12) for name in ("resid_pre", "mixer_out", "resid_post")},
        **{"blocks.0.ln1.hook_scale": (*lead, 1), "blocks.0.ln1.hook_normalized": (*lead, 12)},
    }
    assert {name: tuple(tensor.shape) for name, tensor in at.items()} == shapes | block


def test_the_roles_are_what_the_recurrence_consumes():
    """By hand from the upstream hooks and the weights: step sizes limited, groups expanded, log and sign as documented."""
    model = model_of()
    mixer = model.blocks[0].mixer
    at = cached(model, tokens_of(model, length=40))
    x = at["blocks.0.ln1.hook_normalized"]
    free = torch.nn.functional.softplus(x @ mixer.dt.weight.T + mixer.dt.bias + mixer.dt_bias)
    assert free.max() > 1.0  # so that the limit acts
    torch.testing.assert_close(at["dt"], free.clamp(0.002, 1.0), **EXACT)
    torch.testing.assert_close(at["log_decay"], -mixer.A_log.exp() * at["dt"], **EXACT)
    assert (at["log_decay"] < 0).all()
    assert torch.equal(at["write_key"], at["k"]) and torch.equal(at["query"], at["q"])
    torch.testing.assert_close(at["write_value"], at["dt"][..., None] * at["v"], **EXACT)
    # heads 0 and 1 share a group's B and C, 1 and 2 do not
    for side in ("k", "q"):
        assert torch.equal(at[side][:, :, 0], at[side][:, :, 1])
        assert not torch.equal(at[side][:, :, 1], at[side][:, :, 2])


def test_the_convolution_by_hand():
    model = model_of()
    mixer = model.blocks[0].mixer
    at = cached(model, tokens_of(model))
    mixed = mixer.vkq(at["blocks.0.ln1.hook_normalized"])
    padded = torch.cat([mixed.new_zeros(2, 3, mixed.shape[2]), mixed], dim=1)
    summed = sum(padded[:, tap : tap + 12] * mixer.conv.weight[:, tap] for tap in range(4))
    out = torch.nn.functional.silu(summed + mixer.conv.bias)
    together = torch.cat([at["v"].flatten(2), at["k"][:, :, ::2].flatten(2), at["q"][:, :, ::2].flatten(2)], dim=-1)
    torch.testing.assert_close(together, out, **EXACT)


def test_the_read_out_by_hand():
    """states -> read -> + D x -> gate -> RMSNorm per group -> W_O."""
    model = model_of()
    mixer = model.blocks[0].mixer
    tokens = tokens_of(model)
    at = cached(model, tokens)
    state, states = torch.zeros(2, 4, 3, 5, dtype=torch.float64), []
    for t in range(12):
        write = at["k"][:, t, :, :, None] * (at["dt"][:, t, :, None] * at["v"][:, t])[:, :, None, :]
        state = (-mixer.A_log.exp() * at["dt"][:, t]).exp()[..., None, None] * state + write
        states.append(state)
    assert distance(at["state"], torch.stack(states, dim=1)) <= 1e-12
    read = torch.einsum("bphkv,bphk->bphv", torch.stack(states, dim=1), at["q"])
    assert distance(at["read"], read) <= 1e-12
    torch.testing.assert_close(at["skip"], mixer.D[:, None] * at["v"], **EXACT)
    gated = (read + at["skip"]) * torch.nn.functional.silu(at["gate"])
    groups = gated.flatten(2).unflatten(-1, (2, 10))
    z = mixer.norm.weight * torch.nn.functional.rms_norm(groups, (10,), eps=1e-5).flatten(2)
    assert distance(at["z"].flatten(2), z) <= 1e-12
    out = torch.einsum("bphv,hvm->bpm", at["z"], mixer.W_O) + mixer.out.bias
    assert distance(at["blocks.0.hook_mixer_out"], out) <= 1e-12
    total = at["blocks.0.hook_resid_pre"] + at["blocks.0.hook_mixer_out"]
    assert torch.equal(at["blocks.0.hook_resid_post"], total)


CHANGED = {
    "q": ["query"],
    "k": ["write_key"],
    "v": ["skip", "write_value"],
    "dt": ["log_decay", "write_value"],
    "write_key": ["write_key"],
    "write_value": ["write_value"],
    "log_decay": ["log_decay"],
    "skip": ["skip"],
    "gate": ["gate"],
}


@pytest.mark.parametrize("hook", CHANGED)
def test_what_an_edit_changes(hook):
    """hook_dt changes decay and write, hook_v write and skip; downstream hooks change their own role alone."""
    model = model_of()
    tokens = tokens_of(model)
    plain = cached(model, tokens)

    def change(tensor, hook):
        return -0.5 * tensor.flip(-1) if tensor.ndim == 4 else 0.5 * tensor

    with model.hooks(fwd_hooks=[(PREFIX + hook, change)]):
        edited = cached(model, tokens)
    roles = ["gate", "log_decay", "query", "skip", "write_key", "write_value"]
    assert [name for name in roles if not torch.equal(edited[name], plain[name])] == CHANGED[hook]
    assert not torch.equal(edited["z"], plain["z"])


def test_the_state_holds_the_matrix_and_the_tail_of_the_convolution():
    model = model_of()
    _, state = model(tokens_of(model), return_state=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.layers[0].tensors().items()}
    assert shapes == {"matrix": (2, 4, 3, 5), "conv_tail": (2, 3, 4 * 5 + 2 * 2 * 3)}


def test_it_starts_as_the_paper_does():
    """dt log-uniform in 0.001 .. 0.1 without input, A in 1 .. 16, D = 1, norms at 1, and no bias where none is asked for."""
    mixer = Mamba2Config(n_heads=200, n_groups=1, d_k=2, d_v=1, conv_bias=False)
    cfg = ModelConfig(d_model=4, d_vocab=5, d_mlp=None, layer_types=("mamba2",), mixer=mixer, norm_offset=0.0)
    block = HookedRecurrentModel(cfg).blocks[0]
    dt = torch.nn.functional.softplus(block.mixer.dt_bias)
    assert 0.0009 < dt.min() < 0.002 and 0.05 < dt.max() < 0.11
    assert 1 <= block.mixer.A_log.exp().min() and block.mixer.A_log.exp().max() <= 16
    assert block.mixer.D.eq(1).all() and block.mixer.norm.weight.eq(1).all() and block.ln1.weight.eq(1).all()
    assert [name for name, _ in block.named_parameters() if name.endswith("bias")] == ["mixer.dt_bias"]


BAD_CONFIGS = {
    "groups": ({"n_groups": 3}, "n_groups must divide n_heads, got 3 and 4"),
    "no groups": ({"n_groups": 0}, "Mamba2Config.n_groups must be greater than 0, got 0"),
    "state": ({"d_k": 0}, "Mamba2Config.d_k must be greater than 0, got 0"),
    "taps": ({"conv_size": 0}, "Mamba2Config.conv_size must be greater than 0"),
    "limits": ({"dt_limit": (0.5, 0.1)}, r"dt_limit must be \(low, high\) with 0 <= low < high, got \(0.5, 0.1\)"),
    "negative limit": ({"dt_limit": (-1.0, 0.1)}, "dt_limit must be"),
    "one limit": ({"dt_limit": (0.5,)}, "dt_limit must be"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_configs_that_make_no_sense(case, as_users_run):
    changes, words = BAD_CONFIGS[case]
    with pytest.raises(ValueError, match=words):
        Mamba2Config(**{"n_heads": 4, "n_groups": 2, "d_k": 3, "d_v": 5} | changes)


def test_a_model_has_one_rule_and_may_have_no_mlp():
    cfg = tiny_config(STACK)
    assert cfg.d_mlp is None and (cfg.d_k, cfg.d_v, cfg.recurrent_layers) == (3, 5, (0, 1))
    with pytest.raises(
        ValueError, match="layer 1 is of type 'gated_delta_net'; this model's layers are mamba2 or attention"
    ):
        tiny_config(("mamba2", "gated_delta_net"))
    with pytest.raises(ValueError, match="ModelConfig.d_mlp must be greater than 0, got 0"):
        ModelConfig(d_model=4, d_vocab=5, d_mlp=0, layer_types=STACK, mixer=cfg.mixer)
