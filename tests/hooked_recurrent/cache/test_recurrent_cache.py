"""The cache: single writes and states on demand equal the cached matrices; what is kept, and what gradients mean."""

from functools import lru_cache

import pytest
import torch

from hooked_recurrent import WriteEdit, reads_only
from tests.hooked_recurrent.models import ALL_LINEAR, HYBRID, RULES, distance, over_stacks, tiny_model, tokens_of

pytestmark = pytest.mark.shapes_on_one_rule

EXACT = 1e-12
MATRICES = ("hook_write", "hook_state")


@lru_cache
def model_of(layer_types=ALL_LINEAR):
    return tiny_model(layer_types, seed=1).requires_grad_(False)


@pytest.fixture(params=RULES)
def model(request):
    """A model of every rule."""
    return model_of((request.param, request.param))


def matrices(model, tokens, **options):
    """Cached hook_write and hook_state of every layer, by layer."""
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith(MATRICES), **options)
    layers = model.cfg.recurrent_layers
    return {(hook, layer): cache[f"blocks.{layer}.mixer.{hook}"] for hook in MATRICES for layer in layers}


INDICES = [(2, 5), (-1, -1), (slice(None), 3), (1, slice(2, 9, 3)), (slice(1, 3), slice(None)), (0, slice(8, 2, -2))]


def in_list(index, length):
    """torch has no slices that run backward."""
    return list(range(length))[index] if isinstance(index, slice) and (index.step or 1) < 0 else index


def added_write(layer, position, seed=0):
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(width, generator=generator, dtype=torch.float64) for width in (3, 5))
    return WriteEdit(layer, 2, position, "add", key=key, value=value)


@pytest.mark.parametrize("head, pos", INDICES, ids=str)
@pytest.mark.parametrize("start", ["fresh", "from a state"])
@pytest.mark.parametrize("edited", [False, True], ids=["native", "edited"])
@over_stacks
def test_write_and_state_equal_the_cached_matrices(layer_types, head, pos, start, edited):
    model = model_of(layer_types)
    last = model.cfg.recurrent_layers[-1]
    tokens = tokens_of(model, length=18)
    options = {}
    if start == "from a state":
        _, options["state"] = model(tokens[:, :6], return_state=True)
        tokens = tokens[:, 6:]
    if edited:
        delete = WriteEdit(0, 1, slice(3, 8), "delete", form="net")
        options["edits"] = [
            added_write(0, 9),
            added_write(last, slice(5, 9), 1),
            added_write(0, slice(2, None), 2),
            delete,
        ]
    cached = matrices(model, tokens, **options)
    _, cache = model.run_with_cache(tokens, **options)
    for layer in model.cfg.recurrent_layers:
        where = (slice(None), in_list(pos, 18), head)  # an int drops its axis, in both
        write = cache.write(layer, head, pos)
        expected = cached["hook_write", layer][where]
        assert write.AB.shape == expected.shape
        assert distance(write.AB, expected) <= EXACT
        assert write.A.shape[-1] == (1 + (2 if layer == 0 else 1) * edited)
        state, expected = cache.state(layer, head, pos), cached["hook_state", layer][where]
        assert state.shape == expected.shape
        assert distance(state, expected) <= EXACT


def test_the_last_state_is_the_final_state(model):
    tokens = tokens_of(model)
    (_, state), cache = model.run_with_cache(tokens, return_state=True)
    for layer in model.cfg.recurrent_layers:
        assert distance(cache.state(layer, slice(None), -1), state.layers[layer].matrix) <= EXACT


def test_states_follow_functions_on_the_factor_hooks(model):
    tokens = tokens_of(model)

    def halve(tensor, hook):
        return 0.5 * tensor

    names = ["hook_write_value", "hook_log_decay", *(["hook_probe"] if model.blocks[0].mixer.erases else [])]
    hooks = [(f"blocks.0.mixer.{name}", halve) for name in names]
    with model.hooks(fwd_hooks=hooks):
        cached = matrices(model, tokens)
        _, cache = model.run_with_cache(tokens)
    assert distance(cache.state(0, slice(None), slice(None)), cached["hook_state", 0]) <= EXACT
    assert distance(cache.write(0, slice(None), slice(None)).AB, cached["hook_write", 0]) <= EXACT


