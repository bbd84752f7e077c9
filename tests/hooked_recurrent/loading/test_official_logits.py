"""Logits equal transformers', on random models that its own classes make, save and run (float32).

Differences are largest absolute differences over the largest absolute logit; the bound is 1e-5.
"""

from functools import lru_cache

import pytest
import torch

from hooked_recurrent import HookedRecurrentModel
from tests.hooked_recurrent.loading.official import MODELS, logits_of, tokens_of
from tests.hooked_recurrent.models import distance

BOUND = 1e-5
LENGTHS = (1, 5, 63, 64, 65, 200)


@lru_cache
def pair(kind, layers, value_heads, spread=0.1):
    """Their model and ours, converted in memory; batches are always of 3 different texts."""
    theirs = MODELS[kind](layers=layers, value_heads=value_heads, initializer_range=spread)
    ours = HookedRecurrentModel.from_hf(theirs).requires_grad_(False)
    return theirs, ours


everything = [
    pytest.mark.parametrize("kind", MODELS),
    pytest.mark.parametrize("layers", ["linear", "hybrid"]),
    pytest.mark.parametrize("value_heads", [2, 4], ids=["value heads 1x", "value heads 2x"]),
]


def over_everything(test):
    for mark in everything:
        test = mark(test)
    return test


@over_everything
@pytest.mark.parametrize("spread", [0.1, 0.02])
def test_logits(kind, layers, value_heads, spread, as_users_run):
    theirs, ours = pair(kind, layers, value_heads, spread)
    assert ours.cfg.d_k != ours.cfg.d_v and ours.cfg.n_heads == value_heads and ours.cfg.mixer.n_key_heads == 2
    for length in LENGTHS:
        tokens = tokens_of(3, length, seed=length)
        assert distance(ours(tokens), logits_of(theirs, tokens)) <= BOUND, length


@over_everything
def test_logits_after_splitting_anywhere(kind, layers, value_heads, as_users_run):
    theirs, ours = pair(kind, layers, value_heads)
    tokens = tokens_of(3, 200)
    expected = logits_of(theirs, tokens)
    generator = torch.Generator().manual_seed(value_heads)
    for cuts in ([100], [1, 2, 64, 128, 199], torch.randint(1, 200, (6,), generator=generator).tolist()):
        edges = [0, *sorted(set(cuts)), 200]
        state, pieces = None, []
        for start, stop in zip(edges[:-1], edges[1:], strict=True):
            logits, state = ours(tokens[:, start:stop], state=state, return_state=True)
            pieces.append(logits)
        assert distance(torch.cat(pieces, dim=1), expected) <= BOUND, cuts


@over_everything
def test_forty_greedy_tokens(kind, layers, value_heads, as_users_run):
    theirs, ours = pair(kind, layers, value_heads)
    tokens = tokens_of(3, 20)
    # transformers' cache cannot tell its length in a stack without softmax layers
    expected = theirs.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=40,
        do_sample=False,
        use_cache=layers == "hybrid",
        eos_token_id=None,
        pad_token_id=0,
    )
    out = ours.generate(tokens, max_new_tokens=40)
    assert torch.equal(out, expected)
    best = ours(out[:, :-1])[:, 19:].topk(2, dim=-1).values
    assert (best[..., 0] - best[..., 1]).min() > 1e-5  # no near tie, so the comparison is not decided by rounding


@pytest.mark.parametrize("layers", ["linear", "hybrid"])
@pytest.mark.parametrize("kind", MODELS)
def test_our_float64_model_agrees_with_both(kind, layers, as_users_run):
    """Our own arithmetic in float64 is the reference beyond float32: neither library is far from it."""
    theirs, ours = pair(kind, layers, 4)
    exact = HookedRecurrentModel.from_hf(theirs).double()
    tokens = tokens_of(3, 200)
    reference = exact(tokens, backend="step")
    assert distance(exact(tokens), reference) <= 1e-10
    assert distance(ours(tokens).double(), reference) <= BOUND
    assert distance(logits_of(theirs, tokens).double(), reference) <= BOUND


@pytest.mark.parametrize("kind", MODELS)
def test_every_part_matters(kind, as_users_run):
    """The comparison would see a wrong mixer, softmax layer or MLP: without any one of them the logits are far away."""
    theirs, ours = pair(kind, "hybrid", 4)
    tokens = tokens_of(3, 65)
    expected = logits_of(theirs, tokens)
    for name in (
        "blocks.0.hook_mixer_out",
        "blocks.3.hook_mixer_out",
        "blocks.2.hook_mlp_out",
        "blocks.1.mixer.hook_state",
    ):
        without = ours.run_with_hooks(tokens, fwd_hooks=[(name, lambda tensor, hook: 0 * tensor)])
        assert distance(without, expected) > 100 * BOUND, name


@pytest.mark.parametrize("layers", ["linear", "hybrid"])
def test_hidden_states_of_every_layer(layers, as_users_run):
    theirs, ours = pair("text", layers, 4)
    tokens = tokens_of(3, 65)
    hidden = theirs(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states
    _, cache = ours.run_with_cache(tokens)
    for layer in range(ours.cfg.n_layers):
        assert distance(cache[f"blocks.{layer}.hook_resid_pre"], hidden[layer]) <= BOUND
    assert distance(cache["ln_final.hook_normalized"], hidden[-1]) <= BOUND
