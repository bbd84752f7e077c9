"""A view of one head: SAELens's calls on it are the model's own on that head, flattened."""

import pytest
import torch

from hooked_recurrent import HookedRecurrentModel
from writesae.interop.saelens_model import saelens_model

HOOKS = ["blocks.1.mixer.hook_write_value", "blocks.1.mixer.hook_write", "blocks.2.mixer.hook_state"]


@pytest.fixture(scope="module")
def model():
    return HookedRecurrentModel.from_pretrained("tiny-gated-deltanet")


@pytest.fixture
def tokens(model):
    return torch.randint(0, model.cfg.d_vocab, (2, 9))


@pytest.mark.parametrize("names", ["alone", "listed", "all"])
@pytest.mark.parametrize("hook", HOOKS)
def test_the_cache_has_one_head_flattened(model, tokens, hook, names):
    view = saelens_model(model, hook, 2)
    whole = model.run_with_cache(tokens, names_filter=[hook])[1][hook]
    wanted = {"alone": hook, "listed": [hook], "all": [hook, "hook_embed"]}[names]
    logits, cache = view.run_with_cache(tokens, names_filter=wanted, prepend_bos=False)
    assert torch.equal(cache[hook], whole[:, :, 2].flatten(2))
    torch.testing.assert_close(logits, model(tokens))  # a hook on the states steps the layer
    assert ("hook_embed" in cache) == (names == "all")
    if whole.ndim == 5:  # key-first, row after row
        assert torch.equal(cache[hook][0, 3].view(32, 32), whole[0, 3, 2])


@pytest.mark.parametrize("hook", HOOKS)
def test_what_is_put_there_reaches_that_head_alone(model, tokens, hook):
    view, seen = saelens_model(model, hook, 2), []

    def halve(activations, hook):
        seen.append(activations.shape)
        return activations / 2

    def halve_whole(activations, hook):
        activations = activations.clone()
        activations[:, :, 2] /= 2
        return activations

    ours = view.run_with_hooks(tokens, fwd_hooks=[(hook, halve), ("hook_embed", lambda x, hook: x * 1.5)])
    expected = model.run_with_hooks(tokens, fwd_hooks=[(hook, halve_whole), ("hook_embed", lambda x, hook: x * 1.5)])
    torch.testing.assert_close(ours, expected)
    assert (ours - model(tokens)).abs().max() > 1e-3 and all(len(shape) == 3 for shape in seen)
    untouched = view.run_with_hooks(tokens, fwd_hooks=[(hook, lambda activations, hook: None)])
    torch.testing.assert_close(untouched, model(tokens))


def test_the_rest_is_the_models_own(model, tokens):
    view = saelens_model(model, HOOKS[0], 0)
    assert view.tokenizer is model.tokenizer and view.W_E is model.W_E
    assert torch.equal(view(tokens, return_type="loss"), model(tokens, return_type="loss"))


def test_errors(model):
    with pytest.raises(ValueError, match="no hook 'blocks.1.hook_wrote'"):
        saelens_model(model, "blocks.1.hook_wrote", 0)
    for head in (-1, 4):
        with pytest.raises(ValueError, match=f"head must be 0..3, got {head}"):
            saelens_model(model, HOOKS[0], head)
