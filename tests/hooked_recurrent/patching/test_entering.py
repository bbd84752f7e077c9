"""Where a fork enters and where it ends: the fan of the entering layer, and a last block that runs only where it is asked."""

import pytest
import torch

from hooked_recurrent import ActivationEdit, StateEdit, WriteEdit
from hooked_recurrent.block import Block
from hooked_recurrent.hooks import reads_only
from hooked_recurrent.mixers.base import RecurrentMixer
from hooked_recurrent.patching import Trunk, run_edits
from tests.hooked_recurrent.edits.draws import LENGTH, model_of, random_tensor
from tests.hooked_recurrent.models import STACKS, distance, over_stacks, tokens_of

pytestmark = pytest.mark.shapes_on_one_rule

EXACT = 1e-9  # float64
START = 4


def edits_of(layer):
    """Six of one layer, each of another kind, with every moment of the recurrence among them."""
    key, value, matrix = random_tensor(3), random_tensor(5), random_tensor(3, 5)
    return [
        WriteEdit(layer, 1, START, key=key, value=value),
        WriteEdit(layer, 3, START + 1, "add", key=key, value=value),
        WriteEdit(layer, 1, START, "delete", reading="cache"),
        WriteEdit(layer, 0, START + 2, "delete", form="net"),
        StateEdit(layer, 2, START, "add", matrix=matrix),
        StateEdit(layer, 1, START + 1, "delete", reading="cache"),
    ]


@pytest.fixture
def fans(monkeypatch):
    """How many rows each fan had."""
    heard, plain = [], RecurrentMixer._fanned_out

    def counted(self, native, matrix, call):
        heard.append(call.rows)
        return plain(self, native, matrix, call)

    monkeypatch.setattr(RecurrentMixer, "_fanned_out", counted)
    return heard


