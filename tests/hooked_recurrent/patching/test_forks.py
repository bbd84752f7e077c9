"""The fork engine: the numbers of the plain full pass with the same edit, for every rule and the hybrid."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_recurrent import WriteEdit
from hooked_recurrent.patching import Trunk, run_edits
from tests.hooked_recurrent.edits.draws import composite
from tests.hooked_recurrent.models import HYBRID, STACKS, distance, tiny_model, tokens_of

pytestmark = pytest.mark.shapes_on_one_rule

EXACT = 1e-9  # float64
LENGTH = 12
MODELS = {}


def model_of(name):
    if name not in MODELS:
        MODELS[name] = tiny_model(STACKS[name], seed=2).requires_grad_(False)
    return MODELS[name]


def edit_of(model, draw, position, row):
    layer = draw(st.sampled_from(model.cfg.recurrent_layers))
    head, op = draw(st.integers(0, 3)), draw(st.sampled_from(["replace", "add", "delete", "scale"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    sides = {}
    if op in ("replace", "add"):
        widths = {"key": model.cfg.d_k, "value": model.cfg.d_v}
        sides = {name: torch.randn(d, generator=generator, dtype=torch.float64) for name, d in widths.items()}
    if op == "scale":
        sides = {"scale": draw(st.sampled_from([-1.0, 0.5, 2.0]))}
    return WriteEdit(layer, head, position, op, batch=row, **sides)


@composite
def interventions(draw, model, horizon):
    some = []
    for _ in range(draw(st.integers(1, 6))):
        row, first = draw(st.integers(0, 1)), draw(st.integers(0, LENGTH - 1))
        last = LENGTH - 1 if horizon is None else min(LENGTH - 1, first + horizon)
        others = draw(st.lists(st.integers(first, last), max_size=1))
        some.append([edit_of(model, draw, position, row) for position in (first, *others)])
    return some


@pytest.mark.parametrize("name", STACKS)
@given(data=st.data(), horizon=st.sampled_from([0, 1, 3, None]), memory=st.sampled_from([1, 20_000, 2**30]))
def test_equals_the_full_pass(name, data, horizon, memory):
    model, tokens = model_of(name), tokens_of(model_of(name), length=LENGTH)
    some = data.draw(interventions(model, horizon))
    forks = list(run_edits(model, tokens, some, horizon=horizon, memory=memory))
    assert sorted(fork.index for fork in forks) == list(range(len(some)))
    for fork in forks:
        full = model.run_with_hooks(tokens, edits=some[fork.index])[fork.row]
        stop = LENGTH if horizon is None else fork.position + horizon + 1
        assert distance(fork.logits, full[fork.position : stop]) <= EXACT


def test_the_order_is_fixed_and_what_is_done_is_left_out():
    model, tokens = model_of("hybrid"), tokens_of(model_of("hybrid"), length=LENGTH)
    some = [WriteEdit(layer, 0, t, "delete", batch=row) for row in (1, 0) for t in (7, 3) for layer in (2, 0)]
    heard = []
    forks = list(run_edits(model, tokens, some, on_progress=lambda done, total: heard.append((done, total))))
    places = [(fork.row, some[fork.index].layer, fork.position) for fork in forks]
    assert places == sorted(places) and heard[-1] == (8, 8)
    rest = list(run_edits(model, tokens, some, done=[fork.index for fork in forks[:3]]))
    assert [fork.index for fork in rest] == [fork.index for fork in forks[3:]]
    assert all(distance(a.logits, b.logits) <= EXACT for a, b in zip(rest, forks[3:], strict=True))


def test_nothing_below_or_before_runs_again():
    """The hooks of the layers below see the plain pass alone; the edited layer sees its batch, at the edited position on."""
    model, tokens = model_of("rwkv7"), tokens_of(model_of("rwkv7"), length=LENGTH)
    below, at = [], []
    hooks = [("blocks.0.hook_resid_post", lambda x, hook: below.append(tuple(x.shape[:2])))]
    hooks += [("blocks.1.hook_resid_pre", lambda x, hook: at.append((x.shape[0], hook.positions.tolist())))]
    some = [WriteEdit(1, head, 5, "delete", batch=0) for head in range(4)]
    with model.hooks(fwd_hooks=hooks):
        list(run_edits(model, tokens[:1], some, horizon=1))
    assert below[0] == (1, LENGTH) and at[-1] == (4, [5, 6])
    assert all(rows == 1 for rows, _ in below)


@pytest.mark.parametrize("op", ["replace", "add", "delete", "scale"])
def test_alike_edits_run_as_one(op):
    """A batch of edits of one site, whose sides differ from row to row, and one that is given per position."""
    model, text = model_of("mamba2"), tokens_of(model_of("mamba2"), length=LENGTH)[:1]
    some = []
    for row in range(4):
        key, value = torch.randn(3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
        sides = {"key": key, "value": value} if op in ("replace", "add") else {}
        sides = {"scale": 0.5 if row < 2 else -1.0} if op == "scale" else sides
        if row == 3 and sides.get("key") is not None:
            sides = {name: side[None] for name, side in sides.items()}
        some.append(WriteEdit(0, 2, 4, op, **sides))
    for fork in run_edits(model, text, some, horizon=None):
        full = model.run_with_hooks(text, edits=[some[fork.index]])[0, 4:]
        assert distance(fork.logits, full) <= EXACT


BAD = {
    "no edits": ([[]], "intervention 0 has no edits"),
    "no row": ([WriteEdit(0, 0, 1, "delete")], "intervention 0 must name one row of the 2 texts"),
    "two rows": (
        [[WriteEdit(0, 0, 1, "delete", batch=0), WriteEdit(0, 0, 1, "delete", batch=1)]],
        "intervention 0 must name one row",
    ),
    "far row": ([WriteEdit(0, 0, 1, "delete", batch=2)], "row 2 of intervention 0 is out of range: there are 2 texts"),
    "behind": (
        [[WriteEdit(0, 0, t, "delete", batch=0) for t in (1, 4)]],
        r"intervention 0 edits position 4, behind its horizon 1 \+ 1",
    ),
    "softmax": ([WriteEdit(1, 0, 1, "delete", batch=0)], "layer 1 is softmax attention"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_interventions(case, as_users_run):
    some, words = BAD[case]
    model = model_of("hybrid")
    with pytest.raises((ValueError, IndexError), match=words):
        run_edits(model, tokens_of(model), some)
    with pytest.raises(ValueError, match="horizon must be at least 0, got -1"):
        run_edits(model, tokens_of(model), [], horizon=-1)


def test_a_run_that_enters_at_a_layer(as_users_run):
    model = tiny_model(HYBRID)
    tokens = tokens_of(model)
    logits, cache = model.run_with_cache(tokens)
    empty = model.snapshots(tokens, [0])[0]
    again = model.run_from(1, cache["blocks.1.hook_resid_pre"], empty)
    assert distance(again, logits) <= EXACT
    with pytest.raises(IndexError, match="layer 3 is out of range: the model has layers 0 to 2"):
        model.run_from(3, cache["blocks.1.hook_resid_pre"], empty)
    with pytest.raises(ValueError, match="the edit at layer 0, head 0, position 1 lies below layer 1"):
        model.run_from(1, cache["blocks.1.hook_resid_pre"], empty, edits=[WriteEdit(0, 0, 1, "delete")])
    with pytest.raises(ValueError, match="NaN or Inf in the logits of a run that entered at layer 1, position 0"):
        model.run_from(1, cache["blocks.1.hook_resid_pre"] * torch.nan, empty)


@pytest.mark.parametrize("name", STACKS)
def test_a_kept_trunk_serves_many_calls(name, as_users_run):
    model = model_of(name)
    text = tokens_of(model, length=LENGTH)[:1]
    trunk = Trunk.grow(model, text, [3, 7])
    for layer in model.cfg.recurrent_layers:
        edits = [WriteEdit(layer, 1, t, "delete") for t in (7, 3, 5, 9)]
        for fork in run_edits(model, text, edits, horizon=2, trunk=trunk):
            full = model.run_with_hooks(text, edits=[edits[fork.index]])[0, fork.position : fork.position + 3]
            assert distance(fork.logits, full) <= EXACT
    with pytest.raises(ValueError, match="the trunk holds no state at or before 2; its first is at 3"):
        run_edits(model, text, [WriteEdit(0, 0, 2, "delete")], trunk=trunk)
    with pytest.raises(ValueError, match="the trunk holds one text, not 2"):
        run_edits(model, text.repeat(2, 1), [WriteEdit(0, 0, 3, "delete", batch=0)], trunk=trunk)
