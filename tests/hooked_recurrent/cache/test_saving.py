"""What a cache keeps: positions, heads, dtype and device are cut from what a whole cache holds; runs that stop at a layer."""

from functools import lru_cache, partial

import pytest
import torch

from hooked_recurrent import WriteEdit
from hooked_recurrent.memory import effective_attention, half_life, retention, spectrum
from tests.hooked_recurrent.models import ALL_LINEAR, HYBRID, RULES, distance, over_stacks, tiny_model, tokens_of

pytestmark = pytest.mark.shapes_on_one_rule

EXACT = 1e-12
ALL = slice(None)
SCORES = ("hook_attn_scores", "hook_pattern", "hook_attn_scores_grad", "hook_pattern_grad")


@lru_cache
def model_of(layer_types=ALL_LINEAR):
    return tiny_model(layer_types, seed=1).requires_grad_(False)


def started(model, start, length=14):
    tokens = tokens_of(model, length=length)
    if start == "fresh":
        return tokens, {}
    return tokens[:, 6:], {"state": model(tokens[:, :6], return_state=True)[1]}


def every(name):
    return True


def note(fired, tensor, hook):
    fired.add(hook.name)


def picked(name, tensor, places, heads):
    """What a filtered cache should hold of a whole cache's tensor."""
    tensor = tensor[:, :, places] if name.endswith(SCORES) else tensor[:, places]
    return tensor[:, :, heads] if ".mixer." in name else tensor


def assert_same(a, b, name=""):
    assert a.shape == b.shape and a.dtype == b.dtype, name
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda words: f"{name}: {words}")


over_starts = pytest.mark.parametrize("start", ["fresh", "from a state"])


@over_starts
@pytest.mark.parametrize(
    "positions, absolute",
    [
        (8, [8]),
        (slice(7, 13, 2), [7, 9, 11]),
        (slice(11, None), [11, 12, 13]),
        ([12, 8, 8], [8, 12]),
        (torch.tensor([9, 7]), [7, 9]),
    ],
    ids=str,
)
@over_stacks
def test_positions(layer_types, positions, absolute, start):
    model = model_of(layer_types)
    tokens, options = started(model, start)
    first = 14 - tokens.shape[1]
    _, whole = model.run_with_cache(tokens, names_filter=every, **options)
    logits, cache = model.run_with_cache(tokens, names_filter=every, positions=positions, **options)
    assert cache.positions == tuple(absolute) and cache.heads == (0, 1, 2, 3)
    assert whole.positions == tuple(range(first, 14))
    assert distance(logits, model(tokens, **options)) <= EXACT
    assert set(cache.keys()) == set(model.hook_dict)
    for name, tensor in cache.items():
        assert_same(tensor, picked(name, whole[name], [p - first for p in absolute], ALL), name)


@over_starts
@pytest.mark.parametrize(
    "heads, numbers",
    [(-2, [2]), (slice(1, 3), [1, 2]), ([3, 0, 3], [0, 3])],
    ids=str,
)
@over_stacks
def test_heads_with_gradients(layer_types, heads, numbers, start):
    model = model_of(layer_types)
    tokens, options = started(model, start)
    options |= {"names_filter": every, "incl_bwd": True, "return_type": "loss"}
    _, whole = model.run_with_cache(tokens, **options)
    _, cache = model.run_with_cache(tokens, heads=heads, positions=slice(9, 12), **options)
    assert cache.heads == tuple(numbers)
    assert set(cache.keys()) == {name + end for name in model.hook_dict for end in ("", "_grad")}
    places = [position - whole.positions[0] for position in (9, 10, 11)]
    for name, tensor in cache.items():
        assert_same(tensor, picked(name, whole[name], places, numbers), name)


def test_kinds_of_indices():
    model = model_of()
    for positions, absolute in [(torch.tensor(10), (10,)), (range(7, 9), (7, 8)), (ALL, tuple(range(12)))]:
        _, cache = model.run_with_cache(tokens_of(model), positions=positions, heads=torch.tensor([1]))
        assert (cache.positions, cache.heads) == (absolute, (1,))