@over_stacks
def test_a_fan_and_rows_with_a_hook_are_both_the_full_pass(layer_types, fans):
    """A function on a hook of the entering block must see every row by itself; what it then changes is in the full pass."""
    model = model_of(layer_types)
    text = tokens_of(model, length=LENGTH)[:1]
    for layer in model.cfg.recurrent_layers:
        edits = [*edits_of(layer), ActivationEdit(f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", START, 0.5)]
        some = [[edit, edits[-1]] for edit in edits[:-1]]
        alone = [model(text, edits=pair)[0, START:] for pair in some]
        rows = []
        name = f"blocks.{layer}.mixer.hook_read"
        last = layer == model.cfg.n_layers - 1  # the second edit sits in the entering block, and forbids the fan
        for hooks in ([], [(name, lambda tensor, hook, rows=rows: rows.append(len(tensor)))]):
            fans.clear()
            with model.hooks(fwd_hooks=hooks):
                forks = {fork.index: fork for fork in run_edits(model, text, some, horizon=None)}
            assert fans == ([] if hooks or last else [len(some)])
            for index, fork in forks.items():
                assert distance(fork.logits, alone[index][fork.position - START :]) <= EXACT
        assert rows[-1] == len(some)


@over_stacks
def test_a_steering_function_at_the_entrance_acts_once(layer_types):
    model = model_of(layer_types)
    text = tokens_of(model, length=LENGTH)[:1]

    def steer(tensor, hook):
        tensor[..., 0] += 3.0
        return tensor * 1.5

    for layer in model.cfg.recurrent_layers:
        with model.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", steer)]):
            edit = WriteEdit(layer, 1, START, "scale", scale=-2.0)
            (fork,) = run_edits(model, text, [edit], horizon=None)
            assert distance(fork.logits, model(text, edits=[edit])[0, START:]) <= EXACT
        assert distance(fork.logits, model(text, edits=[edit])[0, START:]) > 1e-6


def positions_of_last_mlp(model, heard):
    """Note how many positions the last block adds to the residual stream, with nothing attached to it."""
    plain = Block.forward

    def noted(self, resid, state, call):
        made = plain(self, resid, state, call)
        if self is model.blocks[-1]:
            heard.append(tuple(made[0].shape[:2]))
        return made

    return noted


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("entered", ["first", "last"])
def test_the_last_block_runs_where_it_is_asked(name, entered, monkeypatch):
    """Each row at positions of its own. RWKV-7's channel mix looks at the position before, so its block runs everywhere."""
    model = model_of(STACKS[name])
    text, heard = tokens_of(model, length=LENGTH)[:1], []
    monkeypatch.setattr(Block, "forward", positions_of_last_mlp(model, heard))
    layer = model.cfg.recurrent_layers[0 if entered == "first" else -1]
    trunk = Trunk.grow(model, text, [START])
    edits = [WriteEdit(layer, row, START, "delete", batch=row) for row in range(3)]
    at = torch.tensor([[0, 3], [5, 1], [6, 6]])
    here = {"rows": 3, "edits": edits, "shared": {n: t[:, START:] for n, t in trunk.shared.items()}}
    state, resid = trunk.states[START], trunk.inputs[layer][:, START:]
    full = torch.cat([model(text, edits=[edit.in_rows(None)])[:, START:] for edit in edits])
    expected = torch.stack([row[places] for row, places in zip(full, at, strict=True)])
    heard.clear()
    assert distance(model.run_from(layer, resid, state, at=at, **here), expected) <= EXACT
    assert heard == [(3, LENGTH - START if name == "rwkv7" else 2)]
    assert distance(model.run_from(layer, resid, state, **here), full) <= EXACT


@over_stacks
@pytest.mark.parametrize(
    "where", ["blocks.{last}.hook_mixer_out", "blocks.{last}.hook_resid_post", "ln_final.hook_scale"]
)
def test_a_hook_at_the_end_sees_every_position(layer_types, where):
    model = model_of(layer_types)
    text, seen = tokens_of(model, length=LENGTH)[:1], []
    name = where.format(last=model.cfg.n_layers - 1)

    @reads_only
    def see(tensor, hook):
        seen.append((tensor.shape[1], hook.positions.tolist()))

    edit = WriteEdit(0, 1, START, "delete")
    with model.hooks(fwd_hooks=[(name, see)]):
        (fork,) = run_edits(model, text, [edit], horizon=3, last_only=True)
    assert seen[-1] == (4, list(range(START, START + 4)))
    assert distance(fork.logits, model(text, edits=[edit])[0, START + 3 : START + 4]) <= EXACT


@over_stacks
@pytest.mark.parametrize("hook", ["ln_final.hook_normalized", "ln_final.hook_scale"])
def test_an_edit_of_the_last_norm_finds_its_position(layer_types, hook):
    """An absolute one, though only some positions are asked for."""
    model = model_of(layer_types)
    text = tokens_of(model, length=LENGTH)[:1]
    trunk = Trunk.grow(model, text, [START])
    edits = [ActivationEdit(hook, START + 2, 2.0, op="scale", batch=1), WriteEdit(0, 0, START, "delete")]
    at = torch.tensor([[2, 1], [1, 2]])
    found = model.run_from(
        0, trunk.inputs[0][:, START:], trunk.states[START], rows=2, edits=edits, at=at,
        shared={name: tensor[:, START:] for name, tensor in trunk.shared.items()},
    )  # fmt: skip
    full = model(text.repeat(2, 1), edits=edits)[:, START:]
    assert distance(found, torch.stack([full[0, [2, 1]], full[1, [1, 2]]])) <= EXACT
    assert distance(full[0, 2], full[1, 2]) > 1e-6


def test_bad_entries(as_users_run):
    model = model_of(STACKS["rwkv7"])
    text = tokens_of(model, length=LENGTH)[:1]
    trunk = Trunk.grow(model, text, [0])
    resid, state = trunk.inputs[1], trunk.states[0]
    for given, error, words in (
        ({"resid": resid[..., :5]}, ValueError, r"resid must be \[batch, pos, 12\], got \(1, 11, 5\)"),
        ({"at": torch.tensor([[1]])}, ValueError, r"at must be \[2, positions\], got \(1, 1\)"),
        ({"at": torch.tensor([[-1], [0]])}, IndexError, "at names positions -1 to 0, but the run has 0 to 10"),
        ({"at": torch.tensor([[0], [11]])}, IndexError, "at names positions 0 to 11, but the run has 0 to 10"),
        ({"resid": resid.repeat(2, 1, 1)}, ValueError, "rows fans out a single row, got a batch of 2"),
        ({}, ValueError, "layer 1 mixes in layer 0's values: give what a plain pass left as `shared`"),
    ):
        with pytest.raises(error, match=words):
            model.run_from(1, state=state, rows=2, **({"resid": resid} | given))
