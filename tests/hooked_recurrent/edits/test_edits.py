"""WriteEdit: identities that hold exactly, what composes with what, and one clear error per bad input."""

from functools import lru_cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_recurrent import WriteEdit
from tests.hooked_recurrent.models import (
    ALL_LINEAR,
    HYBRID,
    RULES,
    STACKS,
    distance,
    over_stacks,
    tiny_model,
    tokens_of,
)

pytestmark = pytest.mark.shapes_on_one_rule

LAYER, HEAD, POSITION = 0, 2, 5
D_K, D_V = 3, 5
EXACT = 1e-12


@lru_cache
def model_of(layer_types=ALL_LINEAR):
    return tiny_model(layer_types, seed=1).requires_grad_(False)


@pytest.fixture(params=RULES)
def model(request):
    """A model of every rule."""
    return model_of((request.param, request.param))


def native(model, tokens, layer=LAYER, head=HEAD):
    """The native write factors of a head: [batch, pos, d_k], [batch, pos, d_v]."""
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith(("write_key", "write_value")))
    prefix = f"blocks.{layer}.mixer.hook_write_"
    return cache[f"{prefix}key"][:, :, head], cache[f"{prefix}value"][:, :, head]


def edit(op, **given):
    return WriteEdit(LAYER, HEAD, given.pop("position", POSITION), op, **given)


def vectors(*lead, seed=0):
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(*lead, D_K, generator=generator, dtype=torch.float64)
    return {"key": key, "value": torch.randn(*lead, D_V, generator=generator, dtype=torch.float64)}


def run(model, tokens, *edits, **options):
    return model(tokens, edits=edits, **options)


def changes(model, tokens, *edits):
    """How far the edits move the logits, relative to their scale."""
    return distance(run(model, tokens, *edits), model(tokens))


@pytest.mark.parametrize("position", [POSITION, slice(2, 9), slice(0, None), torch.tensor([1, 4, 7])], ids=str)
@over_stacks
@pytest.mark.parametrize("layer", [0, -1])
def test_replacing_the_native_write_by_itself_changes_nothing(position, layer_types, layer):
    model = model_of(layer_types)
    layer = layer % model.cfg.n_layers
    tokens = tokens_of(model)
    key, value = native(model, tokens, layer)
    where = torch.arange(tokens.shape[1])[position]
    where = where[None] if where.ndim == 0 else where
    same = WriteEdit(layer, HEAD, position, key=key[:, where], value=value[:, where])
    assert changes(model, tokens, same) <= EXACT


def test_delete_then_add_of_the_native_write_is_exact(model):
    tokens = tokens_of(model)
    key, value = native(model, tokens)
    sides = {"key": key[:, [POSITION]], "value": value[:, [POSITION]]}
    assert changes(model, tokens, edit("delete")) > 1e-4
    assert changes(model, tokens, edit("delete"), edit("add", **sides)) <= EXACT


def test_net_delete_leaves_decay_alone(model):
    """For every rule: the state after the token is the decayed state before it, whatever the rule would have erased."""
    tokens = tokens_of(model)
    _, cache = model.run_with_cache(tokens, edits=[edit("delete", form="net")])
    before, after = (cache.state(LAYER, HEAD, position) for position in (POSITION - 1, POSITION))
    decay = cache[f"blocks.{LAYER}.mixer.hook_log_decay"][:, POSITION, HEAD].exp()
    decay = decay[..., None] if decay.ndim == 2 else decay[..., None, None]
    assert distance(after, decay * before) <= EXACT
    _, native_cache = model.run_with_cache(tokens)
    assert distance(native_cache.state(LAYER, HEAD, POSITION), decay * before) > 1e-3
    same = torch.equal(run(model, tokens, edit("delete")), run(model, tokens, edit("delete", form="net")))
    assert same == (not model.blocks[LAYER].mixer.erases)


