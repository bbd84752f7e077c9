"""StateEdit: it equals a function on hook_state, cuts the scan instead of stepping it, and is told by the cache."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_recurrent import StateEdit, WriteEdit, reads_only
from hooked_recurrent.memory import effective_attention, retention, spectrum
from hooked_recurrent.scan import edited
from tests.hooked_recurrent.edits.draws import BATCH, LENGTH, READINGS, model_of, random_tensor, state_edits
from tests.hooked_recurrent.models import HYBRID, RULES, STACKS, distance, over_stacks, tokens_of

pytestmark = pytest.mark.shapes_on_one_rule

LAYER, HEAD, POSITION = 0, 2, 5
D_K, D_V = 3, 5
EXACT = 1e-9
HOOK = f"blocks.{LAYER}.mixer.hook_state"
MATRIX = random_tensor(D_K, D_V)
OPS = {"replace": {"matrix": MATRIX}, "add": {"matrix": MATRIX}, "delete": {}, "scale": {"scale": -0.7}}
over_ops = pytest.mark.parametrize("op", OPS)


@pytest.fixture(params=RULES)
def model(request):
    """A model of every rule."""
    return model_of((request.param, request.param))


def edit(op, position=POSITION, **given):
    return StateEdit(LAYER, HEAD, position, op, **OPS[op], **given)


def on_states(edits):
    """What edits read in the recurrence do, as functions on hook_state."""

    def change(one, state, hook):
        here, chosen = one.local(hook.positions)
        rows = torch.arange(len(state)) if one.batch is None else torch.as_tensor(one.batch).reshape(-1)
        for place, own in zip(here.tolist(), chosen.tolist(), strict=True):
            for index, row in enumerate(rows.tolist()):
                old = state[row, place, one.head].clone()
                new = {"delete": 0 * old, "scale": (one.scale or 0) * old}.get(one.op)
                if new is None:
                    given_for = one.matrix.shape[-3] if one.matrix.ndim > 2 else 1
                    matrix = one.matrix.expand(len(rows), max(given_for, own + 1), D_K, D_V)[index, own]
                    new = matrix if one.op == "replace" else old + matrix
                state[row, place, one.head] = new

    return [(f"blocks.{e.layer}.mixer.hook_state", lambda state, hook, e=e: change(e, state, hook)) for e in edits]


def run_by_hand(model, tokens, edit):
    """The reading "cache" as people make it: stop after every token, change the state that was kept, go on."""
    state, logits = None, []
    for place in range(tokens.shape[1]):
        out, state = model(tokens[:, place : place + 1], state=state, return_state=True)
        logits.append(out)
        _, own = edit.local(torch.tensor([place]))
        if len(own):
            matrix = state.layers[edit.layer].matrix.clone()
            old = matrix[:, edit.head].clone()
            new = {"replace": MATRIX, "add": old + MATRIX, "delete": 0 * old, "scale": -0.7 * old}[edit.op]
            matrix[:, edit.head] = new
            state = state.with_matrix(edit.layer, matrix)
    return torch.cat(logits, dim=1), state


@over_stacks
@over_ops
def test_every_op_equals_its_function_on_hook_state(layer_types, op):
    model = model_of(layer_types)
    tokens = tokens_of(model)
    for position in (POSITION, slice(2, 9, 3), slice(6, None), torch.tensor([8, 0, 11])):
        one = edit(op, position)
        expected = model.run_with_hooks(tokens, fwd_hooks=on_states([one]))
        assert distance(expected, model(tokens)) > 1e-4
        assert distance(model(tokens, edits=[one]), expected) <= EXACT


@pytest.mark.parametrize("name", STACKS)
@settings(max_examples=8)
@given(data=st.data())
def test_any_edits_in_the_recurrence_equal_their_functions(name, data):
    model = model_of(STACKS[name])
    tokens = tokens_of(model, BATCH, LENGTH)
    edits = [
        replace(e, reading="in_recurrence") for e in data.draw(st.lists(state_edits(model), min_size=1, max_size=3))
    ]
    expected = model.run_with_hooks(tokens, fwd_hooks=on_states(edits))
    assert distance(model(tokens, edits=edits), expected) <= EXACT


@over_stacks
@over_ops
def test_with_reading_cache_it_equals_a_changed_state_that_is_passed_on(layer_types, op):
    model = model_of(layer_types)
    tokens = tokens_of(model)
    for position in (slice(2, 9, 3), 11):
        one = edit(op, position, reading="cache")
        logits, state = model(tokens, edits=[one], return_state=True)
        expected, expected_state = run_by_hand(model, tokens, one)
        assert distance(logits, expected) <= EXACT
        assert distance(state.layers[LAYER].matrix, expected_state.layers[LAYER].matrix) <= EXACT
        assert distance(state.layers[LAYER].matrix, model(tokens, return_state=True)[1].layers[LAYER].matrix) > 1e-4


def test_a_query_reads_the_change_or_not(model):
    """With reading "cache" the logits of t are native; read in the recurrence they are not."""
    tokens = tokens_of(model)
    plain = model(tokens)
    for reading, moved in zip(READINGS, (True, False), strict=True):
        logits = model(tokens, edits=[edit("delete", reading=reading)])
        assert distance(logits[:, :POSITION], plain[:, :POSITION]) <= EXACT
        assert (distance(logits[:, POSITION], plain[:, POSITION]) > 1e-5) == moved
        assert distance(logits[:, POSITION + 1], plain[:, POSITION + 1]) > 1e-5


def test_scale_one_is_the_identity_and_delete_forgets_the_past(model):
    tokens = tokens_of(model)
    for reading in READINGS:
        same = StateEdit(LAYER, HEAD, slice(0, None), "scale", scale=1.0, reading=reading)
        assert distance(model(tokens, edits=[same]), model(tokens)) <= EXACT
        nothing = StateEdit(LAYER, HEAD, POSITION, "scale", scale=0.0, reading=reading)
        empty = edit("delete", reading=reading)
        assert torch.equal(model(tokens, edits=[nothing]), model(tokens, edits=[empty]))
    _, cache = model.run_with_cache(tokens, edits=[edit("delete")])
    assert not cache.state(LAYER, HEAD, POSITION).any() and cache.state(LAYER, HEAD, POSITION - 1).any()


def test_edits_of_one_state_compose_in_their_order(model):
    tokens = tokens_of(model)
    for reading in READINGS:
        add, double = (
            edit("add", reading=reading),
            StateEdit(LAYER, HEAD, POSITION, "scale", scale=2.0, reading=reading),
        )
        twice = StateEdit(LAYER, HEAD, POSITION, "add", matrix=2 * MATRIX, reading=reading)
        assert distance(model(tokens, edits=[add, double]), model(tokens, edits=[double, twice])) <= EXACT
        assert distance(model(tokens, edits=[add, double]), model(tokens, edits=[double, add])) > 1e-5
        replaced = edit("replace", reading=reading)
        assert distance(model(tokens, edits=[add, replaced]), model(tokens, edits=[replaced])) <= EXACT


def test_a_write_is_changed_before_the_state_that_it_reaches(model):
    """So a replaced state knows nothing of an edited write, whichever edit comes first in the list."""
    tokens = tokens_of(model)
    write = WriteEdit(LAYER, HEAD, POSITION, "scale", scale=3.0)
    for order in ([write, edit("replace")], [edit("replace"), write]):
        assert distance(model(tokens, edits=order), model(tokens, edits=[edit("replace")])) <= EXACT


def test_a_function_on_hook_state_sees_the_edited_state(model):
    tokens = tokens_of(model)
    shown = {}
    collect = reads_only(lambda state, hook: shown.__setitem__("all", state))
    one, later = edit("replace"), edit("add", 8, reading="cache")
    with model.hooks(fwd_hooks=[(HOOK, collect)]):
        model(tokens, edits=[one, later])
    assert distance(shown["all"][:, POSITION, HEAD], MATRIX.expand(2, -1, -1)) <= EXACT

    def double(state, hook):
        return 2 * state

    logits = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, double)], edits=[one])
    expected = model.run_with_hooks(tokens, fwd_hooks=[*on_states([one]), (HOOK, double)])
    other_order = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, double), *on_states([one])])
    assert distance(logits, expected) <= EXACT and distance(logits, other_order) > 1e-5


@pytest.mark.parametrize("reading", READINGS)
def test_only_edited_positions_are_stepped(reading, monkeypatch):
    """The rest goes to the chunked scan in as few stretches as there are."""
    model = model_of(HYBRID)
    tokens = tokens_of(model, length=40)
    lengths, stepped = [], []

    def scan(factors, *args, **options):
        lengths.append(factors.length)
        return real_scan(factors, *args, **options)

    def step_scan(factors, *args, **options):
        stepped.append(factors.length)
        return real_step(factors, *args, **options)

    real_scan, real_step = edited.scan, edited.step_scan
    monkeypatch.setattr(edited, "scan", scan)
    monkeypatch.setattr(edited, "step_scan", step_scan)
    model(tokens, edits=[edit("delete", torch.tensor([30, 9]), reading=reading), edit("add", 9, reading=reading)])
    assert lengths == [9, 20, 9, 40] and stepped == [1, 1]
    backends = [model(tokens, edits=[edit("delete", reading=reading)], backend=name) for name in ("step", "chunked")]
    assert distance(*backends) <= EXACT


@over_stacks
@settings(max_examples=8)
@given(data=st.data(), start=st.sampled_from([0, 4]))
def test_the_cache_tells_every_state(layer_types, data, start):
    """What the query read, as hook_state shows it; and with `carried` what the next token started from."""
    model = model_of(layer_types)
    tokens = tokens_of(model, BATCH, LENGTH)
    edits = data.draw(st.lists(state_edits(model), min_size=1, max_size=3))
    state = model(tokens[:, :start], return_state=True, edits=edits)[1] if start else None
    options = {"edits": edits, "state": state, "return_state": True}
    names = [f"blocks.{layer}.mixer.hook_state" for layer in model.cfg.recurrent_layers]
    _, kept = model.run_with_cache(tokens[:, start:], names_filter=names, **options)
    _, cache = model.run_with_cache(tokens[:, start:], **options)
    after = model.snapshots(tokens[:, start:], range(start, LENGTH + 1), state=state, edits=edits)
    heads = data.draw(st.sampled_from([slice(None), slice(1, 3), slice(3, 0, -2)]))
    for layer, name in zip(model.cfg.recurrent_layers, names, strict=True):
        index = list(range(4))[heads]
        assert distance(cache.state(layer, heads, slice(None)), kept[name][:, :, index]) <= EXACT
        carried = cache.state(layer, heads, slice(None), carried=True)
        for place in range(LENGTH - start):
            expected = after[start + place + 1].layers[layer].matrix[:, index]
            assert distance(carried[:, place], expected) <= EXACT
        one = cache.state(layer, 2, -1, carried=True)
        assert distance(one, after[LENGTH].layers[layer].matrix[:, 2]) <= EXACT


def test_no_memory_is_told_from_factors_where_states_were_edited():
    model = model_of(("mamba2", "mamba2"))
    tokens = tokens_of(model)
    edits = {
        "StateEdit": StateEdit(1, HEAD, POSITION, "delete"),
        "WriteEdit": WriteEdit(1, HEAD, POSITION, "delete", reading="cache"),
    }
    for kind, one in edits.items():
        _, cache = model.run_with_cache(tokens, edits=[one])
        for look in (effective_attention, retention, spectrum):
            with pytest.raises(ValueError, match=rf"{kind}\(layer=1, .* changed states of layer 1, so no factors tell"):
                look(cache, 1)
            look(cache, 0)
    _, early = model.run_with_cache(tokens[:, :POSITION], edits=[one], return_state=True)
    effective_attention(early, 1)


def test_gradients_flow_into_a_matrix(model):
    tokens = tokens_of(model)

    def loss(one, two):
        edits = [
            StateEdit(LAYER, HEAD, 3, "add", matrix=one),
            StateEdit(LAYER, HEAD, slice(4, 7), "scale", scale=0.5),
            StateEdit(LAYER, HEAD, 4, "replace", matrix=two, reading="cache"),
        ]
        return model(tokens, edits=edits, return_type="loss")

    assert torch.autograd.gradcheck(loss, (MATRIX.clone().requires_grad_(), random_tensor(D_K, D_V).requires_grad_()))


BAD = {
    "op": ((0, 0, 1, "swap"), {}, ValueError, "unknown op 'swap'; expected one of replace, add, delete, scale"),
    "reading": ((0, 0, 1, "delete"), {"reading": "late"}, ValueError, "unknown reading 'late'; expected one of in_rec"),
    "no matrix": ((0, 0, 1), {}, ValueError, "op 'replace' needs matrix"),
    "delete with matrix": ((0, 0, 1, "delete"), {"matrix": MATRIX}, ValueError, "op 'delete' takes no matrix"),
    "no scale": ((0, 0, 1, "scale"), {}, ValueError, "op 'scale' needs scale"),
    "add with scale": ((0, 0, 1, "add"), {"matrix": MATRIX, "scale": 2.0}, ValueError, "op 'add' takes no scale"),
    "inf scale": ((0, 0, 1, "scale"), {"scale": float("inf")}, ValueError, "is inf, expected a finite number"),
    "nan": ((0, 0, 1), {"matrix": MATRIX * torch.nan}, ValueError, "head 0, position 1 holds NaN or Inf"),
    "vector": ((0, 0, 1), {"matrix": MATRIX[0]}, ValueError, r"is torch.float64 \(5,\), expected .* \[d_k, d_v\] to"),
    "list": ((0, 0, 1), {"matrix": [[1.0]]}, ValueError, "is list, expected a float tensor"),
    "too many": ((0, 0, 1), {"matrix": MATRIX.expand(3, -1, -1)}, ValueError, "is for 3 positions, not for 1"),
    "negative": ((0, 0, -1, "delete"), {}, IndexError, "positions are absolute and start at 0, got -1"),
    "twice": ((0, 0, torch.tensor([3, 3]), "delete"), {}, ValueError, r"names a position twice: \[3, 3\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_edit_that_makes_no_sense_is_refused_when_it_is_made(case, as_users_run):
    site, fields, error, words = BAD[case]
    with pytest.raises(error, match=words):
        StateEdit(*site, **fields)


BAD_SITES = {
    "layer": ((3, 0, 1, "delete"), {}, IndexError, "layer 3 is out of range: the model has layers 0 to 2"),
    "softmax layer": ((1, 0, 1, "delete"), {}, ValueError, "layer 1 is softmax attention"),
    "head": ((0, 4, 1, "delete"), {}, IndexError, "head 4 is out of range: the layer has heads 0 to 3"),
    "position": ((0, 0, 12, "delete"), {}, IndexError, "position 12 is out of range: the text ends before position 12"),
    "row": ((0, 0, 1, "delete"), {"batch": 2}, IndexError, "batch row 2 of the edit at layer 0, .* the batch has 2"),
    "transposed": ((0, 0, 1), {"matrix": MATRIX.mT}, ValueError, "position 1 has width 5 x 3, expected 3 x 5"),
    "rows of the matrix": (
        (0, 0, 1),
        {"matrix": MATRIX.expand(3, 1, -1, -1)},
        ValueError,
        r"the matrix of the edit at .* has shape \(3, 1, 3, 5\), which is not \(2, positions, 3, 5\)",
    ),
}


@pytest.mark.parametrize("case", BAD_SITES)
def test_an_edit_of_a_site_that_is_not_there_is_refused(case, as_users_run):
    site, fields, error, words = BAD_SITES[case]
    model = model_of(HYBRID)
    with pytest.raises(error, match=words):
        model(tokens_of(model), edits=[StateEdit(*site, **fields)])