def test_no_state_is_made_up_where_a_function_changed_the_matrices(model):
    """The factors then do not tell the state, so the cache says so instead of giving another run's numbers."""
    tokens = tokens_of(model)
    with model.hooks(fwd_hooks=[("blocks.0.mixer.hook_write", lambda write, hook: 2 * write)]):
        _, cache = model.run_with_cache(tokens)
    with pytest.raises(ValueError, match="blocks.0.mixer.hook_write replaced writes by matrices"):
        cache.write(0, 0, 0)
    with pytest.raises(ValueError, match="blocks.0.mixer.hook_write replaced writes by matrices"):
        cache.state(0, 0, 0)
    assert cache.state(1, 0, 0).shape == (2, 3, 5)
    with model.hooks(fwd_hooks=[("blocks.1.mixer.hook_state", lambda state, hook: 2 * state)]):
        _, cache = model.run_with_cache(tokens)
    with pytest.raises(ValueError, match="blocks.1.mixer.hook_state changed states.*names_filter"):
        cache.state(1, 0, 0)
    assert cache.state(0, 0, 0).shape == (2, 3, 5)
    assert cache.write(1, 0, 0).AB.shape == (2, 3, 5)


@pytest.mark.parametrize("rule", RULES)
def test_backward_functions_change_nothing_that_the_factors_tell(rule):
    model = tiny_model((rule, rule), seed=1)
    tokens = tokens_of(model)
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: True, incl_bwd=True, return_type="loss")
    for layer in (0, 1):
        assert distance(cache.write(layer, 1, 4).AB, cache[f"blocks.{layer}.mixer.hook_write"][:, 4, 1]) <= EXACT
        assert distance(cache.state(layer, 1, 4), cache[f"blocks.{layer}.mixer.hook_state"][:, 4, 1]) <= EXACT


def test_bad_indices_and_layers():
    model = model_of(HYBRID)
    _, cache = model.run_with_cache(tokens_of(model))
    for method in (cache.write, cache.state):
        with pytest.raises(IndexError, match="head 4 is out of range: the cache holds 4"):
            method(0, 4, 0)
        with pytest.raises(IndexError, match="position 12 is out of range: the cache holds 12"):
            method(0, 0, 12)
        with pytest.raises(IndexError, match="position -13 is out of range"):
            method(0, 0, -13)
        with pytest.raises(ValueError, match=r"layer 1 has no matrix memory; the recurrent ones are \(0, 2\)"):
            method(1, 0, 0)
        with pytest.raises(ValueError, match="layer 7 has no matrix memory"):
            method(7, 0, 0)
    assert cache.state(0, 0, slice(5, 5)).shape == (2, 0, 3, 5)
    assert cache.write(0, 0, slice(5, 5)).AB.shape == (2, 0, 3, 5)


def test_factors_that_were_not_kept_are_asked_for(model):
    _, cache = model.run_with_cache(tokens_of(model), names_filter="blocks.0.mixer.hook_query")
    with pytest.raises(KeyError, match="blocks.0.mixer.hook_log_decay is not in the cache"):
        cache.state(0, 0, 0)


@over_stacks
def test_nothing_kept_materialises_a_matrix(layer_types):
    model = model_of(layer_types)
    _, cache = model.run_with_cache(tokens_of(model))
    assert set(cache.keys()) == {name for name in model.hook_dict if not name.endswith(MATRICES)}


@pytest.mark.parametrize("wanted", ["name", "list", "tuple", "predicate"])
def test_names_filter(wanted):
    model = model_of()
    name = "blocks.1.mixer.hook_write"
    names_filter = {"name": name, "list": [name], "tuple": (name,), "predicate": lambda n: n == name}[wanted]
    _, cache = model.run_with_cache(tokens_of(model), names_filter=names_filter)
    assert list(cache.keys()) == [name]


