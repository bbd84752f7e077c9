"""RecurrentState: going on from it, branching it, and putting it on disk, in this process and in another."""

import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from hooked_recurrent import LayerState, RecurrentState, WriteEdit
from tests.hooked_recurrent.models import ALL_LINEAR, HYBRID, STACKS, distance, over_stacks, tiny_model, tokens_of

pytestmark = pytest.mark.shapes_on_one_rule

ROOT = Path(__file__).resolve().parents[2]
EXACT = 1e-12


@lru_cache
def model_of(layer_types=HYBRID):
    return tiny_model(layer_types, seed=1).requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def tokens(model):
    return tokens_of(model, batch=3, length=14)


@pytest.fixture
def state(model, tokens):
    return model(tokens[:, :8], return_state=True)[1]


def same(one, other, tolerance=0.0):
    assert one.position == other.position and len(one.layers) == len(other.layers)
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert mine.tensors().keys() == theirs.tensors().keys()
        for name, tensor in mine.tensors().items():
            theirs_too = theirs.tensors()[name]
            assert theirs_too.dtype == tensor.dtype and theirs_too.shape == tensor.shape, name
            assert torch.equal(tensor, theirs_too) if tolerance == 0 else distance(theirs_too, tensor) <= tolerance, (
                name
            )


def test_what_a_state_holds(state):
    assert state.position == 8 and state.batch_size == 3
    assert list(state.layers[0].tensors()) == ["matrix", "conv_tail"]
    assert list(state.layers[1].tensors()) == ["keys", "values"]
    assert state.layers[0].matrix.shape == (3, 4, 3, 5)
    assert state.layers[0].conv_tail.shape == (3, 3, 2 * 2 * 3 + 4 * 5)
    assert state.layers[1].keys.shape == state.layers[1].values.shape == (3, 8, 2, 6)
    assert RecurrentState((LayerState(),)).batch_size is None


@over_stacks
@pytest.mark.parametrize(
    "edits", [(), (WriteEdit(0, 1, 4, "delete"), WriteEdit(0, 2, 9, "delete"))], ids=["plain", "edited"]
)
@pytest.mark.parametrize("start", [0, 3])
def test_snapshots_equal_the_states_of_truncated_runs(layer_types, edits, start):
    model = model_of(layer_types)
    tokens = tokens_of(model, length=14)
    first = model(tokens[:, :start], return_state=True, edits=edits)[1] if start else None
    wanted = [start, start + 1, 5, 9, 14]
    snapshots = model.snapshots(tokens[:, start:], wanted, state=first, edits=edits)
    assert sorted(snapshots) == sorted(set(wanted))
    for position, snapshot in snapshots.items():
        if position == start:
            assert snapshot.position == start
            continue
        _, expected = model(tokens[:, start:position], return_state=True, state=first, edits=edits)
        same(expected, snapshot, EXACT)
        if position < 14:
            resumed = model(tokens[:, position:], state=snapshot, edits=edits)
            whole, _ = model(tokens, return_state=True, edits=edits)
            assert distance(resumed, whole[:, position:]) <= EXACT


def test_a_snapshot_at_the_start_goes_on_like_a_fresh_run(model, tokens):
    snapshot = model.snapshots(tokens, [0])[0]
    assert snapshot.position == 0
    assert distance(model(tokens, state=snapshot), model(tokens)) <= EXACT


@given(st.sampled_from(list(STACKS.values())), st.lists(st.integers(0, 14), min_size=1, max_size=6), st.integers(0, 3))
def test_snapshots_anywhere(layer_types, positions, seed):
    model = model_of(layer_types)
    tokens = tokens_of(model, length=14, seed=seed)
    snapshots = model.snapshots(tokens, positions)
    assert set(snapshots) == set(positions)
    for position, snapshot in snapshots.items():
        if position:
            same(model(tokens[:, :position], return_state=True)[1], snapshot, EXACT)


def test_clone_is_deep(state):
    clone = state.clone()
    same(state, clone)
    clone.layers[0].matrix.zero_()
    assert state.layers[0].matrix.abs().max() > 0


def test_fork_repeats_each_row(model, tokens, state):
    forked = state.fork(2)
    assert forked.batch_size == 6 and forked.position == 8
    assert torch.equal(forked.layers[1].keys[3], state.layers[1].keys[1])
    logits = model(tokens[:, 8:].repeat_interleave(2, dim=0), state=forked)
    expected = model(tokens[:, 8:], state=state)
    assert distance(logits[::2], expected) <= EXACT and distance(logits[1::2], expected) <= EXACT
    with pytest.raises(ValueError, match="forked at least 1 way, got 0"):
        state.fork(0)


