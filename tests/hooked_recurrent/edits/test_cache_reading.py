"""WriteEdit with reading "cache": o_t is read with the native write, and only what comes later sees the change."""

import pytest
import torch

from hooked_recurrent import StateEdit, WriteEdit
from tests.hooked_recurrent.edits.draws import model_of, random_tensor
from tests.hooked_recurrent.models import RULES, distance, over_stacks, tokens_of

pytestmark = pytest.mark.shapes_on_one_rule

LAYER, HEAD, POSITION = 0, 2, 5
EXACT = 1e-9
SIDES = {"key": random_tensor(3), "value": random_tensor(5)}
CASES = {
    "replace": SIDES,
    "add": SIDES,
    "delete": {},
    "scale": {"scale": -0.7},
    "net replace": {"form": "net", **SIDES},
    "net delete": {"form": "net"},
}
over_cases = pytest.mark.parametrize("case", CASES)


@pytest.fixture(params=RULES)
def model(request):
    """A model of every rule."""
    return model_of((request.param, request.param))


def edit(case, position=POSITION, reading="cache", **given):
    return WriteEdit(LAYER, HEAD, position, case.split()[-1], reading=reading, **CASES[case], **given)


def run_by_hand(model, tokens, case, positions, rows=slice(None)):
    """Token by token; after each edited one, its native write in the kept state is exchanged for the new one."""
    state, logits = None, []
    for place in range(tokens.shape[1]):
        before = state
        (out, state), cache = model.run_with_cache(tokens[:, [place]], state=state, return_state=True)
        logits.append(out)
        if place not in positions:
            continue
        role = {name: cache[f"blocks.{LAYER}.mixer.hook_{name}"][:, 0, HEAD] for name in ("write_key", "write_value")}
        native = torch.einsum("bk,bv->bkv", role["write_key"], role["write_value"])
        new = torch.outer(SIDES["key"], SIDES["value"]).expand_as(native)
        new = {"replace": new, "add": native + new, "delete": 0 * native, "scale": -0.7 * native}[case.split()[-1]]
        if case.startswith("net") and model.blocks[LAYER].mixer.erases and before is not None:
            erase, probe = (cache[f"blocks.{LAYER}.mixer.hook_{name}"][:, 0, HEAD] for name in ("erase", "probe"))
            asked = torch.einsum("bk,bkv->bv", probe, before.layers[LAYER].matrix[:, HEAD])
            native = native + torch.einsum("bk,bv->bkv", erase, asked)
        matrix = state.layers[LAYER].matrix.clone()
        matrix[rows, HEAD] += (new - native)[rows]
        state = state.with_matrix(LAYER, matrix)
    return torch.cat(logits, dim=1), state


@over_stacks
@over_cases
def test_it_equals_the_exchange_in_a_kept_state(layer_types, case):
    model = model_of(layer_types)
    tokens = tokens_of(model)
    for position in (0, torch.tensor([8, 3, 2, 11])):
        where = torch.arange(12)[position].reshape(-1).tolist()
        logits, state = model(tokens, edits=[edit(case, position)], return_state=True)
        expected, expected_state = run_by_hand(model, tokens, case, where)
        assert distance(logits, expected) <= EXACT
        assert distance(state.layers[LAYER].matrix, expected_state.layers[LAYER].matrix) <= EXACT
        assert distance(logits, model(tokens)) > 1e-6
    one_row = model(tokens, edits=[edit(case, batch=1)])
    assert distance(one_row, run_by_hand(model, tokens, case, [POSITION], rows=slice(1, 2))[0]) <= EXACT


@over_cases
def test_the_readings_differ_at_the_position_alone_where_they_differ_first(model, case):
    """One leaves the state of t as the other does; only the logits of t, or what comes of them, tell them apart."""
    tokens = tokens_of(model)
    plain = model(tokens)
    states, logits = {}, {}
    for reading in ("in_recurrence", "cache"):
        one = edit(case, reading=reading)
        logits[reading] = model(tokens, edits=[one])
        states[reading] = model.snapshots(tokens, [POSITION + 1], edits=[one])[POSITION + 1].layers[LAYER].matrix
    assert distance(states["cache"], states["in_recurrence"]) <= EXACT
    assert distance(logits["cache"][:, : POSITION + 1], plain[:, : POSITION + 1]) <= EXACT
    assert distance(logits["cache"][:, POSITION + 1 :], plain[:, POSITION + 1 :]) > 1e-6
    assert distance(logits["in_recurrence"][:, POSITION], plain[:, POSITION]) > 1e-6