def test_net_delete_equals_beta_zero_at_that_token_and_head():
    model = model_of()
    tokens = tokens_of(model)

    def no_beta(beta, hook):
        beta[:, hook.positions == POSITION, HEAD] = 0.0

    expected = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{LAYER}.mixer.hook_beta", no_beta)])
    assert distance(run(model, tokens, edit("delete", form="net")), expected) <= EXACT
    assert distance(run(model, tokens, edit("delete")), expected) > 1e-5


def test_net_replace_by_the_net_write_changes_nothing():
    """k (beta v - alpha beta S^T k)^T is all that the token did: writing it without the erase gives the same memory."""
    model = model_of()
    tokens = tokens_of(model)
    _, cache = model.run_with_cache(tokens)
    prefix = f"blocks.{LAYER}.mixer.hook_"
    before = cache.state(LAYER, HEAD, POSITION - 1)
    erase, probe = cache[f"{prefix}erase"][:, POSITION, HEAD], cache[f"{prefix}probe"][:, POSITION, HEAD]
    key, value = cache[f"{prefix}write_key"][:, POSITION, HEAD], cache[f"{prefix}write_value"][:, POSITION, HEAD]
    strength = (erase * key).sum(-1) / key.square().sum(-1)
    net_value = value + strength[:, None] * torch.einsum("bk,bkv->bv", probe, before)
    net = edit("replace", form="net", key=key[:, None], value=net_value[:, None])
    assert changes(model, tokens, net) <= EXACT


def test_net_replace_is_net_delete_then_add(model):
    tokens = tokens_of(model)
    sides = vectors()
    both = run(model, tokens, edit("delete", form="net"), edit("add", **sides))
    assert distance(run(model, tokens, edit("replace", form="net", **sides)), both) <= EXACT


def test_scale_one_is_the_identity_and_scale_zero_is_delete(model):
    tokens = tokens_of(model)
    assert torch.equal(run(model, tokens, edit("scale", scale=1.0)), model(tokens))
    assert distance(run(model, tokens, edit("scale", scale=0.0)), run(model, tokens, edit("delete"))) <= EXACT
    twice = run(model, tokens, edit("scale", scale=2.0), edit("scale", scale=1.5))
    assert distance(twice, run(model, tokens, edit("scale", scale=3.0))) <= EXACT


def test_add_equals_a_function_on_hook_write_that_adds_the_matrix(model):
    tokens = tokens_of(model)
    sides = vectors()

    def add(write, hook):
        write[:, hook.positions == POSITION, HEAD] += torch.outer(sides["key"], sides["value"])

    expected = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{LAYER}.mixer.hook_write", add)])
    assert distance(expected, model(tokens)) > 1e-5
    assert distance(run(model, tokens, edit("add", **sides)), expected) <= EXACT


@pytest.mark.parametrize("op", ["replace", "delete", "scale"])
def test_every_op_equals_its_function_on_hook_write(op, model):
    tokens = tokens_of(model)
    sides = vectors() if op == "replace" else {}

    def change(write, hook):
        here = hook.positions == POSITION
        new = torch.outer(sides["key"], sides["value"]) if sides else (-0.7 if op == "scale" else 0.0)
        write[0, here, HEAD] = new if sides else write[0, here, HEAD] * new

    expected = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{LAYER}.mixer.hook_write", change)])
    scale = {"scale": -0.7} if op == "scale" else {}
    assert distance(run(model, tokens, edit(op, batch=0, **sides, **scale)), expected) <= EXACT


def test_edits_compose_in_their_order(model):
    tokens = tokens_of(model)
    one, two = vectors(seed=1), vectors(seed=2)
    add_one, add_two = edit("add", **one), edit("add", **two)
    half = edit("scale", scale=0.5)
    replaced = edit("replace", **two)

    def same(first, second):
        return distance(run(model, tokens, *first), run(model, tokens, *second)) <= EXACT

    assert same([add_one, add_two], [add_two, add_one])
    assert same([add_one, replaced], [replaced])
    assert same([add_one, edit("delete")], [edit("delete")])
    assert same([edit("delete"), add_one], [edit("replace", **one)])
    halved = {"key": one["key"], "value": 0.5 * one["value"]}
    assert same([add_one, half], [half, edit("add", **halved)])
    assert not same([add_one, half], [half, add_one])
    assert not same([replaced, add_one], [add_one, replaced])


