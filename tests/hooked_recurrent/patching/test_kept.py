"""Activations that forks bring along: those of the full pass with the same edit, at the fork's own positions."""

import pytest
import torch

from hooked_recurrent import ActivationEdit, WriteEdit
from hooked_recurrent.hooks import reads_only
from hooked_recurrent.patching import Trunk, forks, run_edits
from tests.hooked_recurrent.edits.draws import LENGTH, model_of
from tests.hooked_recurrent.models import HYBRID, distance, over_stacks, tiny_model, tokens_of

pytestmark = pytest.mark.shapes_on_one_rule

EXACT = 1e-9  # float64


def hooks_above(model, layer):
    """Every hook of the blocks from `layer` on and of the last norm, but those whose axes are not positions."""
    above = [f"blocks.{number}." for number in range(layer, model.cfg.n_layers)]
    names = [name for name in model.hook_dict if name.startswith((*above, "ln_final."))]
    return [name for name in names if not name.endswith(forks.SQUARE)]


@over_stacks
@pytest.mark.parametrize(("horizon", "last_only"), [(2, False), (None, True)])
def test_kept_activations_are_those_of_the_full_pass(layer_types, horizon, last_only):
    """Every hook from the edited layer on; neighbours share a batch, and each brings its own positions."""
    model = model_of(layer_types)
    tokens = tokens_of(model, length=LENGTH)
    names = hooks_above(model, 0)
    some = [WriteEdit(0, 1, t, "delete", batch=row) for row, t in ((1, 4), (0, 3), (0, 4))]
    found = list(run_edits(model, tokens, some, horizon=horizon, last_only=last_only, keep=names))
    assert len(found) == len(some)
    for fork in found:
        _, cache = full(model, tokens, some[fork.index], names)
        stop = LENGTH if horizon is None else min(LENGTH, fork.position + horizon + 1)
        assert list(fork.kept) == names
        for name in names:
            expected = cache[name][fork.row, fork.position : stop]
            assert fork.kept[name].shape == expected.shape, name
            assert distance(fork.kept[name], expected) <= EXACT, name


def full(model, tokens, edit, names):
    """Logits and the named activations of a plain full pass with an edit."""
    kept = {}
    hooks = [(name, reads_only(lambda tensor, hook: kept.update({hook.name: tensor.clone()}))) for name in names]
    return model.run_with_hooks(tokens, fwd_hooks=hooks, edits=[edit]), kept


def test_later_hooks_leave_the_fan_of_the_edited_layer_alone(monkeypatch):
    """What is kept above the edited layer does not make that layer run its projections once per row."""
    model = model_of(("rwkv7",) * 2)
    text, rows = tokens_of(model, length=LENGTH)[:1], []
    plain = type(model.blocks[0].mixer).project
    monkeypatch.setattr(
        type(model.blocks[0].mixer),
        "project",
        lambda self, x, *a: (rows.append((self.layer, len(x))), plain(self, x, *a))[1],
    )
    trunk = Trunk.grow(model, text, [4])
    rows.clear()
    some = [WriteEdit(0, head, 4, "delete") for head in range(4)]
    found = list(run_edits(model, text, some, trunk=trunk, keep=["blocks.1.mixer.hook_z"]))
    assert rows == [(0, 1), (1, 4)]
    assert len({float(fork.kept["blocks.1.mixer.hook_z"].sum()) for fork in found}) == 4


def test_functions_on_a_kept_hook_come_first_and_calls_inside_are_not_kept():
    model = model_of(HYBRID)
    text, name = tokens_of(model, length=LENGTH)[:1], "blocks.1.hook_resid_mid"

    def doubles(tensor, hook):
        if model.clock.depth == 1:
            model(text[:, :2])  # fires the same hook with other numbers
        return 2 * tensor

    with model.hooks(fwd_hooks=[(name, doubles)]):
        (fork,) = run_edits(model, text, [WriteEdit(0, 1, 5, "delete")], horizon=2, keep=[name, name])
        _, kept = full(model, text, WriteEdit(0, 1, 5, "delete"), [name])
    assert list(fork.kept) == [name]
    assert distance(fork.kept[name], kept[name][0, 5:8]) <= EXACT
    assert not any(point.in_use for point in model.hook_dict.values())


def test_states_that_a_function_changes_one_by_one_are_kept_together():
    model = model_of(("rwkv7",) * 2)
    text, name = tokens_of(model, length=LENGTH)[:1], "blocks.1.mixer.hook_state"
    with model.hooks(fwd_hooks=[(name, lambda state, hook: state * 0.5)]):
        (fork,) = run_edits(model, text, [WriteEdit(0, 1, 5, "delete")], horizon=2, keep=[name])
        stepped = []
        hooks = [(name, lambda state, hook: stepped.append(state.clone()))]
        model.run_with_hooks(text, fwd_hooks=hooks, edits=[WriteEdit(0, 1, 5, "delete")])
    assert distance(fork.kept[name], torch.cat(stepped, dim=1)[0, 5:8]) <= EXACT


def test_memory_bounds_the_batches_of_what_is_kept(monkeypatch):
    model, sizes = tiny_model(HYBRID), []
    text = tokens_of(model, length=LENGTH)[:1]
    plain = forks._Plan._side_by_side
    monkeypatch.setattr(forks._Plan, "_side_by_side", lambda *a: (sizes.append(len(a[1].jobs)), plain(*a))[1])
    some = [WriteEdit(0, head, 4, "delete") for head in range(4)]
    names = [name for name in hooks_above(model, 0) if name.endswith("hook_state")]
    for keep, expected in ((), [4]), (names, [3, 1]):
        sizes.clear()
        assert len(list(run_edits(model, text, some, memory=23_000, keep=keep))) == 4
        assert sizes == expected


def test_what_cannot_be_kept(as_users_run):
    model = model_of(HYBRID)
    text = tokens_of(model, length=LENGTH)[:1]
    some = [WriteEdit(0, 1, 4, "delete"), ActivationEdit("blocks.2.hook_resid_pre", 4, 0.0)]
    for name, words in (
        ("blocks.1.attn.hook_z", "blocks.1.attn.hook_z cannot be kept: intervention 1 enters at layer 2, above it"),
        ("blocks.1.attn.hook_pattern", "cannot be kept: its axes are query and key positions"),
        ("hook_embed", "hook_embed cannot be kept: a fork enters at a block, above it"),
    ):
        with pytest.raises(ValueError, match=words):
            run_edits(model, text, some, keep=[name])
    with pytest.raises(KeyError, match="blocks.2.mixer.hook_z"):
        run_edits(model, text, some, keep=["blocks.2.mixer.hook_zz"])
    with pytest.raises(TypeError, match="keep must be several names of hooks, got a single one"):
        run_edits(model, text, some, keep="blocks.2.mixer.hook_z")
    assert torch.is_grad_enabled()
