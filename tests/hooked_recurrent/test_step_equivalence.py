"""The law of the abstraction: one call, any split into calls, and token by token give the same, edited in any way.

Hook functions and edits, of all three kinds, are random functions of absolute positions. Logits, every cached activation and
the final state are compared in float64.
"""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hooked_recurrent.edits.draws import BATCH, LENGTH, any_edits, composite, model_of
from tests.hooked_recurrent.models import HYBRID, RULES, distance, over_stacks, tokens_of

pytestmark = pytest.mark.shapes_on_one_rule

TOLERANCE = 1e-9
# Hooks of values whose sign the recurrence or the softmax counts on (or that are -inf by design): scaled, never shifted.
SIGNED = ("hook_beta", "hook_dt", "hook_scale", "hook_attn_scores", "hook_pattern")


def by_position(tensor, hook, *, seed, in_place=False):
    """Scale and shift some absolute positions by amounts that only the position, the channel and the seed decide."""
    positions = hook.positions.to(tensor.dtype)
    axis = 2 if hook.name.endswith(("hook_attn_scores", "hook_pattern")) else 1
    shape = [1] * tensor.ndim
    shape[axis] = -1
    chosen = ((hook.positions * 7 + seed) % 3 == 0).reshape(shape)
    scale = torch.where(chosen, 1 + 0.3 * torch.sin(1.7 * positions + seed).reshape(shape), 1.0)
    shift = torch.where(chosen, 0.1 * torch.cos(0.9 * positions + seed).reshape(shape), 0.0)
    if hook.name.endswith("hook_log_decay"):
        shift = -shift.abs()  # downward, also where a rule has no decay of its own
    elif hook.name.endswith(SIGNED):
        shift = torch.zeros_like(shift)
    else:
        shift = shift * torch.arange(1, tensor.shape[-1] + 1).to(tensor.dtype).sin()
    if in_place:
        tensor.mul_(scale).add_(shift)
        return None
    return tensor * scale + shift


def run_in_pieces(model, tokens, sizes, *, fwd_hooks, edits, names_filter=None, state=None):
    """Feed the tokens in pieces of these sizes; logits and caches joined over positions, the final state, the pieces."""
    logits, caches, spans, start = [], [], [], 0
    for size in sizes:
        with model.hooks(fwd_hooks=fwd_hooks):
            (out, state), cache = model.run_with_cache(
                tokens[:, start : start + size],
                names_filter=names_filter,
                state=state,
                return_state=True,
                edits=edits,
            )
        logits.append(out)
        caches.append(cache)
        spans.append((start, start + size))
        start += size
    return torch.cat(logits, dim=1), caches, state, spans


def assert_same_run(whole, pieces):
    """Logits, every cached activation and every tensor of the final state."""
    (logits, (cache,), state, _), (other_logits, caches, other_state, spans) = whole, pieces
    assert distance(other_logits, logits) <= TOLERANCE
    assert all(set(piece.keys()) == set(cache.keys()) for piece in caches)
    for name in cache.keys():
        if name.endswith(("hook_attn_scores", "hook_pattern")):
            for piece, (start, stop) in zip(caches, spans, strict=True):
                mine = cache[name][:, :, start:stop, :stop]
                torch.testing.assert_close(piece[name], mine, rtol=TOLERANCE, atol=TOLERANCE)
        else:
            joined = torch.cat([piece[name] for piece in caches], dim=1)
            assert distance(joined, cache[name]) <= TOLERANCE, name
    assert other_state.position == state.position
    for layer, other in zip(state.layers, other_state.layers, strict=True):
        assert layer.tensors().keys() == other.tensors().keys()
        for field, tensor in layer.tensors().items():
            assert distance(other.tensors()[field], tensor) <= TOLERANCE, field


@composite
def scenarios(draw, layer_types, max_hooks=5):
    """A model, hook functions, edits, a split and what to cache."""
    model = model_of(layer_types, draw(st.integers(0, 3)))
    names = list(model.hook_dict)
    chosen = draw(st.lists(st.sampled_from(names), max_size=max_hooks, unique=True))
    in_place = draw(st.booleans())
    hooks = [(name, partial(by_position, seed=seed, in_place=in_place)) for seed, name in enumerate(chosen)]
    edits = draw(st.lists(any_edits(model), max_size=4))
    cuts = sorted(draw(st.sets(st.integers(1, LENGTH - 1), max_size=4)))
    sizes = [stop - start for start, stop in zip([0, *cuts], [*cuts, LENGTH], strict=True)]
    everything = draw(st.booleans())
    names_filter = None
    if everything:  # the matrix hooks too, which makes every layer step; and the softmax patterns
        names_filter = list(model.hook_dict)
    return model, tokens_of(model, BATCH, LENGTH, draw(st.integers(0, 9))), hooks, edits, sizes, names_filter