def test_edits_at_different_sites_do_not_touch_each_other(model):
    tokens = tokens_of(model)
    first = WriteEdit(0, 1, 3, "delete")
    second = WriteEdit(1, 2, 6, "replace", **vectors())
    third = WriteEdit(0, 3, slice(4, 8), "scale", scale=0.3, batch=1)
    orders = [(first, second, third), (third, first, second), (second, third, first)]
    for order in orders[1:]:
        assert distance(run(model, tokens, *order), run(model, tokens, *orders[0])) <= EXACT


def test_batch_rows_keep_to_themselves(model):
    tokens = tokens_of(model, batch=3)
    sides = vectors(2, 1)
    logits = run(model, tokens, edit("replace", batch=torch.tensor([2, 0]), **sides))
    untied = run(model, tokens, edit("replace", batch=0, key=sides["key"][0], value=sides["value"][0]))
    assert torch.equal(logits[1], untied[1])
    assert distance(logits[1], model(tokens)[1]) <= EXACT
    for row, index in ((2, 0), (0, 1)):
        alone = edit("replace", key=sides["key"][index], value=sides["value"][index])
        assert distance(logits[row], run(model, tokens[[row]], alone)[0]) <= EXACT


def test_one_vector_per_position(model):
    tokens = tokens_of(model)
    positions = torch.tensor([8, 2, 5])
    sides = vectors(3)
    singles = [
        edit("replace", position=int(p), key=sides["key"][i], value=sides["value"][i]) for i, p in enumerate(positions)
    ]
    expected = run(model, tokens, *singles)
    assert distance(run(model, tokens, edit("replace", position=positions, **sides)), expected) <= EXACT
    ordered = {name: side[[1, 2, 0]] for name, side in sides.items()}
    assert distance(run(model, tokens, edit("replace", position=slice(2, 9, 3), **ordered)), expected) <= EXACT


@given(
    st.sampled_from(list(STACKS.values())),
    st.integers(0, 11),
    st.sampled_from(["replace", "add", "delete", "scale"]),
    st.sampled_from(["auto", "step", "chunked"]),
    st.integers(0, 3),
)
def test_the_past_stays_exactly_as_it_was(layer_types, position, op, backend, head):
    model = model_of(layer_types)
    tokens = tokens_of(model)
    given_sides = vectors() if op in ("replace", "add") else {"scale": 3.0} if op == "scale" else {}
    logits = model(tokens, edits=[WriteEdit(0, head, position, op, **given_sides)], backend=backend)
    plain = model(tokens, backend=backend)
    if op in ("replace", "add"):
        # These untie the erase, which rounds differently; so they are compared with an edit of the last token.
        assert position == 0 or distance(logits[:, :position], plain[:, :position]) <= EXACT
        plain = model(tokens, edits=[WriteEdit(0, head, tokens.shape[1] - 1, op, **given_sides)], backend=backend)
    assert torch.equal(logits[:, :position], plain[:, :position])
    assert distance(logits[:, position:], model(tokens)[:, position:]) > 1e-9


def test_states_below_and_before_stay_exactly_as_they_were(model):
    tokens = tokens_of(model)
    edits = [WriteEdit(1, HEAD, POSITION, "delete")]
    plain = model.snapshots(tokens, range(tokens.shape[1] + 1))
    edited = model.snapshots(tokens, range(tokens.shape[1] + 1), edits=edits)
    for position in plain:
        assert torch.equal(plain[position].layers[0].matrix, edited[position].layers[0].matrix)
        unchanged = torch.equal(plain[position].layers[1].matrix, edited[position].layers[1].matrix)
        assert unchanged == (position <= POSITION)


