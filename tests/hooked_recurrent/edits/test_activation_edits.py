"""ActivationEdit: it equals a function on its hook, comes before all others, and stays within its own call."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_recurrent import ActivationEdit, StateEdit, WriteEdit
from tests.hooked_recurrent.edits.draws import (
    BATCH,
    LENGTH,
    SIGNED,
    activation_edits,
    activations,
    any_edits,
    model_of,
    random_tensor,
)
from tests.hooked_recurrent.models import HYBRID, STACKS, distance, over_stacks, tokens_of

pytestmark = pytest.mark.shapes_on_one_rule

EXACT = 1e-9
PRE, Z = "blocks.1.hook_resid_pre", "blocks.0.mixer.hook_z"


@pytest.fixture
def model():
    return model_of(("gated_delta_net",) * 2)


@pytest.fixture
def tokens(model):
    return tokens_of(model)


def as_function(edit):
    """The same change as a function on the hook, one position and row at a time."""

    def change(tensor, hook):
        here, chosen = edit.local(hook.positions)
        rows = torch.arange(len(tensor)) if edit.batch is None else torch.as_tensor(edit.batch).reshape(-1)
        for place, own in zip(here.tolist(), chosen.tolist(), strict=True):
            for index, row in enumerate(rows.tolist()):
                old = tensor[row, place] if edit.head is None else tensor[row, place, edit.head]
                value = edit.value
                if isinstance(value, torch.Tensor):
                    lead = value.ndim - old.ndim
                    given_for = value.shape[lead - 1] if lead > 0 else 1
                    value = value.expand(len(rows), max(given_for, own + 1), *old.shape)[index, own]
                old.copy_({"replace": value + 0 * old, "add": old + value, "scale": old * value}[edit.op])

    return edit.hook, change


@over_stacks
def test_every_hook_can_be_edited(layer_types):
    """Each one by itself, so that no draw can leave one out; and the edit must matter."""
    model = model_of(layer_types)
    tokens = tokens_of(model)
    for hook, shape in activations(layer_types).items():
        op, value = ("scale", 0.5) if hook.endswith(SIGNED) else ("add", random_tensor(*shape))
        edit = ActivationEdit(hook, slice(3, 9, 2), value, op=op, batch=1)
        if hook.endswith("hook_log_decay") and layer_types[0] == "delta_net":
            continue  # a rule without decay has nothing there to scale
        logits = model(tokens, edits=[edit])
        assert distance(logits, model(tokens)) > 1e-7, hook
        assert distance(logits, model.run_with_hooks(tokens, fwd_hooks=[as_function(edit)])) <= EXACT, hook
        assert distance(logits[:, :3], model(tokens)[:, :3]) <= EXACT, hook
        assert distance(logits[0], model(tokens)[0]) <= EXACT, hook


@pytest.mark.parametrize("name", STACKS)
@settings(max_examples=10)
@given(data=st.data())
def test_any_edits_equal_their_functions(name, data):
    model = model_of(STACKS[name])
    tokens = tokens_of(model, BATCH, LENGTH)
    edits = data.draw(st.lists(activation_edits(model), min_size=1, max_size=3))
    expected = model.run_with_hooks(tokens, fwd_hooks=[as_function(edit) for edit in edits])
    assert distance(model(tokens, edits=edits), expected) <= EXACT


def test_edits_of_one_hook_act_in_the_order_given(model, tokens):
    add, double = ActivationEdit(PRE, 4, 1.0, op="add"), ActivationEdit(PRE, 4, 2.0, op="scale")
    logits = model(tokens, edits=[add, double])
    assert distance(logits, model(tokens, edits=[double, add, add])) <= EXACT
    assert distance(logits, model(tokens, edits=[double, add])) > 1e-5


def test_functions_and_caches_see_what_it_left(model, tokens):
    value = random_tensor(12)
    edit = ActivationEdit(PRE, 4, value)
    seen = []
    hooks = [(PRE, lambda tensor, hook: seen.append(tensor[:, 4].clone())), (PRE, lambda tensor, hook: 2 * tensor)]
    with model.hooks(fwd_hooks=hooks):
        logits, cache = model.run_with_cache(tokens, edits=[edit])
    assert torch.equal(seen[0], value.expand(2, -1))
    assert torch.equal(cache[PRE][:, 4], 2 * value.expand(2, -1))
    expected = model.run_with_hooks(tokens, fwd_hooks=[as_function(edit), hooks[1]])
    assert distance(logits, expected) <= EXACT


def test_nothing_stays_attached(model, tokens):
    plain = model(tokens)
    point = model.hook_dict[PRE]
    own = []
    with model.hooks(fwd_hooks=[(PRE, lambda tensor, hook: own.append(1))]):
        model(tokens, edits=[ActivationEdit(PRE, 4, 0.0)])
        assert len(point.fwd_hooks) == 1
        with pytest.raises(IndexError, match="batch row 7 of the edit at blocks.1.hook_resid_pre, position 4"):
            model(tokens, edits=[ActivationEdit(PRE, 4, 0.0, batch=7)])
        model(tokens)
    assert len(own) == 2 and not point.fwd_hooks and not point.in_use
    assert torch.equal(model(tokens), plain)


def test_a_call_inside_a_hook_is_not_edited(model, tokens):
    plain, inner = model(tokens), {}

    def call(tensor, hook):
        if hook.clock.depth == 1:
            with model.hooks(fwd_hooks=[(Z, lambda tensor, hook: None)]):
                inner["logits"] = model(tokens)

    edit = ActivationEdit(PRE, 4, 0.0)
    logits = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_resid_pre", call)], edits=[edit])
    assert distance(inner["logits"], plain) <= EXACT
    assert distance(logits, model(tokens, edits=[edit])) <= EXACT and distance(logits, plain) > 1e-4


@over_stacks
def test_all_kinds_in_every_call(layer_types):
    """generate, snapshots, run_with_cache and run_from make the same edits as a call of the model."""
    model = model_of(layer_types)
    tokens = tokens_of(model)
    last = model.cfg.recurrent_layers[-1]
    edits = [
        ActivationEdit(f"blocks.{last}.hook_resid_pre", slice(3, 6), random_tensor(12)),
        ActivationEdit("ln_final.hook_normalized", 7, 0.5, op="scale"),
        StateEdit(last, 1, slice(4, None), "scale", scale=0.3),
        WriteEdit(last, 2, 13, "delete", reading="cache"),
        ActivationEdit(f"blocks.{last}.mixer.hook_z", torch.tensor([14, 5]), 0.0, head=1, op="replace"),
    ]
    text, state = model.generate(tokens, max_new_tokens=5, edits=edits, return_state=True)
    logits, whole = model(text, edits=edits, return_state=True)
    assert torch.equal(logits[:, 11:-1].argmax(-1), text[:, 12:])
    before = model.snapshots(text, [16], edits=edits)[16]
    for one, other in zip(before.layers, state.layers, strict=True):
        assert all(distance(other.tensors()[name], tensor) <= EXACT for name, tensor in one.tensors().items())
    (_, again), _ = model.run_with_cache(text, edits=edits, return_state=True)
    assert distance(again.layers[last].matrix, whole.layers[last].matrix) <= EXACT
    _, cache = model.run_with_cache(text)
    shared, empty = dict(model.last_call.shared), model.snapshots(text, [0])[0]
    entered = model.run_from(last, cache[f"blocks.{last}.hook_resid_pre"], empty, shared=shared, edits=edits)
    assert distance(entered, logits) <= EXACT
    for hook in ("hook_embed", "blocks.0.hook_resid_pre"):
        with pytest.raises(ValueError, match=f"the edit at {hook}, position 1 lies below layer {last}"):
            model.run_from(last, cache[PRE], empty, edits=[ActivationEdit(hook, 1, 0.0)])


@pytest.mark.parametrize("name", STACKS)
@settings(max_examples=10)
@given(data=st.data())
def test_the_past_stays_as_it_was(name, data):
    model = model_of(STACKS[name])
    tokens = tokens_of(model, BATCH, LENGTH)
    edits = data.draw(st.lists(any_edits(model), min_size=1, max_size=3))
    first = min(edit.first_position for edit in edits)
    logits, plain = model(tokens, edits=edits), model(tokens)
    assert first == 0 or distance(logits[:, :first], plain[:, :first]) <= EXACT


def test_gradients_flow_into_a_value(model, tokens):
    def loss(value, scaled):
        edits = [
            ActivationEdit(PRE, slice(3, 5), value),
            ActivationEdit(PRE, 4, 0.5, op="scale"),
            ActivationEdit(Z, 4, scaled, head=1, op="add"),
        ]
        return model(tokens, edits=edits, return_type="loss")

    assert torch.autograd.gradcheck(loss, (random_tensor(2, 12).requires_grad_(), random_tensor(5).requires_grad_()))


def test_layers_and_positions():
    sites = {PRE: 1, "blocks.12.mixer.hook_z": 12, "hook_embed": None, "ln_final.hook_scale": None}
    for hook, layer in sites.items():
        assert ActivationEdit(hook, 1, 0.0).layer == layer
    spans = [(3, (3, 3)), (slice(2, 9, 3), (2, 8)), (slice(None, 4), (0, 3)), (slice(5, None), (5, None))]
    for position, span in [*spans, (torch.tensor([8, 2, 5]), (2, 8))]:
        for edit in (ActivationEdit(PRE, position, 0.0), WriteEdit(0, 0, position, "delete")):
            assert (edit.first_position, edit.last_position) == span


BAD = {
    "op": ((PRE, 1, 0.0), {"op": "delete"}, ValueError, "unknown op 'delete'; expected one of replace, add, scale"),
    "hook": ((3, 1, 0.0), {}, TypeError, "hook must be the name of a hook, got int"),
    "scale by a tensor": (
        (PRE, 1, random_tensor(12)),
        {"op": "scale"},
        ValueError,
        "op 'scale' needs a number as value",
    ),
    "nan": ((PRE, 1, float("nan")), {}, ValueError, "blocks.1.hook_resid_pre, position 1 is nan, expected a finite"),
    "inf tensor": ((PRE, 1, random_tensor(12) / 0), {}, ValueError, "the value of the edit at blocks.1.* holds NaN or"),
    "list": ((PRE, 1, [0.0]), {}, ValueError, "is list, expected a float tensor or a number"),
    "ints": ((PRE, 1, torch.ones(12).long()), {}, ValueError, "is torch.int64, expected a float tensor or a number"),
    "negative": ((PRE, -1, 0.0), {}, IndexError, "start at 0, got -1 at blocks.1.hook_resid_pre"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_edit_that_makes_no_sense_is_refused_when_it_is_made(case, as_users_run):
    site, fields, error, words = BAD[case]
    with pytest.raises(error, match=words):
        ActivationEdit(*site, **fields)


BAD_SITES = {
    "unknown": (("blocks.0.hook_resid_pra", 1, 0.0), {}, KeyError, "no hook 'blocks.0.hook_resid_pra'; did you mean '"),
    "scores": (("blocks.1.attn.hook_attn_scores", 1, 0.0), {}, ValueError, "its axes are query and key positions"),
    "pattern": (("blocks.1.attn.hook_pattern", 1, 0.0), {}, ValueError, "its axes are query and key positions"),
    "write": (("blocks.0.mixer.hook_write", 1, 0.0), {}, ValueError, "cannot change blocks.0.* use a WriteEdit"),
    "state": (("blocks.0.mixer.hook_state", 1, 0.0), {}, ValueError, "cannot change blocks.0.* use a StateEdit"),
    "no heads": ((PRE, 1, 0.0, 2), {}, ValueError, "blocks.1.hook_resid_pre has no head axis"),
    "head": ((Z, 1, 0.0, 4), {}, IndexError, "head 4 is out of range: blocks.0.mixer.hook_z has heads 0 to 3"),
    "kv head": (("blocks.1.attn.hook_k", 1, 0.0, 2), {}, IndexError, "blocks.1.attn.hook_k has heads 0 to 1"),
    "position": ((PRE, 12, 0.0), {}, IndexError, "position 12 is out of range: the text ends before position 12"),
    "row": ((PRE, 1, 0.0), {"batch": 2}, IndexError, "batch row 2 of the edit at blocks.1.hook_resid_pre, position 1"),
    "width": ((PRE, 1, random_tensor(5)), {}, ValueError, r"has shape \(5,\), which is not \(2, positions, 12\)"),
    "positions": (
        (Z, slice(0, 3), random_tensor(2, 5)),
        {"head": 1},
        ValueError,
        r"the value of the edit at .*hook_z, head 1, position 0:3 has shape \(2, 5\), which is not \(2, positions, 5\)",
    ),
}


@pytest.mark.parametrize("case", BAD_SITES)
def test_an_edit_of_a_site_that_is_not_there_is_refused(case, as_users_run):
    site, fields, error, words = BAD_SITES[case]
    model = model_of(HYBRID)
    with pytest.raises(error, match=words):
        model(tokens_of(model), edits=[ActivationEdit(*site, **fields)])
