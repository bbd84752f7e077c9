"""What forks share a batch, a model and a trunk with, and what must not matter to them."""

import pytest
import torch

from hooked_recurrent import ActivationEdit, StateEdit, WriteEdit
from hooked_recurrent.patching import Trunk, forks, run_edits
from tests.hooked_recurrent.edits.draws import LENGTH, model_of, random_tensor
from tests.hooked_recurrent.models import HYBRID, STACKS, distance, over_stacks, tiny_model, tokens_of

pytestmark = pytest.mark.shapes_on_one_rule

EXACT = 1e-9  # float64


def deletes(model, positions=range(LENGTH)):
    return [WriteEdit(layer, 1, t, "delete") for layer in model.cfg.recurrent_layers for t in positions]


def check(model, text, some, **options):
    """Every fork against its full pass; the positions that its logits span."""
    found = list(run_edits(model, text, some, **options))
    assert sorted(fork.index for fork in found) == list(range(len(some)))
    for fork in found:
        edits = [some[fork.index]] if not isinstance(some[fork.index], list) else some[fork.index]
        horizon = options.get("horizon", 1)
        stop = text.shape[1] if horizon is None else min(text.shape[1], fork.position + horizon + 1)
        start = stop - 1 if options.get("last_only") else fork.position
        expected = model(text, edits=[edit.in_rows(fork.row) for edit in edits])[fork.row, start:stop]
        assert fork.logits.shape == expected.shape and distance(fork.logits, expected) <= EXACT
    return found


@over_stacks
@pytest.mark.parametrize("horizon", [0, 1, 3, None])
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("free", [0, 32, 10_000])
def test_neighbours_in_a_batch(layer_types, horizon, last_only, free, monkeypatch):
    """Edits at all positions, the last ones among them, in batches of one position, of some, and of all at once."""
    monkeypatch.setattr(forks, "FREE_TOKENS", free)
    model, sizes = model_of(layer_types), []
    plain = forks._Plan._side_by_side
    monkeypatch.setattr(forks._Plan, "_side_by_side", lambda *a: (sizes.append(len(a[1].jobs)), plain(*a))[1])
    check(model, tokens_of(model, length=LENGTH)[:1], deletes(model), horizon=horizon, last_only=last_only)
    layers = len(model.cfg.recurrent_layers)
    if free == 10_000:
        assert sizes == [LENGTH] * layers
    elif horizon == 0 and free == 0:
        assert max(sizes) <= 2  # two neighbours take one and two tokens each, of which a quarter may be too many
    else:
        assert len(sizes) > layers


def test_edits_of_every_kind_layer_and_position_together():
    """Slices, open slices, tensors; other layers before and after; rows of another text."""
    model = model_of(HYBRID)
    tokens = tokens_of(model, batch=3, length=LENGTH)
    key, value, matrix = random_tensor(3), random_tensor(5), random_tensor(3, 5)
    some = [
        [
            ActivationEdit("blocks.2.hook_mlp_out", slice(5, None), 0.5, batch=row),
            WriteEdit(0, 1, torch.tensor([7, 3]), key=key, value=value, batch=row, reading=reading),
            StateEdit(2, 0, slice(4, 9, 2), "add", matrix=matrix, batch=row, reading=reading),
            ActivationEdit("blocks.1.attn.hook_z", 6, 0.0, head=1, batch=row),
        ][: 4 - row]
        for row in (2, 0, 1)
        for reading in ("cache", "in_recurrence")
    ]
    found = check(model, tokens, some, horizon=None, memory=1)
    assert {(fork.row, fork.position) for fork in found} == {(0, 3), (1, 3), (2, 3)}


