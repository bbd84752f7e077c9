"""incl_bwd: frozen or trainable, under no_grad or not, the gradients are the same and nothing else is touched."""

from functools import partial

import pytest
import torch

from tests.hooked_recurrent.models import HYBRID, RULES, distance, over_stacks, tiny_model, tokens_of

pytestmark = pytest.mark.shapes_on_one_rule

EXACT = 1e-12


def metric(logits):
    return logits[0, -1, 5] - logits[1, 4, 2]


def every(name):
    return True


def note(log, tensor, hook):
    log.setdefault(hook.name, []).append(tuple(tensor.shape))


@over_stacks
def test_frozen_trainable_and_no_grad_agree(layer_types):
    model = tiny_model(layer_types, seed=1)
    tokens = tokens_of(model)
    expected = model(tokens)
    (logits, kept) = model.run_with_cache(tokens, names_filter=every, incl_bwd=True, metric=metric)
    assert distance(logits, expected) <= EXACT and not logits.requires_grad
    assert {weight.requires_grad for weight in model.parameters()} == {True}
    assert all(weight.grad is None for weight in model.parameters())
    assert set(kept.keys()) == {name + end for name in model.hook_dict for end in ("", "_grad")}
    assert not any(tensor.requires_grad for tensor in kept.values())
    model.requires_grad_(False)
    with torch.no_grad():
        _, frozen = model.run_with_cache(tokens, names_filter=every, incl_bwd=True, metric=metric)
        assert not torch.is_grad_enabled()
    assert {weight.requires_grad for weight in model.parameters()} == {False}
    for name, tensor in kept.items():
        assert torch.equal(tensor, frozen[name]), name
        assert tensor.shape == kept[name.removesuffix("_grad")].shape


@over_stacks
def test_gradients_of_one_hook_need_no_other(layer_types):
    """Gradients start at the lowest kept hook: a filter changes neither which numbers come nor what they are."""
    model = tiny_model(layer_types, seed=1).requires_grad_(False)
    tokens = tokens_of(model)
    _, whole = model.run_with_cache(tokens, incl_bwd=True, metric=metric)
    recurrent = [f"blocks.{layer}.mixer.hook_read" for layer in model.cfg.recurrent_layers]
    for names in (recurrent[-1:], recurrent, ["ln_final.hook_normalized"], ["hook_embed"]):
        _, some = model.run_with_cache(tokens, names_filter=names, incl_bwd=True, metric=metric)
        assert set(some.keys()) == {name + end for name in names for end in ("", "_grad")}
        for name in names:
            assert distance(some[f"{name}_grad"], whole[f"{name}_grad"]) <= EXACT


@over_stacks
def test_weights_keep_the_gradients_they_had(layer_types):
    model = tiny_model(layer_types, seed=1)
    tokens = tokens_of(model)
    model(tokens, return_type="loss").backward()
    before = [weight.grad.clone() for weight in model.parameters()]
    model.run_with_cache(tokens, incl_bwd=True, return_type="loss")
    assert all(torch.equal(weight.grad, old) for weight, old in zip(model.parameters(), before, strict=True))
    frozen = next(model.parameters()).requires_grad_(False)
    with pytest.raises(ZeroDivisionError):
        model.run_with_cache(tokens, incl_bwd=True, metric=lambda logits: 1 / 0)
    assert [weight.requires_grad for weight in model.parameters()].count(False) == 1 and not frozen.requires_grad


def test_a_state_is_constant():
    model = tiny_model(HYBRID, seed=1)
    tokens = tokens_of(model)
    _, state = model(tokens[:, :6], return_state=True)
    assert state.layers[0].matrix.requires_grad
    options = {"incl_bwd": True, "metric": metric, "names_filter": "blocks.0.mixer.hook_read"}
    _, cache = model.run_with_cache(tokens[:, 6:], state=state, **options)
    _, again = model.run_with_cache(tokens[:, 6:], state=state.detach(), **options)
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(cache["blocks.0.mixer.hook_read_grad"], again["blocks.0.mixer.hook_read_grad"])
    (logits, after), _ = model.run_with_cache(tokens[:, 6:], state=state, return_state=True, **options)
    assert logits.shape == (2, 6, 29) and after.position == 12
    assert not logits.requires_grad and not after.layers[0].matrix.requires_grad