@pytest.mark.parametrize("rule", RULES)
def test_stepped_states_are_cut_token_by_token(rule):
    model = model_of((rule, rule))
    tokens, options = started(model, "from a state")
    name = "blocks.0.mixer.hook_state"

    def shrink(state, hook):
        return 0.9 * state if int(hook.positions[0]) == 9 else state

    options |= {"names_filter": name, "incl_bwd": True, "return_type": "loss"}
    with model.hooks(fwd_hooks=[(name, shrink)]):
        _, whole = model.run_with_cache(tokens, **options)
        _, cache = model.run_with_cache(tokens, positions=[12, 8], heads=[1, 2], **options)
    for key in (name, f"{name}_grad"):
        assert cache[key].shape == (2, 2, 2, 3, 5)
        assert_same(cache[key], whole[key][:, [2, 6]][:, :, [1, 2]])
    assert not torch.equal(whole[name][:, 3], model.run_with_cache(tokens, **options)[1][name][:, 3])


@pytest.mark.parametrize("name", ["blocks.1.mixer.hook_write", "blocks.1.mixer.hook_state", "blocks.1.mixer.hook_q"])
def test_no_more_is_held_than_asked_for(name):
    model = model_of()
    _, cache = model.run_with_cache(tokens_of(model), names_filter=name, positions=slice(2, 4), heads=1)
    tensor = cache[name]
    assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@over_stacks