@over_stacks
@pytest.mark.parametrize("kept_trunk", [False, True])
def test_what_is_done_changes_no_bit_of_the_rest(layer_types, kept_trunk):
    """In the middle of a batch, at its ends, and a whole text; float32, where company would show."""
    model = tiny_model(layer_types, dtype=torch.float32).requires_grad_(False)
    tokens = tokens_of(model, batch=1 if kept_trunk else 2, length=LENGTH)
    trunk = Trunk.grow(model, tokens, [0]) if kept_trunk else None
    rows = range(len(tokens))
    some = [edit.in_rows(row) for row in rows for edit in deletes(model)]
    whole = {fork.index: fork.logits for fork in run_edits(model, tokens, some, horizon=2, trunk=trunk)}
    order = list(whole)
    for done in (order[:3], order[3:-2], order[::2], order[: len(order) // len(rows)]):
        rest = list(run_edits(model, tokens, some, horizon=2, trunk=trunk, done=done))
        assert [fork.index for fork in rest] == [index for index in order if index not in done]
        assert all(torch.equal(fork.logits, whole[fork.index]) for fork in rest)


@over_stacks
def test_the_consumer_may_use_the_model_between_forks(layer_types):
    """It runs other texts, with hooks of its own that it takes away again, and turns gradients off and on."""
    model = tiny_model(layer_types, seed=1)
    text, other = tokens_of(model, length=LENGTH)[:1], tokens_of(model, 2, 5, seed=9)
    some = deletes(model, [2, 7])
    expected = {fork.index: fork.logits for fork in run_edits(model, text, some, horizon=None)}
    for fork in run_edits(model, text, some, horizon=None, memory=1):
        assert torch.is_grad_enabled() and not fork.logits.requires_grad
        model.run_with_hooks(other, fwd_hooks=[("blocks.0.hook_resid_pre", lambda tensor, hook: tensor * 0)])
        assert model(other).requires_grad and model.clock.positions.tolist() == list(range(5))
        assert distance(fork.logits, expected[fork.index]) <= EXACT


def test_an_abandoned_run_leaves_nothing_behind():
    model = model_of(HYBRID)
    text = tokens_of(model, length=LENGTH)[:1]
    plain = model(text)
    some = [ActivationEdit(f"blocks.{layer}.hook_resid_mid", t, 0.0) for layer in (0, 1) for t in (2, 5)]
    running = run_edits(model, text, some, horizon=None, memory=1)
    next(running)
    running.close()
    with pytest.raises(ValueError, match="boom"):
        with model.hooks(fwd_hooks=[("blocks.2.hook_resid_mid", _fails)]):
            list(run_edits(model, text, some))
    assert not any(point.in_use for point in model.hook_dict.values())
    assert not any(block._forward_pre_hooks for block in model.blocks)
    assert model.clock.depth == 0 and torch.is_grad_enabled() and torch.equal(model(text), plain)


def _fails(tensor, hook):
    raise ValueError("boom")


@pytest.mark.parametrize("name", ["rwkv7", "hybrid"])
def test_a_function_that_runs_the_model_and_one_that_forks(name):
    """Neither confuses the outer call: what the inner one shows is not kept, and positions go on as they were."""
    model = model_of(STACKS[name])
    text, some = tokens_of(model, length=LENGTH)[:1], deletes(model_of(STACKS[name]), [4])
    expected = {fork.index: fork.logits for fork in run_edits(model, text, some)}

    def runs(tensor, hook):
        if model.clock.depth == 1:
            model(tokens_of(model, length=LENGTH, seed=5)[:1])

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_mid", runs)]):
        assert all(distance(f.logits, expected[f.index]) <= EXACT for f in run_edits(model, text, some))
    heard = []

    def branches(tensor, hook):
        if model.clock.depth == 1:
            heard.append([hook.positions, {f.index: f.logits for f in run_edits(model, text, some)}, hook.positions])

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_mid", branches)]):
        model(text[:, :3])
    ((before, inner, after),) = heard
    assert before.tolist() == after.tolist() == [0, 1, 2]
    assert all(distance(inner[index], expected[index]) <= EXACT for index in expected)


@pytest.mark.parametrize("name", STACKS)
def test_narrow_models_and_training_mode(name):
    """bfloat16 forks stray from the float64 numbers no further than bfloat16 full passes do; train() changes nothing."""
    narrow = tiny_model(STACKS[name], seed=2, dtype=torch.bfloat16).train()
    wide = tiny_model(STACKS[name], seed=2, dtype=torch.bfloat16).double().eval()
    text = tokens_of(narrow, length=LENGTH)[:1]
    off = {"fork": 0.0, "full": 0.0}
    for fork in run_edits(narrow, text, deletes(narrow, [2, 3, 8]), horizon=None):
        edit = deletes(narrow, [2, 3, 8])[fork.index]
        exact = wide(text, edits=[edit])[0, fork.position :]
        for kind, made in (("fork", fork.logits), ("full", narrow(text, edits=[edit])[0, fork.position :])):
            assert made.dtype == torch.bfloat16 and made.isfinite().all()
            off[kind] = max(off[kind], distance(made.double(), exact))
    assert 0 < off["fork"] <= 1.5 * off["full"]


def test_a_trunk_of_something_else(as_users_run):
    model = model_of(HYBRID)
    text = tokens_of(model, length=LENGTH)[:1]
    trunk = Trunk.grow(model, text, [0])
    assert not any(tensor.requires_grad for tensor in trunk.inputs.values())
    for other in (text[:, :6], (text + 1) % 29):
        with pytest.raises(ValueError, match="the trunk was grown from another text"):
            run_edits(model, other, deletes(model, [4]), trunk=trunk)
    with pytest.raises(ValueError, match="a trunk needs the state at one position at least, got none"):
        Trunk.grow(model, text, [])


def test_no_interventions(as_users_run):
    model = model_of(HYBRID)
    text = tokens_of(model, length=LENGTH)[:1]
    for given, words in (
        (WriteEdit(0, 0, 4, "delete"), "got a single WriteEdit: put it into a list"),
        ([5], "intervention 0 is no edit and no list of edits"),
        ([["x"]], "intervention 0 is no edit and no list of edits: edits must be WriteEdits"),
    ):
        with pytest.raises(TypeError, match=words):
            run_edits(model, text, given)
    with pytest.raises(IndexError, match="token 99 is out of range"):
        run_edits(model, text * 0 + 99, [])