def test_what_is_differentiated():
    model = tiny_model(HYBRID, seed=1)
    tokens = tokens_of(model)
    run = partial(model.run_with_cache, tokens, names_filter="hook_embed", incl_bwd=True)
    loss, by_loss = run(return_type="loss")
    (logits, same), by_both = run(return_type="both")
    _, doubled = run(return_type="both", metric=lambda both: 2 * both[1])
    assert loss.shape == same.shape == () and logits.shape == (2, 12, 29)
    assert torch.equal(by_loss["hook_embed_grad"], by_both["hook_embed_grad"])
    assert distance(doubled["hook_embed_grad"], 2 * by_loss["hook_embed_grad"]) <= EXACT


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({}, ValueError, r"the output has shape \(2, 12, 29\): give return_type='loss', or a metric"),
        ({"return_type": None}, TypeError, "the output is NoneType"),
        ({"metric": lambda logits: logits[0]}, ValueError, r"the result of metric has shape \(12, 29\)"),
        ({"metric": lambda logits: 3.0}, TypeError, "the result of metric is float"),
        ({"metric": lambda logits: torch.tensor(1.0)}, ValueError, "depends on none of the activations that are kept"),
        ({"metric": metric, "names_filter": []}, ValueError, "depends on none of the activations that are kept"),
        ({"metric": metric, "incl_bwd": False}, ValueError, "give incl_bwd=True as well"),
    ],
    ids=["no scalar", "nothing", "no scalar metric", "a number", "a constant", "nothing kept", "no backward"],
)
def test_what_cannot_be_differentiated(options, error, words):
    model = tiny_model(HYBRID, seed=1)
    with pytest.raises(error, match=words):
        model.run_with_cache(tokens_of(model), **({"incl_bwd": True} | options))
    assert not any(point.in_use for point in model.hook_dict.values())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


def test_inference_mode_is_refused():
    model = tiny_model(HYBRID, seed=1)
    with torch.inference_mode(), pytest.raises(ValueError, match="torch.inference_mode rules out"):
        model.run_with_cache(tokens_of(model), incl_bwd=True, metric=metric)


@pytest.mark.parametrize("rule", RULES)
def test_an_activation_that_nothing_depends_on_has_zero_gradients(rule):
    """Also of the states of a stepped layer, whose last tokens backward never meets."""
    model = tiny_model((rule, rule), seed=1)
    name = "blocks.1.mixer.hook_state"
    _, cache = model.run_with_cache(
        tokens_of(model), names_filter=every, incl_bwd=True, metric=lambda logits: logits[0, 4, 5]
    )
    assert cache[f"{name}_grad"].shape == cache[name].shape
    for key in (name, "blocks.0.mixer.hook_write", "blocks.0.mixer.hook_q"):
        assert cache[f"{key}_grad"][:, 5:].abs().max() == 0 and cache[f"{key}_grad"][0, :5].abs().max() > 0
        assert cache[f"{key}_grad"][1].abs().max() == 0


def test_an_activation_that_a_function_replaced_by_constants_has_its_gradient():
    """Of what the hook hands on: the rest of the model is differentiated there as anywhere."""
    model = tiny_model(HYBRID, seed=1).requires_grad_(False)
    tokens = tokens_of(model)
    name = "blocks.1.hook_resid_pre"
    _, plain = model.run_with_cache(tokens, incl_bwd=True, metric=metric)
    with model.hooks(fwd_hooks=[(name, lambda tensor, hook: plain[name])]):
        _, cache = model.run_with_cache(tokens, incl_bwd=True, metric=metric)
    assert distance(cache[f"{name}_grad"], plain[f"{name}_grad"]) <= EXACT
    assert not plain[name].requires_grad
    assert cache["blocks.0.hook_resid_post_grad"].abs().max() == 0


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@over_stacks
def test_backward_functions_fire_at_every_hook(layer_types, frozen):
    model = tiny_model(layer_types, seed=1).requires_grad_(not frozen)
    tokens = tokens_of(model, length=10)
    _, state = model(tokens[:, :6], return_state=True)
    state = state.detach()
    for some, options in ((tokens, {}), (tokens[:, 6:], {"state": state})):
        log = {}
        with model.hooks(bwd_hooks=[(every, partial(note, log))]):
            model(some, return_type="loss", **options).backward()
        length = some.shape[1]
        assert set(log) == set(model.hook_dict)
        for name, shapes in log.items():
            stepped = name.endswith("hook_state")
            assert len(shapes) == (length if stepped else 1), name
            assert shapes[0][0] == 2, name


def test_a_tensor_at_two_hooks_has_two_gradients():
    """Each is of what that hook hands on, and not of the other use of the same tensor."""
    model = tiny_model(HYBRID, seed=1).requires_grad_(False)
    tokens = tokens_of(model)
    names = ["blocks.0.hook_mixer_out", "blocks.1.hook_mixer_out"]
    _, plain = model.run_with_cache(tokens)
    shared = plain[names[0]].clone().requires_grad_()

    def put(tensor, hook):
        return shared

    with model.hooks(fwd_hooks=[(name, put) for name in names]):
        _, cache = model.run_with_cache(tokens, names_filter=names, incl_bwd=True, metric=metric)
    apart = [shared.detach().clone().requires_grad_() for _ in names]
    hooks = [(name, lambda tensor, hook, own=own: own) for name, own in zip(names, apart, strict=True)]
    expected = torch.autograd.grad(metric(model.run_with_hooks(tokens, fwd_hooks=hooks)), apart)
    for name, gradient in zip(names, expected, strict=True):
        assert distance(cache[f"{name}_grad"], gradient) <= EXACT
