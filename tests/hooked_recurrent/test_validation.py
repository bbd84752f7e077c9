"""Bad inputs of a call: each one is answered by one clear error, and NaN is traced to the hook where it began."""

import pytest
import torch

from hooked_recurrent import RecurrentState, WriteEdit
from tests.hooked_recurrent.models import ALL_LINEAR, HYBRID, RULES, tiny_model, tokens_of

TOKENS = torch.randint(29, (2, 6), generator=torch.Generator().manual_seed(0))
BAD_TOKENS = {
    "floats": (TOKENS.float(), TypeError, "tokens must be integers, got torch.float32"),
    "booleans": (TOKENS > 3, TypeError, "tokens must be integers, got torch.bool"),
    "an array": (TOKENS.numpy(), TypeError, "expected text or a tensor of tokens, got ndarray"),
    "a number": (3, TypeError, "expected text or a tensor of tokens, got int"),
    "a list of numbers": ([1, 2, 3], TypeError, "expected text or a tensor of tokens, got a list of int"),
    "nothing": (TOKENS[:, :0], ValueError, r"at least one token, got shape \(2, 0\)"),
    "no sequence": (TOKENS[:0], ValueError, r"at least one token, got shape \(0, 6\)"),
    "a scalar": (torch.tensor(3), ValueError, r"tokens must be \[batch, pos\] .* got shape \(\)"),
    "three axes": (TOKENS[None], ValueError, r"got shape \(1, 2, 6\)"),
    "too high": (TOKENS + 29, IndexError, "is out of range: the vocabulary has 29 tokens"),
    "negative": (TOKENS - 29, IndexError, "token -.* is out of range"),
    "text without a tokenizer": ("abc", ValueError, "this model has no tokenizer"),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model(HYBRID).requires_grad_(False)


@pytest.mark.parametrize("case", BAD_TOKENS)
def test_bad_tokens(case, model, as_users_run):
    tokens, error, words = BAD_TOKENS[case]
    with pytest.raises(error, match=words):
        model(tokens)
    with pytest.raises(error, match=words):
        model.run_with_cache(tokens)
    with pytest.raises(error, match=words):
        model.generate(tokens)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_any_integers_will_do_and_one_axis_too(dtype, model):
    expected = model(TOKENS)
    assert torch.equal(model(TOKENS.to(dtype)), expected)
    assert torch.allclose(model(TOKENS[0]), expected[:1])


def test_unknown_return_type(model):
    with pytest.raises(ValueError, match=r"unknown return_type 'logit'; expected one of \('logits', 'loss'"):
        model(TOKENS, return_type="logit")


def test_a_loss_needs_two_tokens(model):
    with pytest.raises(ValueError, match="a loss needs at least two tokens"):
        model(TOKENS[:, :1], return_type="loss")


def test_unknown_backend(model):
    with pytest.raises(ValueError, match="unknown scan backend 'fast'"):
        model(TOKENS, backend="fast")


def test_states_that_do_not_fit(model, as_users_run):
    _, state = model(TOKENS, return_state=True)
    with pytest.raises(ValueError, match="the state holds 2 sequences, the tokens 1; fork or index the state"):
        model(TOKENS[:1], state=state)
    other = tiny_model(ALL_LINEAR)
    with pytest.raises(ValueError, match="the state has 3 layers, the model 2"):
        other(TOKENS, state=state)
    _, narrow = tiny_model((*ALL_LINEAR, "gated_delta_net"))(TOKENS, return_state=True)
    with pytest.raises(
        ValueError, match="layer 1 of the state holds matrix and conv_tail, but .* keeps keys and values"
    ):
        model(TOKENS, state=narrow)
    _, wide = tiny_model(HYBRID, d_k=4)(TOKENS, return_state=True)
    with pytest.raises(
        ValueError, match=r"matrix of layer 0 of the state has shape \(4, 4, 5\), this layer's is \(4, 3, 5\)"
    ):
        model(TOKENS, state=wide)
    attention_like = RecurrentState(tuple(state.layers[layer] for layer in (1, 1, 2)), 6)
    with pytest.raises(
        ValueError, match="layer 0 of the state holds keys and values, but .* keeps matrix and conv_tail"
    ):
        model(TOKENS, state=attention_like)
    with pytest.raises(TypeError, match="state must be a RecurrentState, got tuple"):
        model(TOKENS, state=(state,))


def test_edits_that_are_none(model, as_users_run):
    with pytest.raises(TypeError, match="edits must be WriteEdits, StateEdits or ActivationEdits, got dict"):
        model(TOKENS, edits=[{"layer": 0}])
    with pytest.raises(TypeError, match="edits must be several, got a single WriteEdit: put it into a list"):
        model(TOKENS, edits=WriteEdit(0, 0, 0, "delete"))


POISONED = [
    "hook_embed",
    "blocks.0.mixer.hook_k",
    "blocks.0.mixer.hook_log_decay",
    "blocks.0.mixer.hook_write_value",
    "blocks.0.mixer.hook_write",
    "blocks.2.mixer.hook_state",
    "blocks.1.attn.hook_q",
    "blocks.1.attn.hook_attn_scores",
    "blocks.1.attn.hook_pattern",
    "blocks.1.mlp.hook_post",
    "ln_final.hook_normalized",
]
POISONS = [
    (name, poison, word)
    for name in POISONED
    for poison, word in ((torch.nan, "NaN"), (torch.inf, "Inf"))
    if not (name.endswith("attn_scores") and word == "Inf")  # infinite scores are what a mask is made of
]


@pytest.mark.parametrize(("name", "poison", "word"), POISONS)
@pytest.mark.parametrize("start", [0, 4])
def test_nan_is_traced_to_the_hook_and_the_position(name, poison, word, start, model):
    """The function poisons absolute position 7 of row 1; with start 4 the call goes on from a state."""
    tokens = tokens_of(model, length=12)
    state = model(tokens[:, :start], return_state=True)[1] if start else None

    def spoil(tensor, hook):
        here = (hook.positions == 7).nonzero()[:, 0]
        if name.endswith(("hook_attn_scores", "hook_pattern")):
            tensor[1, 2, here, :3] = poison
        else:
            tensor[1, here, ..., 0] = poison

    with pytest.raises(ValueError, match=f"{word} in {name} at position 7 of batch row 1$"):
        model.run_with_hooks(tokens[:, start:], fwd_hooks=[(name, spoil)], state=state)
    assert not any(point.in_use for point in model.hook_dict.values())
    assert torch.isfinite(model(tokens)).all()


def test_a_state_with_nan_is_noticed(model):
    tokens = tokens_of(model)
    _, state = model(tokens, return_state=True)
    bad = state.with_matrix(0, state.layers[0].matrix * torch.nan)
    with pytest.raises(ValueError, match="NaN in blocks.0.mixer.hook_read at position 12 of batch row 0"):
        model(tokens, state=bad)


def test_weights_with_nan_are_traced():
    model = tiny_model()
    with torch.no_grad():
        model.blocks[1].mixer.beta.weight[2, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN in blocks.1.mixer.hook_beta at position 0 of batch row 0"):
        model(TOKENS)


def test_snapshots_outside_the_text(model):
    with pytest.raises(IndexError, match="snapshot at 7 is out of range: the text spans 0 to 6"):
        model.snapshots(TOKENS, [3, 7])
    _, state = model(TOKENS, return_state=True)
    with pytest.raises(IndexError, match="snapshot at 5 is out of range: the text spans 6 to 12"):
        model.snapshots(TOKENS, [5], state=state)


def test_empty_states_fit_every_batch(model):
    from hooked_recurrent import LayerState

    empty = RecurrentState(tuple(LayerState() for _ in range(3)))
    assert torch.equal(model(TOKENS, state=empty), model(TOKENS))


@pytest.mark.parametrize("rule", RULES)
def test_nan_is_traced_to_every_hook_of_every_rule(rule):
    model = tiny_model((rule, rule)).requires_grad_(False)
    tokens = tokens_of(model, length=9)
    for name in model.hook_dict:

        def spoil(tensor, hook):
            tensor[1, (hook.positions == 7).nonzero()[:, 0], ..., 0] = torch.nan

        with pytest.raises(ValueError, match=f"NaN in {name} at position 7 of batch row 1$"):
            model.run_with_hooks(tokens, fwd_hooks=[(name, spoil)])