def test_dtype_and_device(layer_types):
    model = model_of(layer_types)
    tokens = tokens_of(model)
    _, whole = model.run_with_cache(tokens)
    _, cache = model.run_with_cache(tokens, dtype=torch.float16, device="cpu")
    assert all(tensor.dtype == torch.float16 for tensor in cache.values())
    for name, tensor in cache.items():
        assert torch.equal(tensor, whole[name].half()), name
    assert distance(cache.state(0, 1, 5).double(), whole.state(0, 1, 5)) <= 1e-2
    assert cache.state(0, 1, 5).dtype == torch.float32
    key, value = torch.ones(3, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    edit = WriteEdit(0, 1, 5, "add", key=key, value=value)
    _, edited = model.run_with_cache(tokens, dtype=torch.float32, edits=[edit])
    assert edited.write(0, 1, 5).A.dtype == torch.float32 and edited.write(0, 1, 5).A.shape == (2, 3, 2)


@over_starts
@over_stacks
def test_writes_and_states_of_a_filtered_cache(layer_types, start):
    model = model_of(layer_types)
    tokens, options = started(model, start)
    last = model.cfg.recurrent_layers[-1]
    key, value = torch.ones(3, dtype=torch.float64), torch.linspace(-2, 1, 5, dtype=torch.float64)
    options["edits"] = [WriteEdit(last, head, 8, "add", key=key, value=value) for head in (1, 2)]
    first = 14 - tokens.shape[1]
    _, whole = model.run_with_cache(tokens, **options)
    _, cache = model.run_with_cache(tokens, positions=[7, 8, 12], heads=[2, 3], **options)
    local = [position - first for position in (7, 8, 12)]
    for layer in model.cfg.recurrent_layers:
        for pos in (*local, local[2] - tokens.shape[1]):
            assert_same(cache.write(layer, 3, pos).AB, whole.write(layer, 3, pos).AB)
        pair = slice(local[0], local[1] + 1)
        assert_same(cache.write(layer, slice(2, None), pair).AB, whole.write(layer, slice(2, None), pair).AB)
        assert_same(cache.write(layer, -1, pair).AB, whole.write(layer, 3, pair).AB)
        assert cache.write(layer, ALL, ALL).AB.shape == (2, 3, 2, 3, 5)
    with pytest.raises(IndexError, match="head 1 is not in the cache, which kept heads 2, 3"):
        cache.write(0, 1, local[0])
    where = f"position {local[0] + 2}{f' of the call .absolute {9}.' if first else ''} is not in the cache, which kept"
    with pytest.raises(IndexError, match=where):
        cache.write(0, 2, local[0] + 2)
    with pytest.raises(IndexError, match="is not in the cache"):
        cache.write(0, 2, slice(local[0], local[2]))
    with pytest.raises(ValueError, match=rf"state after position 8 takes all positions.*positions=slice\({first}, 9\)"):
        cache.state(0, 2, local[1])
    _, early = model.run_with_cache(tokens, positions=slice(0, 10), heads=[2, 3], **options)
    for layer in model.cfg.recurrent_layers:
        for head, pos in [
            (3, 0),
            (-1, local[1]),
            (slice(2, 4), slice(0, local[1] + 1, 2)),
            (2, slice(local[1], 0, -1)),
        ]:
            assert_same(early.state(layer, head, pos), whole.state(layer, head, pos))
    with pytest.raises(IndexError, match="is not in the cache"):
        early.state(0, 2, 10 - first)


@over_starts
@pytest.mark.parametrize("rule", RULES)
def test_the_memory_room_reads_a_filtered_cache(rule, start):
    model = model_of((rule, rule))
    tokens, options = started(model, start)
    _, whole = model.run_with_cache(tokens, **options)
    _, cache = model.run_with_cache(tokens, heads=[1, 3], positions=slice(0, 11), **options)
    length = len(cache.positions)
    for look in (effective_attention, retention, spectrum, half_life):
        assert look(cache, 1).heads == (1, 3) and look(cache, 1, 3).heads == (3,)
        with pytest.raises(IndexError, match="head 2 is not in the cache, which kept heads 1, 3"):
            look(cache, 1, 2)
        with pytest.raises(IndexError, match="head 4 is out of range: there are 4"):
            look(cache, 1, 4)
    mine, theirs = effective_attention(cache, 1, -1), effective_attention(whole, 1, 3)
    assert_same(mine.coefficient, theirs.coefficient[:, :, :length, :length])
    assert_same(mine.read(), theirs.read()[:, :length])
    assert (
        distance(spectrum(cache, 1).singular_values, spectrum(whole, 1, [1, 3]).singular_values[:, :, :length]) <= 1e-10
    )
    _, gappy = model.run_with_cache(tokens, positions=[7, 9], **options)
    for look in (effective_attention, retention, spectrum):
        with pytest.raises(ValueError, match=rf"left some out: .*positions=slice\({14 - tokens.shape[1]}, 10\)"):
            look(gappy, 1)
    assert_same(
        half_life(gappy, 1).log_decay, half_life(whole, 1).log_decay[:, [p - whole.positions[0] for p in (7, 9)]]
    )


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"positions": -1}, IndexError, "positions are absolute and start at 0, got -1"),
        ({"positions": slice(-3, None)}, IndexError, "positions are absolute, start at 0 and go forward"),
        ({"positions": slice(9, 7, -1)}, IndexError, "go forward"),
        ({"positions": 14}, IndexError, "position 14 is out of range: this call spans 6 to 13"),
        ({"positions": [7, 3]}, IndexError, "position 3 is out of range: this call spans 6 to 13"),
        ({"positions": slice(0, 6)}, ValueError, "chooses none of 6 to 13"),
        ({"positions": []}, ValueError, "chooses none of 6 to 13"),
        ({"positions": torch.ones(8, dtype=torch.bool)}, TypeError, "a position must be an integer, got torch.bool"),
        ({"positions": [1.5]}, TypeError, "a position must be an integer, got torch.float"),
        ({"heads": 4}, IndexError, "head 4 is out of range: there are 4"),
        ({"heads": []}, ValueError, "no head is asked for"),
        ({"heads": [True]}, TypeError, "a head must be an integer, got torch.bool"),
        ({"dtype": torch.int32}, TypeError, "kept as floats, got dtype torch.int32"),
        ({"state": "here"}, TypeError, "state must be a RecurrentState, got str"),
        ({"state": "here", "incl_bwd": True}, TypeError, "state must be a RecurrentState, got str"),
    ],
    ids=str,
)
def test_bad_choices(options, error, words, as_users_run):
    model = model_of()
    tokens, started_options = started(model, "from a state")
    with pytest.raises(error, match=words):
        model.run_with_cache(tokens, **(started_options | options))
    assert not any(point.in_use for point in model.hook_dict.values())