@over_cases
def test_the_hooks_show_the_native_write(model, case):
    tokens = tokens_of(model)
    names = [f"blocks.{LAYER}.mixer.hook_write_{side}" for side in ("key", "value")]
    _, native = model.run_with_cache(tokens)
    _, cache = model.run_with_cache(tokens, edits=[edit(case)])
    assert all(torch.equal(cache[name], native[name]) for name in names)
    seen = cache.state(LAYER, HEAD, POSITION)
    assert distance(seen, native.state(LAYER, HEAD, POSITION)) <= EXACT
    assert distance(cache.state(LAYER, HEAD, POSITION, carried=True), seen) > 1e-6


def test_replacing_the_write_by_itself_changes_nothing(model):
    tokens = tokens_of(model)
    _, cache = model.run_with_cache(tokens)
    sides = {side: cache[f"blocks.{LAYER}.mixer.hook_write_{side}"][:, :, HEAD] for side in ("key", "value")}
    same = WriteEdit(LAYER, HEAD, slice(0, None), **sides, reading="cache")
    assert distance(model(tokens, edits=[same]), model(tokens)) <= EXACT


def test_edits_of_one_write_compose_in_their_order(model):
    tokens = tokens_of(model)

    def same(first, second):
        return distance(model(tokens, edits=first), model(tokens, edits=second)) <= EXACT

    half = WriteEdit(LAYER, HEAD, POSITION, "scale", scale=0.5, reading="cache")
    halved = WriteEdit(LAYER, HEAD, POSITION, "add", key=SIDES["key"], value=0.5 * SIDES["value"], reading="cache")
    assert same([edit("add"), half], [half, halved])
    assert not same([edit("add"), half], [half, edit("add")])
    assert same([edit("delete"), edit("add")], [edit("replace")])
    assert same([edit("net delete"), edit("add")], [edit("net replace")])
    assert same([edit("net delete"), edit("net delete")], [edit("net delete")])
    assert same([edit("delete"), edit("net delete")], [edit("net delete")])
    # an edit in the recurrence comes first, wherever it stands
    written = edit("replace", reading="in_recurrence")
    assert same([edit("delete"), written], [written, edit("delete")])
    assert not same([edit("delete"), written], [edit("delete")])  # it was read, once
    # with states: a write that is taken out of a doubled state leaves the rest doubled
    double = StateEdit(LAYER, HEAD, POSITION, "scale", scale=2.0, reading="cache")
    assert same([double, edit("add"), edit("delete")], [double, edit("delete")])
    assert not same([double, edit("delete")], [edit("delete"), double])


def test_it_exchanges_what_functions_wrote(model):
    """The write that is taken out is the one that went in, also where functions changed its factors or its matrix."""
    tokens = tokens_of(model)

    def double(tensor, hook):
        return 2 * tensor

    for name in ("hook_write_value", "hook_write"):
        hooks = [(f"blocks.{LAYER}.mixer.{name}", double)]
        with model.hooks(fwd_hooks=hooks):
            cached = model.snapshots(tokens, [POSITION + 1], edits=[edit("delete")])[POSITION + 1]
            plain = model.snapshots(tokens, [POSITION + 1], edits=[edit("delete", reading="in_recurrence")])
        assert distance(cached.layers[LAYER].matrix, plain[POSITION + 1].layers[LAYER].matrix) <= EXACT


def test_gradients_flow_into_it(model):
    tokens = tokens_of(model)

    def loss(key, value):
        edits = [
            WriteEdit(LAYER, HEAD, 4, "replace", key=key, value=value, form="net", reading="cache"),
            edit("scale", 4),
        ]
        return model(tokens, edits=edits, return_type="loss")

    assert torch.autograd.gradcheck(loss, tuple(side.clone().requires_grad_() for side in SIDES.values()))


def test_an_unknown_reading(as_users_run):
    with pytest.raises(ValueError, match="unknown reading 'later'; expected one of in_recurrence, cache"):
        WriteEdit(0, 0, 1, "delete", reading="later")
