"""The recurrences of DeltaNet, GLA and KDA against flash-linear-attention's own naive ones, which know nothing of roles.

Theirs get what the rule's upstream hooks show (q, k, v, beta) and the log decay; ours are the reads and the final state of
the mixer. float32; differences are relative to the largest absolute value.
"""

from functools import lru_cache

import pytest
import torch
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.kda.naive import naive_recurrent_kda

from tests.hooked_recurrent.models import distance, tiny_model, tokens_of

BOUND = 1e-5
PREFIX = "blocks.0.mixer.hook_"


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def delta_net(at, initial):
    sides = (side.transpose(1, 2) for side in (unit(at("q")), unit(at("k")), at("v"), at("beta")))
    read, state = delta_rule_recurrence(*sides, initial_state=initial)
    return read.transpose(1, 2), state


def gated_linear_attention(at, initial):
    return naive_recurrent_gla(at("q"), at("k"), at("v"), at("log_decay"), initial, output_final_state=True)


def kimi_delta_attention(at, initial):
    sides = unit(at("q")), unit(at("k")), at("v"), at("log_decay"), at("beta")
    return naive_recurrent_kda(*sides, initial_state=initial, output_final_state=True)


REFERENCES = {
    "delta_net": delta_net,
    "gated_linear_attention": gated_linear_attention,
    "kimi_delta_attention": kimi_delta_attention,
}


@lru_cache
def model_of(rule, fast_decay=False):
    model = tiny_model((rule, rule), seed=1, dtype=torch.float32, d_k=8, d_v=5).requires_grad_(False)
    if fast_decay:
        decay_bias = model.blocks[0].mixer.get_parameter("decay.1.bias" if "linear" in rule else "dt_bias")
        decay_bias.copy_(torch.linspace(-60.0, 5.0, len(decay_bias)) * (1 if "linear" in rule else -1))
    return model


def compare(model, rule, length, backend, with_state):
    tokens = tokens_of(model, length=length)
    state = None
    if with_state:
        _, state = model(tokens_of(model, length=3, seed=1), return_state=True)
        matrix = state.layers[0].matrix
        noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(length))
        state = state.with_matrix(0, noise)
    initial = None if state is None else state.layers[0].matrix
    (_, after), cache = model.run_with_cache(tokens, state=state, return_state=True, backend=backend)
    read, matrix = REFERENCES[rule](lambda name: cache[PREFIX + name], initial)
    assert distance(cache[f"{PREFIX}read"], read) <= BOUND
    assert distance(after.layers[0].matrix, matrix) <= BOUND
    return cache


@pytest.mark.parametrize("rule", REFERENCES)
@pytest.mark.parametrize("length", [1, 5, 64, 100])
@pytest.mark.parametrize("backend", ["auto", "step"])
@pytest.mark.parametrize("with_state", [False, True], ids=["afresh", "from a state"])
def test_the_reads_and_the_state(rule, length, backend, with_state, as_users_run):
    compare(model_of(rule), rule, length, backend, with_state)


@pytest.mark.parametrize("rule", ["gated_linear_attention", "kimi_delta_attention"])
@pytest.mark.parametrize("length", [5, 100])
def test_channels_that_forget_within_a_step(rule, length, as_users_run):
    cache = compare(model_of(rule, fast_decay=True), rule, length, "auto", True)
    log_decay = cache[f"{PREFIX}log_decay"]
    assert log_decay.min() < -10 and log_decay.max() > -0.1


def test_the_comparison_can_fail():
    """A probe that asked the state before its decay, as in Gated DeltaNet, would be seen."""
    model = model_of("kimi_delta_attention")
    tokens = tokens_of(model, length=20)
    _, native = model.run_with_cache(tokens)

    def undecayed(probe, hook):
        return unit(native[f"{PREFIX}k"])

    with model.hooks(fwd_hooks=[(f"{PREFIX}probe", undecayed)]):
        _, cache = model.run_with_cache(tokens)
    read, _ = kimi_delta_attention(lambda name: cache[PREFIX + name], None)
    assert distance(cache[f"{PREFIX}read"], read) > 1e-3