def test_forks_go_their_own_ways(model, tokens, state):
    row = state.index(1).fork(4)
    edits = [WriteEdit(0, head, 10, "delete", batch=head) for head in range(4)]
    logits = model(tokens[[1], 8:].expand(4, -1), state=row, edits=edits)
    for head in range(4):
        alone = model(tokens[[1], 8:], state=state.index(1), edits=[WriteEdit(0, head, 10, "delete")])
        assert distance(logits[[head]], alone) <= EXACT


@pytest.mark.parametrize(
    "rows", [1, -1, slice(0, 2), [2, 0], torch.tensor([2, 2, 1]), torch.tensor([True, False, True])], ids=str
)
def test_index_takes_rows(model, tokens, state, rows):
    chosen = state.index(rows)
    picked = torch.arange(3)[[rows] if isinstance(rows, int) else rows]
    assert chosen.batch_size == len(picked)
    logits = model(tokens[picked, 8:], state=chosen)
    assert distance(logits, model(tokens[:, 8:], state=state)[picked]) <= EXACT


@pytest.mark.parametrize("rows", [3, -4, [0, 3], torch.tensor([0, 5])], ids=str)
def test_index_out_of_range(state, rows):
    with pytest.raises(IndexError, match="batch row (3|-4|5) is out of range: the state holds 3 sequences"):
        state.index(rows)


def test_stack_undoes_index(model, tokens, state):
    same(RecurrentState.stack([state.index(0), state.index([1, 2])]), state)
    later = model(tokens[:, 8:], state=state, return_state=True)[1]
    with pytest.raises(ValueError, match=r"must share one position, got \[8, 14\]"):
        RecurrentState.stack([state, later])
    with pytest.raises(ValueError, match="at least one state"):
        RecurrentState.stack([])
    other = model_of(ALL_LINEAR)
    with pytest.raises(ValueError, match="states of the same model"):
        RecurrentState.stack([state, other(tokens[:, :8], return_state=True)[1]])


def test_with_matrix(model, tokens, state):
    double = state.with_matrix(2, 2 * state.layers[2].matrix)
    assert torch.equal(double.layers[2].matrix, 2 * state.layers[2].matrix)
    assert double.layers[2].conv_tail is state.layers[2].conv_tail and double.layers[0] is state.layers[0]

    def twice(matrix, hook):  # the same by a hook on the state after token 7
        return 2 * matrix if hook.positions[0] == 7 else matrix

    hooks = [("blocks.2.mixer.hook_state", twice)]
    expected = model.run_with_hooks(tokens, fwd_hooks=hooks)[:, 8:]
    assert distance(model(tokens[:, 8:], state=double), expected) <= EXACT
    with pytest.raises(IndexError, match="layer 3 is out of range: the state has 3 layers"):
        state.with_matrix(3, state.layers[0].matrix)
    with pytest.raises(ValueError, match="layer 1 has no matrix memory"):
        state.with_matrix(1, state.layers[0].matrix)
    with pytest.raises(ValueError, match=r"of shape \(3, 4, 3, 5\), got a matrix of shape \(1, 4, 3, 5\)"):
        state.with_matrix(0, state.layers[0].matrix[:1])


def test_to_and_detach(state):
    moved = state.to(torch.float32).to("cpu")
    assert all(tensor.dtype == torch.float32 for layer in moved.layers for tensor in layer.tensors().values())
    model = tiny_model()
    _, alive = model(tokens_of(model), return_state=True)
    assert alive.layers[0].matrix.requires_grad and not alive.detach().layers[0].matrix.requires_grad


def test_gradients_flow_through_a_state():
    model = tiny_model(HYBRID, seed=1)
    tokens = tokens_of(model)
    _, state = model(tokens[:, :6], return_state=True)
    model(tokens[:, 6:], state=state, return_type="loss").backward()
    through = model.embed.weight.grad.clone()
    model.zero_grad()
    model(tokens[:, 6:], state=state.detach(), return_type="loss").backward()
    assert distance(through, model.embed.weight.grad) > 1e-3


