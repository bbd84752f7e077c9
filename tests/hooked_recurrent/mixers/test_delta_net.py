"""DeltaNet: its roles and read-out by hand from the weights, what an edit upstream or downstream reaches, its options."""

import math

import pytest
import torch

from hooked_recurrent import DeltaNetConfig
from tests.hooked_recurrent.mixers.by_hand import EXACT, PREFIX, cached, model_with
from tests.hooked_recurrent.models import distance, tiny_model, tokens_of

STACK = ("delta_net", "delta_net")
NAMES = "q k v beta log_decay erase probe write_key write_value query read z".split()


def test_the_roles_are_what_the_recurrence_consumes():
    """Nothing decays; the erase is beta k at the very key that is written."""
    model = tiny_model(STACK).requires_grad_(False)
    x, at = cached(model, tokens_of(model), NAMES)
    key, query = (at[side] / (at[side].square().sum(-1, keepdim=True) + 1e-6).sqrt() for side in "kq")
    torch.testing.assert_close(at["beta"], (x @ model.blocks[0].mixer.beta.weight.T).sigmoid(), **EXACT)
    assert at["log_decay"].shape == (2, 12, 4) and at["log_decay"].eq(0).all()
    torch.testing.assert_close(at["write_key"], key, **EXACT)
    torch.testing.assert_close(at["probe"], key, **EXACT)
    torch.testing.assert_close(at["erase"], -at["beta"][..., None] * key, **EXACT)
    torch.testing.assert_close(at["write_value"], at["beta"][..., None] * at["v"], **EXACT)
    torch.testing.assert_close(at["query"], query / 3**0.5, **EXACT)


def test_beta_one_stores_a_value_at_its_key():
    """With the write strength at 1 and a key of length 1, asking for the last key gives the last value and nothing else."""
    model = model_with(STACK[0], learned_beta=False)
    assert "blocks.0.mixer.beta.weight" not in model.state_dict()
    tokens = tokens_of(model)
    long_keys = (f"{PREFIX}k", lambda key, hook: 1e5 * key)  # beside which the norm's epsilon is nothing
    with model.hooks(fwd_hooks=[long_keys]):
        _, at = cached(model, tokens, NAMES)
    assert at["beta"].eq(1).all()
    ask = (f"{PREFIX}query", lambda query, hook: at["write_key"])
    with model.hooks(fwd_hooks=[long_keys, ask]):
        _, cache = model.run_with_cache(tokens, names_filter=f"{PREFIX}read")
    assert distance(cache[f"{PREFIX}read"], at["v"]) <= 1e-10


def test_negative_eigenvalues_double_the_write_strength():
    one, other = model_with(STACK[0]), model_with(STACK[0], negative_eigenvalues=True)
    other.load_state_dict(one.state_dict())
    tokens = tokens_of(one)
    torch.testing.assert_close(
        2 * cached(one, tokens, NAMES)[1]["beta"], cached(other, tokens, NAMES)[1]["beta"], **EXACT
    )


@pytest.mark.parametrize("gated", [False, True])
def test_the_read_out_by_hand(gated):
    model = model_with(STACK[0], output_gate=gated)
    mixer = model.blocks[0].mixer
    x, at = cached(model, tokens_of(model), NAMES)
    weight = mixer.norm.weight
    z = torch.nn.functional.rms_norm(at["read"], (5,), weight, eps=1e-6)
    if gated:
        z = z * torch.nn.functional.silu(mixer.gate(x)).unflatten(-1, (4, 5))
    assert distance(z, at["z"]) <= 1e-12


CHANGED = {
    "q": ["query"],
    "k": ["erase", "probe", "write_key"],
    "v": ["write_value"],
    "beta": ["erase", "write_value"],
    "write_key": ["write_key"],
    "erase": ["erase"],
}


@pytest.mark.parametrize("hook", CHANGED)
def test_what_an_edit_changes(hook):
    """Upstream edits change the write and the erase; downstream edits the write, or the erase, alone."""
    model = tiny_model(STACK).requires_grad_(False)
    tokens = tokens_of(model)
    _, plain = cached(model, tokens, NAMES)

    def change(tensor, hook):
        return -0.5 * tensor.flip(-1) if tensor.ndim == 4 else 0.5 * tensor

    with model.hooks(fwd_hooks=[(PREFIX + hook, change)]):
        _, edited = cached(model, tokens, NAMES)
    roles = ["erase", "log_decay", "probe", "query", "write_key", "write_value"]
    assert [name for name in roles if not torch.equal(edited[name], plain[name])] == CHANGED[hook]
    assert distance(edited["z"], plain["z"]) > 1e-3


def test_a_decay_can_be_given_to_it():
    """hook_log_decay exists here too: a model that forgets nothing can be made to forget, its erase staying what it was."""
    model = tiny_model(STACK).requires_grad_(False)
    tokens = tokens_of(model)
    with model.hooks(fwd_hooks=[(f"{PREFIX}log_decay", lambda decay, hook: decay - 0.5)]):
        _, at = cached(model, tokens, NAMES)
    state, reads = torch.zeros(2, 4, 3, 5, dtype=torch.float64), []
    for t in range(12):
        found = torch.einsum("bhk,bhkv->bhv", at["probe"][:, t], state)
        state = math.exp(-0.5) * state + at["erase"][:, t, :, :, None] * found[..., None, :]
        state = state + at["write_key"][:, t, :, :, None] * at["write_value"][:, t, :, None, :]
        reads.append(torch.einsum("bhk,bhkv->bhv", at["query"][:, t], state))
    assert distance(at["read"], torch.stack(reads, dim=1)) <= 1e-12
    assert distance(at["read"], cached(model, tokens, NAMES)[1]["read"]) > 1e-2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_heads": 0}, "DeltaNetConfig.n_heads must be greater than 0, got 0"),
        ({"d_v": -1}, "DeltaNetConfig.d_v must be greater than 0, got -1"),
        ({"conv_size": 0}, "DeltaNetConfig.conv_size must be greater than 0"),
        ({"norm_eps": 0.0}, "DeltaNetConfig.norm_eps must be greater than 0"),
    ],
)
def test_configs_that_make_no_sense(changes, words, as_users_run):
    with pytest.raises(ValueError, match=words):
        DeltaNetConfig(**{"n_heads": 4, "d_k": 3, "d_v": 5} | changes)