@over_stacks
def test_reading_matrices_does_not_change_results(layer_types):
    model = model_of(layer_types)
    tokens = tokens_of(model)
    logits, _ = model.run_with_cache(tokens, names_filter=lambda name: True)
    assert distance(logits, model(tokens)) <= EXACT
    seen = []
    watch = reads_only(lambda tensor, hook: seen.append((tensor.shape, hook.positions.tolist())))
    watched = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.mixer.hook_state", watch)])
    assert distance(watched, model(tokens)) <= EXACT
    assert seen == [((2, 12, 4, 3, 5), list(range(12)))]  # a reader gets all positions at once


def test_an_editor_of_states_is_called_token_by_token(model):
    tokens = tokens_of(model)
    seen = []

    def note(state, hook):
        seen.append((tuple(state.shape), hook.positions.tolist()))

    with model.hooks(fwd_hooks=[("blocks.0.mixer.hook_state", note)]):
        _, cache = model.run_with_cache(tokens, names_filter="blocks.0.mixer.hook_state")
    assert seen == [((2, 1, 4, 3, 5), [position]) for position in range(12)]
    expected = matrices(model, tokens)["hook_state", 0]
    assert distance(cache["blocks.0.mixer.hook_state"], expected) <= EXACT


@pytest.mark.parametrize("place", ["run_with_cache", "add_hook", "run_with_hooks", "hooks", "generate"])
def test_unknown_hook_names_are_answered_with_the_nearest(place):
    model = model_of()
    tokens, wrong = tokens_of(model), "blocks.0.mixer.hook_writekey"

    def nothing(tensor, hook):
        return None

    with pytest.raises(KeyError, match="'blocks.0.mixer.hook_writekey'.*did you mean 'blocks.0.mixer.hook_write_key'"):
        if place == "run_with_cache":
            model.run_with_cache(tokens, names_filter=[wrong])
        elif place == "add_hook":
            model.add_hook(wrong, nothing)
        elif place == "run_with_hooks":
            model.run_with_hooks(tokens, fwd_hooks=[(wrong, nothing)])
        elif place == "generate":
            model.generate(tokens, fwd_hooks=[(wrong, nothing)])
        else:
            with model.hooks(fwd_hooks=[(wrong, nothing)]):
                pass
    assert not any(point.in_use for point in model.hook_dict.values())


def test_remove_batch_dim(model):
    tokens = tokens_of(model, batch=1)
    _, kept = model.run_with_cache(tokens)
    _, cache = model.run_with_cache(tokens, remove_batch_dim=True)
    assert cache["blocks.0.mixer.hook_query"].shape == (12, 4, 3)
    assert torch.equal(cache.state(1, 2, 3), kept.state(1, 2, 3))
    with pytest.raises(ValueError, match="remove_batch_dim needs one sequence, got a batch of 2"):
        model.run_with_cache(tokens_of(model), remove_batch_dim=True)
    with pytest.raises(ValueError, match="remove_batch_dim needs return_cache_object=True"):
        model.run_with_cache(tokens, remove_batch_dim=True, return_cache_object=False)


def test_plain_dictionaries_and_other_devices(model):
    name = "blocks.0.mixer.hook_query"
    _, plain = model.run_with_cache(tokens_of(model), names_filter=name, return_cache_object=False)
    assert type(plain) is dict and list(plain) == [name]
    _, cache = model.run_with_cache(tokens_of(model), names_filter=name, device="cpu")
    assert torch.equal(cache[name], plain[name])


def test_cached_tensors_are_cut_from_the_graph_and_hooks_are_gone():
    model = tiny_model(seed=1)
    _, cache = model.run_with_cache(tokens_of(model))
    assert not any(tensor.requires_grad for tensor in cache.values())
    assert not any(point.in_use for point in model.hook_dict.values())
    with pytest.raises(ZeroDivisionError), model.hooks(fwd_hooks=[("hook_embed", lambda tensor, hook: 1 / 0)]):
        model.run_with_cache(tokens_of(model))
    assert not any(point.in_use for point in model.hook_dict.values())


def loss_of(model, tokens):
    return lambda: model(tokens, return_type="loss")