def test_edits_may_be_given_as_any_iterable_and_are_left_as_they_were(model):
    tokens = tokens_of(model)
    sides = vectors()
    kept = {name: side.clone() for name, side in sides.items()}
    logits = model(tokens, edits=iter([edit("replace", **sides)]))
    assert torch.equal(logits, run(model, tokens, edit("replace", **sides)))
    assert all(torch.equal(sides[name], kept[name]) for name in kept)


def test_gradients_flow_into_an_edit(model):
    tokens = tokens_of(model)
    sides = {name: side.requires_grad_() for name, side in vectors().items()}

    def loss(key, value):
        return run(model, tokens, edit("replace", key=key, value=value), return_type="loss")

    assert torch.autograd.gradcheck(loss, tuple(sides.values()))


KEY, VALUE = torch.ones(D_K, dtype=torch.float64), torch.ones(D_V, dtype=torch.float64)
BOTH = {"key": KEY, "value": VALUE}
BAD_EDITS = {
    "op": ((0, 0, 1, "swap"), {}, ValueError, "unknown op 'swap'; expected one of replace, add, delete, scale"),
    "form": ((0, 0, 1, "delete"), {"form": "gross"}, ValueError, "unknown form 'gross'"),
    "replace without key": ((0, 0, 1, "replace"), {"value": VALUE}, ValueError, "op 'replace' needs key"),
    "add without value": ((0, 0, 1, "add"), {"key": KEY}, ValueError, "op 'add' needs value"),
    "delete with key": ((0, 0, 1, "delete"), {"key": KEY}, ValueError, "op 'delete' takes no key"),
    "scale with value": ((0, 0, 1, "scale"), {"value": VALUE, "scale": 2.0}, ValueError, "takes no value"),
    "scale without scale": ((0, 0, 1, "scale"), {}, ValueError, "op 'scale' needs scale"),
    "delete with scale": ((0, 0, 1, "delete"), {"scale": 2.0}, ValueError, "op 'delete' takes no scale"),
    "net add": ((0, 0, 1, "add"), {**BOTH, "form": "net"}, ValueError, "op 'add' has no net form"),
    "net scale": ((0, 0, 1, "scale"), {"scale": 1.0, "form": "net"}, ValueError, "op 'scale' has no net form"),
    "nan key": ((0, 0, 1), {"key": KEY * torch.nan, "value": VALUE}, ValueError, "the key of the edit at layer 0"),
    "inf value": ((0, 0, 1), {"key": KEY, "value": VALUE / 0}, ValueError, "position 1 holds NaN or Inf"),
    "nan scale": ((0, 0, 1, "scale"), {"scale": float("nan")}, ValueError, "is nan, expected a finite number"),
    "list key": ((0, 0, 1), {"key": [1.0] * D_K, "value": VALUE}, ValueError, "is list, expected a float tensor"),
    "int key": ((0, 0, 1), {"key": KEY.long(), "value": VALUE}, ValueError, "expected a float tensor"),
    "scalar key": ((0, 0, 1), {"key": KEY[0], "value": VALUE}, ValueError, "expected a float tensor"),
    "negative int": ((0, 0, -1, "delete"), {}, IndexError, "positions are absolute and start at 0, got -1"),
    "negative slice": ((0, 0, slice(-3, None), "delete"), {}, IndexError, "start at 0, got -3:"),
    "negative stop": ((0, 0, slice(0, -1), "delete"), {}, IndexError, "start at 0, got 0:-1"),
    "negative tensor": ((0, 0, torch.tensor([2, -1]), "delete"), {}, IndexError, r"start at 0, got \[2, -1\]"),
    "backward slice": ((0, 0, slice(5, 1, -1), "delete"), {}, ValueError, "must go forward, got step -1"),
    "no step": ((0, 0, slice(1, 5, 0), "delete"), {}, ValueError, "must go forward, got step 0"),
    "float position": ((0, 0, torch.tensor([1.0]), "delete"), {}, TypeError, "must be integers, got torch.float32"),
    "mask position": ((0, 0, torch.tensor([True]), "delete"), {}, TypeError, "must be integers, got torch.bool"),
    "empty slice": ((0, 0, slice(5, 5), "delete"), {}, ValueError, "names no position: 5:5"),
    "empty tensor": ((0, 0, torch.tensor([], dtype=torch.long), "delete"), {}, ValueError, "names no position"),
    "too many": ((0, 0, 4), {"key": KEY.expand(3, -1), "value": VALUE}, ValueError, "is for 3 positions, not for 1"),
    "too few": (
        (0, 0, slice(2, 6)),
        {"key": KEY, "value": VALUE.expand(3, -1)},
        ValueError,
        "the value of the edit at layer 0, head 0, position 2:6 is for 3 positions, not for 4",
    ),
}


