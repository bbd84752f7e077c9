"""The fork engine with edits of all three kinds: the numbers of the plain full pass."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_recurrent import ActivationEdit, StateEdit, WriteEdit
from hooked_recurrent.patching import run_edits
from tests.hooked_recurrent.edits.draws import (
    LENGTH,
    activation_edits,
    composite,
    model_of,
    random_tensor,
    state_edits,
    write_edits,
)
from tests.hooked_recurrent.models import HYBRID, STACKS, distance, over_stacks, tokens_of

pytestmark = pytest.mark.shapes_on_one_rule

EXACT = 1e-9


@composite
def interventions(draw, model):
    """Several, each of one or two edits of a single row; what is drawn for several rows is made to fit one."""
    kinds = st.one_of(write_edits(model), state_edits(model), activation_edits(model, in_blocks=True))
    one_row = kinds.filter(lambda edit: isinstance(edit.batch, int))
    some = draw(st.lists(st.lists(one_row, min_size=1, max_size=2), min_size=1, max_size=4))
    return [[replace(edit, batch=edits[0].batch) for edit in edits] for edits in some]


@pytest.mark.parametrize("name", STACKS)
@settings(max_examples=10)
@given(data=st.data(), memory=st.sampled_from([1, 2**30]))
def test_any_kinds_equal_the_full_pass(name, data, memory):
    model = model_of(STACKS[name])
    tokens = tokens_of(model, length=LENGTH)
    some = data.draw(interventions(model))
    forks = list(run_edits(model, tokens, some, horizon=None, memory=memory))
    assert sorted(fork.index for fork in forks) == list(range(len(some)))
    for fork in forks:
        full = model(tokens, edits=some[fork.index])[fork.row]
        assert distance(fork.logits, full[fork.position :]) <= EXACT


@over_stacks
def test_a_batch_of_all_kinds_at_one_site(layer_types):
    """They run side by side; write edits that differ in their reading alone are not taken for one."""
    model = model_of(layer_types)
    text = tokens_of(model, length=LENGTH)[:1]
    key, value, matrix = random_tensor(3), random_tensor(5), random_tensor(3, 5)
    some = [WriteEdit(0, 1, 4, key=key, value=value, reading=reading) for reading in ("in_recurrence", "cache")]
    some += [WriteEdit(0, 1, 4, "delete", reading=reading) for reading in ("in_recurrence", "cache")]
    some += [StateEdit(0, 1, 4, "add", matrix=matrix, reading=reading) for reading in ("in_recurrence", "cache")]
    some += [StateEdit(0, 1, 4, "delete"), StateEdit(0, 2, 4, "delete")]
    some += [ActivationEdit("blocks.0.hook_resid_pre", 4, random_tensor(12))]
    some += [ActivationEdit("blocks.0.mixer.hook_z", 4, 0.0, head=head) for head in range(4)]
    for fork in run_edits(model, text, some, horizon=None):
        full = model(text, edits=[some[fork.index]])[0, 4:]
        assert distance(fork.logits, full) <= EXACT
        assert distance(fork.logits, model(text)[0, 4:]) > 1e-6


def test_a_softmax_layer_can_be_forked():
    model = model_of(HYBRID)
    text = tokens_of(model, length=LENGTH)[:1]
    edit = ActivationEdit("blocks.1.attn.hook_z", slice(5, 7), 0.0, head=2)
    (fork,) = run_edits(model, text, [edit], horizon=4)
    assert distance(fork.logits, model(text, edits=[edit])[0, 5:10]) <= EXACT


def test_a_hook_outside_the_blocks_cannot_be_forked(as_users_run):
    model = model_of(HYBRID)
    for hook in ("hook_embed", "ln_final.hook_normalized"):
        with pytest.raises(
            ValueError, match=f"intervention 0 edits {hook}, position 1, outside the blocks: a fork enters"
        ):
            run_edits(model, tokens_of(model), [ActivationEdit(hook, 1, torch.zeros(12), batch=0)])
