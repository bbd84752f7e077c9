"""One value per position: each call takes those of its own positions, in whatever order an edit names them."""

import numpy as np
import pytest
import torch

from hooked_recurrent import ActivationEdit, StateEdit, WriteEdit
from tests.hooked_recurrent.edits.draws import READINGS, model_of, random_tensor
from tests.hooked_recurrent.models import distance, over_stacks, tokens_of

pytestmark = pytest.mark.shapes_on_one_rule


@over_stacks
@pytest.mark.parametrize("position", [slice(2, 11, 2), slice(7, None), torch.tensor([9, 2, 7, 11, 3])], ids=str)
def test_every_call_takes_the_values_of_its_positions(layer_types, position):
    model = model_of(layer_types)
    tokens = tokens_of(model)
    edits = [ActivationEdit("blocks.0.mixer.hook_z", position, random_tensor(2, 5, 5), head=1)]
    for reading in READINGS:
        edits.append(StateEdit(0, 1, position, matrix=random_tensor(5, 3, 5, seed=1), reading=reading))
        key, value = random_tensor(5, 3, seed=2), random_tensor(2, 5, 5, seed=3)
        edits.append(WriteEdit(0, 2, position, "add", key=key.expand(2, -1, -1), value=value, reading=reading))
    for edit in edits:
        where = torch.arange(12)[position].tolist()
        tensors = [name for name in ("value", "matrix", "key") if getattr(edit, name, None) is not None]
        at_one = []
        for index, place in enumerate(where):
            given = {name: getattr(edit, name) for name in tensors}
            given = {name: t[:, [index]] if name != "matrix" else t[[index]] for name, t in given.items()}
            at_one.append(type(edit)(**{**vars(edit), **given, "position": place}))
        expected = model(tokens, edits=at_one)
        assert distance(model(tokens, edits=[edit]), expected) <= 1e-9
        first, state = model(tokens[:, :8], edits=[edit], return_state=True)
        rest = model(tokens[:, 8:], state=state, edits=[edit])
        assert distance(torch.cat([first, rest], dim=1), expected) <= 1e-9


def test_lists_ranges_and_arrays_of_positions_are_tensors(as_users_run):
    """So that such edits are equal, can be hashed, and come back from a file as they were."""
    edits = [WriteEdit(0, 1, wanted, "delete", batch=[0, 1]) for wanted in ([2, 3], range(2, 4), np.array([2, 3]))]
    edits.append(WriteEdit(0, 1, torch.tensor([2, 3]), "delete", batch=torch.tensor([0, 1])))
    assert len(set(edits)) == 1
    assert ActivationEdit("hook_embed", [2, 3], 0.0) == ActivationEdit("hook_embed", torch.tensor([2, 3]), 0.0)
    with pytest.raises(TypeError, match="positions must be integers"):
        WriteEdit(0, 1, [0.5], "delete")