@pytest.mark.parametrize("case", BAD_EDITS)
def test_an_edit_that_makes_no_sense_is_refused_when_it_is_made(case, as_users_run):
    site, given_words, error, words = BAD_EDITS[case]
    with pytest.raises(error, match=words):
        WriteEdit(*site, **given_words)


BAD_SITES = {
    "layer": ((3, 0, 1, "delete"), {}, IndexError, "layer 3 is out of range: the model has layers 0 to 2"),
    "negative layer": ((-1, 0, 1, "delete"), {}, IndexError, "layer -1 is out of range"),
    "softmax layer": ((1, 0, 1, "delete"), {}, ValueError, r"layer 1 is softmax attention; the recurrent .* \(0, 2\)"),
    "head": ((0, 4, 1, "delete"), {}, IndexError, "head 4 is out of range: the layer has heads 0 to 3"),
    "negative head": ((0, -1, 1, "delete"), {}, IndexError, "head -1 is out of range"),
    "position": ((0, 0, 12, "delete"), {}, IndexError, "position 12 is out of range: the text ends before position 12"),
    "slice": ((0, 0, slice(3, 14), "delete"), {}, IndexError, "position 13 is out of range"),
    "tensor": ((0, 0, torch.tensor([0, 99]), "delete"), {}, IndexError, "position 99 is out of range"),
    "row": ((0, 0, 1, "delete"), {"batch": 2}, IndexError, "batch row 2 of the edit at .* the batch has 2"),
    "negative row": ((0, 0, 1, "delete"), {"batch": -1}, IndexError, "batch row -1 of the edit"),
    "rows": ((0, 0, 1, "delete"), {"batch": torch.tensor([0, 7])}, IndexError, "batch row 7 of the edit"),
    "key width": ((0, 0, 1), {"key": VALUE, "value": VALUE}, ValueError, "position 1 has width 5, expected 3"),
    "value width": ((0, 0, 1), {"key": KEY, "value": KEY}, ValueError, "the value of .* has width 3, expected 5"),
    "rows of the key": (
        (0, 0, 1),
        {"key": KEY.expand(3, 1, -1), "value": VALUE},
        ValueError,
        r"the key of the edit at .* has shape \(3, 1, 3\), which is not \(2, positions, 3\)",
    ),
    "open slice, too few": (
        (0, 0, slice(3, None)),
        {"key": KEY.expand(4, -1), "value": VALUE},
        ValueError,
        r"position 3: has shape \(4, 3\), which is not \(2, positions, 3\)",
    ),
}


@pytest.mark.parametrize("case", BAD_SITES)
def test_an_edit_of_a_site_that_is_not_there_is_refused(case, as_users_run):
    site, given_words, error, words = BAD_SITES[case]
    model = model_of(HYBRID)
    with pytest.raises(error, match=words):
        model(tokens_of(model), edits=[WriteEdit(*site, **given_words)])


def test_a_call_with_a_state_leaves_other_positions_to_other_calls(model):
    tokens = tokens_of(model)
    later = WriteEdit(0, 0, 9, "delete")
    first, state = model(tokens[:, :6], return_state=True, edits=[later])
    second = model(tokens[:, 6:], state=state, edits=[later])
    assert distance(torch.cat([first, second], dim=1), model(tokens, edits=[later])) <= EXACT