def check(scenario):
    model, tokens, hooks, edits, sizes, names_filter = scenario
    run = partial(run_in_pieces, model, tokens, fwd_hooks=hooks, edits=edits, names_filter=names_filter)
    whole = run([LENGTH])
    assert_same_run(whole, run(sizes))
    assert_same_run(whole, run([1] * LENGTH))


@over_stacks
def test_any_split_gives_the_same(layer_types, as_users_run):
    @given(scenarios(layer_types))
    def law(scenario):
        check(scenario)

    law()


@pytest.mark.slow
@over_stacks
def test_any_split_gives_the_same_over_many_draws(layer_types, as_users_run):
    @settings(max_examples=100)
    @given(scenarios(layer_types, max_hooks=12))
    def law(scenario):
        check(scenario)

    law()


def hooks_one_by_one():
    """(layers, hook): every hook of a lower block of every rule, and those of the hybrid's softmax layer."""
    for rule in RULES:
        names = model_of((rule, rule), 0).hook_dict
        yield from (
            pytest.param((rule, rule), name, id=f"{rule}-{name}") for name in names if name.startswith("blocks.0.")
        )
    names = model_of(HYBRID, 0).hook_dict
    yield from (pytest.param(HYBRID, name, id=name) for name in names if name.startswith("blocks.1.attn."))


@pytest.mark.parametrize(("layer_types", "name"), list(hooks_one_by_one()))
def test_every_hook_alone(layer_types, name, as_users_run):
    """Each hook by itself, so that no draw can leave one out; and the function must matter."""
    model = model_of(layer_types, 0)
    tokens = tokens_of(model, BATCH, LENGTH)
    hooks = [(name, partial(by_position, seed=1))]
    run = partial(run_in_pieces, model, tokens, fwd_hooks=hooks, edits=(), names_filter=[name])
    whole = run([LENGTH])
    assert distance(whole[0], model(tokens)) > 1e-6
    assert_same_run(whole, run([4, 1, 6]))
    assert_same_run(whole, run([1] * LENGTH))


@over_stacks
def test_in_place_edits_equal_returned_ones(layer_types, as_users_run):
    """For every hook at once: a function that changes its tensor in place reaches what follows the hook, and only that."""
    model = model_of(layer_types, 1)
    tokens = tokens_of(model, BATCH, LENGTH)
    for name in model.hook_dict:
        returned = run_in_pieces(model, tokens, [LENGTH], fwd_hooks=[(name, partial(by_position, seed=2))], edits=())
        changed = run_in_pieces(
            model, tokens, [LENGTH], fwd_hooks=[(name, partial(by_position, seed=2, in_place=True))], edits=()
        )
        assert torch.equal(returned[0], changed[0]), name
        for key in returned[1][0].keys():
            assert torch.equal(returned[1][0][key], changed[1][0][key]), (name, key)


@over_stacks
@pytest.mark.parametrize("backend", ["step", "chunked"])
def test_long_texts_in_many_chunks(layer_types, backend, as_users_run):
    model = model_of(layer_types, 2)
    tokens = tokens_of(model, BATCH, 150)
    whole = model(tokens)
    assert distance(model(tokens, backend=backend), whole) <= TOLERANCE
    state, logits = None, []
    for piece in tokens.split([63, 1, 1, 64, 21], dim=1):
        out, state = model(piece, state=state, return_state=True, backend=backend)
        logits.append(out)
    assert distance(torch.cat(logits, dim=1), whole) <= TOLERANCE


@over_stacks
def test_hooks_know_their_absolute_positions(layer_types, as_users_run):
    model = model_of(layer_types, 0)
    tokens = tokens_of(model, BATCH, LENGTH)
    seen = {}

    def note(tensor, hook):
        seen.setdefault(hook.name, []).extend(hook.positions.tolist())

    names = list(model.hook_dict)
    state = None
    for piece in tokens.split([4, 1, 6], dim=1):
        with model.hooks(fwd_hooks=[(name, note) for name in names]):
            _, state = model(piece, state=state, return_state=True)
    assert set(seen) == set(names)
    assert all(positions == list(range(LENGTH)) for positions in seen.values())


@pytest.mark.parametrize("rule", RULES)
def test_the_law_can_fail(rule, as_users_run):
    """A function of the place within the call, not of the absolute position, is caught by the comparison above."""
    model = model_of((rule, rule), 0)
    tokens = tokens_of(model, BATCH, LENGTH)

    def first_of_the_call(tensor, hook):
        tensor[:, 0] *= 2

    run = partial(run_in_pieces, model, tokens, fwd_hooks=[("blocks.0.mixer.hook_k", first_of_the_call)], edits=())
    with pytest.raises(AssertionError):
        assert_same_run(run([LENGTH]), run([5, 6]))