def test_states_are_never_changed_in_place(model, tokens, state):
    kept = state.clone()

    def spoil(tensor, hook):
        tensor.mul_(0.0)

    names = [f"blocks.{layer}.mixer.hook_{name}" for layer in (0, 2) for name in ("state", "q", "write", "log_decay")]
    edits = [WriteEdit(0, 1, 9, "delete", form="net")]
    with model.hooks(fwd_hooks=[(name, spoil) for name in names]):
        model(tokens[:, 8:], state=state, return_state=True, edits=edits)
        model.run_with_cache(tokens[:, 8:9], state=state)
    for backend in ("step", "chunked", "auto"):
        model(tokens[:, 8:], state=state, return_state=True, backend=backend)
    model.generate(tokens[:, 8:9], state=state, max_new_tokens=3)
    model.snapshots(tokens[:, 8:], range(8, 15), state=state)
    model.run_with_cache(tokens[:, 8:], state=state)[1].state(0, 0, slice(None))
    state.fork(2), state.index(0), state.with_matrix(0, state.layers[0].matrix * 0), state.detach()
    same(kept, state)
    with pytest.raises(AttributeError):
        state.position = 0


def test_save_and_load(tmp_path, model, tokens, state):
    path = state.save(tmp_path / "state.safetensors")
    loaded = RecurrentState.load(path)
    same(state, loaded)
    assert torch.equal(model(tokens[:, 8:], state=loaded), model(tokens[:, 8:], state=state))
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]
    same(RecurrentState.load(state.index(1).save(path)), state.index(1))  # overwritten as a whole


def test_an_empty_state_and_shared_tensors_can_be_saved(tmp_path, state):
    empty = RecurrentState((LayerState(), LayerState()))
    same(RecurrentState.load(empty.save(tmp_path / "empty")), empty)
    shared = state.with_matrix(0, state.layers[2].matrix)  # one tensor in two layers
    same(RecurrentState.load(shared.save(tmp_path / "shared")), shared)
    model = tiny_model(conv_size=1)
    _, alive = model(tokens_of(model), return_state=True)
    same(RecurrentState.load(alive.save(tmp_path / "alive")), alive.detach())


def test_a_failed_save_leaves_the_old_file_and_no_scraps(tmp_path, monkeypatch, state):
    from hooked_recurrent import files as module

    path = state.save(tmp_path / "state")
    before = path.read_bytes()

    def full_disk(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        state.index(0).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("case", ["missing", "folder", "truncated", "foreign", "no metadata", "text", "half a state"])
def test_files_that_are_no_state(tmp_path, state, case):
    path = tmp_path / "state"
    error, words = ValueError, "is not a whole safetensors file"
    if case == "missing":
        error, words = FileNotFoundError, f"no state file at {path}"
    elif case == "folder":
        path.mkdir()
        error, words = FileNotFoundError, f"no state file at {path}"
    elif case == "truncated":
        path.write_bytes(state.save(path).read_bytes()[:-100])
    elif case == "foreign":
        save_file({"weight": torch.zeros(2)}, path, metadata={"state": '{"format": "other"}'})
        words = "is no saved RecurrentState: its format is 'other', not 'hooked_recurrent.state.v1'"
    elif case == "no metadata":
        save_file({"weight": torch.zeros(2)}, path, metadata={"state": "not json"})
        words = "is no saved RecurrentState"
    elif case == "text":
        path.write_text("hello")
    else:
        with safe_open(state.save(path), framework="pt") as file:
            about = file.metadata()
        save_file({"layers.9.matrix": torch.zeros(2)}, path, metadata=about)
        words = "is no saved RecurrentState: it holds a tensor 'layers.9.matrix'"
    with pytest.raises(error, match=words):
        RecurrentState.load(path)


CHILD = """
import sys, torch
from safetensors.torch import load_file, save_file
from hooked_recurrent import RecurrentState
from tests.hooked_recurrent.models import STACKS, tiny_model
tokens, logits = load_file("tokens")["tokens"], {}
for name, layer_types in STACKS.items():
    model = tiny_model(layer_types, seed=1)
    logits[name] = model(tokens, state=RecurrentState.load(f"{name}.state")).detach()
save_file(logits, "logits")
"""


def test_a_state_goes_on_in_another_process(tmp_path, tokens):
    save_file({"tokens": tokens[:, 8:].contiguous()}, tmp_path / "tokens")
    for name, layer_types in STACKS.items():
        model_of(layer_types)(tokens[:, :8], return_state=True)[1].save(tmp_path / f"{name}.state")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", CHILD], check=True, cwd=tmp_path, timeout=120, env=environment)
    with safe_open(tmp_path / "logits", framework="pt") as file:
        for name, layer_types in STACKS.items():
            assert distance(file.get_tensor(name), model_of(layer_types)(tokens)[:, 8:]) <= EXACT