@over_starts
@over_stacks
def test_stop_at_layer(layer_types, start):
    model = model_of(layer_types)
    tokens, options = started(model, start)
    n_layers = model.cfg.n_layers
    _, whole = model.run_with_cache(tokens, **options)
    stream = [whole["hook_embed"], *(whole[f"blocks.{layer}.hook_resid_post"] for layer in range(n_layers))]
    for stop in range(-n_layers, n_layers + 1):
        last = stop % n_layers if stop < 0 else stop
        fired = set()
        with model.hooks(fwd_hooks=[(every, partial(note, fired))]):
            model(tokens, stop_at_layer=stop, **options)
        assert not any(name.startswith(tuple(f"blocks.{layer}." for layer in range(last, n_layers))) for name in fired)
        assert not any(name.startswith("ln_final") for name in fired)
        assert_same(model(tokens, stop_at_layer=stop, **options), stream[last])
        out, cache = model.run_with_cache(tokens, stop_at_layer=stop, positions=slice(8, 10), **options)
        assert_same(out, stream[last])
        assert len(cache) > 0 and set(cache.keys()) == {
            n for n in fired if not n.endswith(("hook_write", "hook_state"))
        }
        places = [position - whole.positions[0] for position in (8, 9)]
        for name, tensor in cache.items():
            assert_same(tensor, picked(name, whole[name], places, ALL), name)
        assert model(tokens, return_type=None, stop_at_layer=stop, **options) is None


def test_stop_at_layer_with_edits_and_gradients():
    model = model_of(HYBRID)
    tokens, options = started(model, "fresh")
    edit = WriteEdit(0, 1, 3, "delete")
    _, whole = model.run_with_cache(tokens, edits=[edit])
    out, cache = model.run_with_cache(
        tokens, edits=[edit], stop_at_layer=1, incl_bwd=True, metric=lambda resid: resid[0, 5].sum()
    )
    assert_same(out, whole["blocks.0.hook_resid_post"])
    expected = torch.zeros_like(out)
    expected[0, 5] = 1.0
    assert torch.equal(cache["blocks.0.hook_resid_post_grad"], expected)
    assert cache.write_grad(0, 2, 5).abs().max() > 0 and cache.write_grad(0, 2, 6).abs().max() == 0


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"stop_at_layer": 4}, IndexError, "stop_at_layer 4 is out of range: the model has 3 layers"),
        ({"stop_at_layer": -4}, IndexError, "stop_at_layer -4 is out of range: the model has 3 layers"),
        ({"stop_at_layer": 1, "return_type": "loss"}, ValueError, "no return_type 'loss'"),
        ({"stop_at_layer": 1, "return_state": True}, ValueError, "no state can be returned: layers 1 to 2 do not run"),
        (
            {"stop_at_layer": -1, "edits": [WriteEdit(2, 1, 3, "delete")]},
            ValueError,
            "layer 2, head 1, position 3 does not",
        ),
    ],
    ids=str,
)
def test_bad_stops(options, error, words):
    model = model_of(HYBRID)
    with pytest.raises(error, match=words):
        model(tokens_of(model), **options)
    with pytest.raises(error, match=words):
        model.run_with_cache(tokens_of(model), **options)


def test_a_filter_that_names_a_hook_above_the_stop():
    model = model_of(HYBRID)
    with pytest.raises(KeyError, match="this run has no hook 'blocks.2.hook_resid_pre'"):
        model.run_with_cache(tokens_of(model), names_filter="blocks.2.hook_resid_pre", stop_at_layer=2)