@over_stacks
def test_gradients_equal_autograd(layer_types):
    """incl_bwd against torch.autograd with respect to tensors put into the graph at the hooks."""
    model = tiny_model(layer_types, seed=1)
    tokens = tokens_of(model)
    _, cache = model.run_with_cache(tokens, incl_bwd=True, return_type="loss")
    layers = (0, model.cfg.recurrent_layers[-1])
    roles = ("write_key", "write_value", "query", "log_decay", "k", "v", "erase", "probe")
    names = [f"blocks.{layer}.mixer.hook_{role}" for layer in layers for role in roles]
    names += ["hook_embed", "blocks.1.attn.hook_q", "blocks.1.attn.hook_pattern"]
    names += ["blocks.0.hook_resid_post", "blocks.0.ln1.hook_scale"]
    names = [name for name in names if name in model.hook_dict]
    caught = {}

    def catch(tensor, hook):
        caught[hook.name] = tensor + torch.zeros_like(tensor)
        return caught[hook.name]

    # with an editor on write_key, erase and probe, the writes are free of the erase, as with a backward function there
    loss = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[(name, catch) for name in names])
    gradients = torch.autograd.grad(loss, [caught[name] for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        assert gradient.abs().max() > 0
        assert distance(cache[f"{name}_grad"], gradient) <= 1e-10, name


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("rule", RULES)
def test_matrix_gradients_equal_finite_differences(rule, matrix):
    """hook_write_grad is Lambda, the effect of one more unit in an entry of a write; hook_state_grad that of a state."""
    model = tiny_model((rule, rule), seed=1)
    tokens = tokens_of(model, length=7)
    name = f"blocks.0.mixer.{matrix}"
    _, cache = model.run_with_cache(tokens, names_filter=name, incl_bwd=True, return_type="loss")
    gradient = cache[f"{name}_grad"]
    assert gradient.shape == cache[name].shape == (2, 7, 4, 3, 5)
    # the two hooks show one quantity, and it is not the same at every position, so order matters
    for position, head, i, j in [(0, 1, 2, 4), (3, 0, 0, 0), (5, 3, 1, 2), (6, 2, 2, 3)]:
        measured = 0.0  # four points, whose error shrinks with the fourth power of the step
        for amount, weight in ((1e-5, 8), (-1e-5, -8), (2e-5, -1), (-2e-5, 1)):

            def nudge(tensor, hook, amount=amount, place=(position, head, i, j)):
                at, *rest = place
                here = (hook.positions == at).nonzero()
                if len(here):
                    tensor[(1, int(here[0, 0]), *rest)] += amount

            measured += weight * model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[(name, nudge)]) / 12e-5
        assert abs(gradient[1, position, head, i, j] - measured) <= 1e-8


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_factors_follow_from_the_gradient_of_the_write(rule):
    """d loss / d key = Lambda value and d loss / d value = Lambda^T key, once the erase is free of the write."""
    model = tiny_model((rule, rule), seed=1)
    tokens = tokens_of(model)
    _, cache = model.run_with_cache(
        tokens, incl_bwd=True, return_type="loss", names_filter=lambda name: ".0.mixer" in name
    )
    prefix = "blocks.0.mixer.hook_write"
    write, key, value = cache[f"{prefix}_grad"], cache[f"{prefix}_key"], cache[f"{prefix}_value"]
    assert distance(cache[f"{prefix}_key_grad"], torch.einsum("bphkv,bphv->bphk", write, value)) <= 1e-10
    assert distance(cache[f"{prefix}_value_grad"], torch.einsum("bphkv,bphk->bphv", write, key)) <= 1e-10


@over_stacks
def test_a_stacked_residual_stream_decomposes(layer_types):
    """transformer_lens's own tools run on the cache: the parts of the residual stream add up to it."""
    model = model_of(layer_types)
    tokens = tokens_of(model)
    _, cache = model.run_with_cache(tokens)
    parts = [cache["hook_embed"]]
    for layer in range(model.cfg.n_layers):
        hooks = [f"blocks.{layer}.hook_mixer_out", f"blocks.{layer}.hook_mlp_out"]
        parts += [cache[name] for name in hooks if name in model.hook_dict]
    assert distance(sum(parts), cache[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]) <= EXACT
    accumulated = cache.accumulated_resid(layer=1, incl_mid=False)
    assert torch.equal(accumulated[1], cache["blocks.1.hook_resid_pre"])
