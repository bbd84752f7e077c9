"""Edits as things: printed in a line, compared by their entries, kept in files that are whole or refused."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hooked_recurrent import ActivationEdit, StateEdit, WriteEdit, load_edits, save_edits
from tests.hooked_recurrent.edits.draws import BATCH, LENGTH, any_edits, model_of, random_tensor
from tests.hooked_recurrent.models import HYBRID, tokens_of

KEY, VALUE = torch.tensor([0.6, 0.8, 0.0]), torch.zeros(5)
SHOWN = [
    (
        WriteEdit(1, 3, 5, key=KEY, value=VALUE),
        "WriteEdit(layer=1, head=3, position=5, op='replace', key=float32[3] |1.00|, value=float32[5] |0.00|)",
    ),
    (
        WriteEdit(0, 1, slice(2, 9, 3), "delete", form="net", batch=0, reading="cache"),
        "WriteEdit(layer=0, head=1, position=2:9:3, op='delete', batch=0, form='net', reading='cache')",
    ),
    (
        StateEdit(0, 1, torch.tensor([8, 2]), "scale", scale=0.5, batch=torch.tensor([1, 0])),
        "StateEdit(layer=0, head=1, position=[8, 2], op='scale', scale=0.5, batch=[1, 0])",
    ),
    (
        StateEdit(0, 1, torch.arange(40), "delete"),
        "StateEdit(layer=0, head=1, position=[0, 1, 2, ... 40 in all], op='delete')",
    ),
    (
        ActivationEdit("blocks.1.hook_resid_pre", slice(3, None), 0.0),
        "ActivationEdit(hook='blocks.1.hook_resid_pre', position=3:, value=0.0, op='replace')",
    ),
]


@pytest.mark.parametrize(("edit", "line"), SHOWN, ids=[line for _, line in SHOWN])
def test_an_edit_is_one_short_line(edit, line):
    assert repr(edit) == line


def test_edits_are_equal_where_every_field_is(as_users_run):
    def make(**given):
        return WriteEdit(0, 1, torch.tensor([2, 5]), **{"key": KEY.clone(), "value": KEY.clone(), **given})

    assert make() == make() and hash(make()) == hash(make()) and len({make(), make()}) == 1
    others = [
        make(key=2 * KEY),
        make(key=KEY.double()),
        make(key=KEY[None]),
        make(batch=0),
        make(reading="cache"),
        replace(make(), position=torch.tensor([2, 6])),
        replace(make(), position=slice(2, 6, 3)),
    ]
    assert all(make() != other for other in others)
    assert WriteEdit(0, 1, 2, "delete") != StateEdit(0, 1, 2, "delete") and WriteEdit(0, 1, 2, "delete") != "delete"
    assert hash(WriteEdit(0, 1, slice(0, 3), "delete")) == hash(WriteEdit(0, 1, slice(0, 3), "delete"))


@settings(max_examples=10)
@given(data=st.data())
def test_a_file_gives_back_equal_edits(tmp_path_factory, data):
    model = model_of(HYBRID)
    edits = data.draw(st.lists(any_edits(model), max_size=5))
    path = tmp_path_factory.mktemp("edits") / "some"
    assert save_edits(path, iter(edits)) == path
    again = load_edits(path)
    assert again == edits and [repr(one) for one in again] == [repr(one) for one in edits]
    tokens = tokens_of(model, BATCH, LENGTH)
    assert torch.equal(model(tokens, edits=again), model(tokens, edits=edits))


def test_shared_narrow_and_graph_bound_tensors_are_kept(tmp_path, as_users_run):
    wide = random_tensor(3, 4).requires_grad_()
    edits = [
        WriteEdit(0, 0, 1, key=wide[:, 0].bfloat16(), value=wide[:, 0].bfloat16()),
        StateEdit(0, 0, slice(None, 4), matrix=wide.mT[None].expand(4, -1, -1)),
        ActivationEdit("blocks.0.mixer.hook_beta", 1, torch.tensor(0.25), head=1),
        ActivationEdit("hook_embed", 1, 0.1 + 0.2),
    ]
    again = load_edits(save_edits(tmp_path / "edits", edits))
    assert again == edits and not again[0].key.requires_grad
    with pytest.raises(TypeError, match="edits must be WriteEdit, StateEdit, ActivationEdit, got dict"):
        save_edits(tmp_path / "edits", [{}])
    assert load_edits(tmp_path / "edits") == edits


def test_a_failed_save_leaves_the_old_file_and_no_scraps(tmp_path, monkeypatch):
    from hooked_recurrent import files

    edits = [WriteEdit(0, 0, 1, "delete")]
    path = save_edits(tmp_path / "edits", edits)

    def full_disk(*args, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_edits(path, [])
    assert load_edits(path) == edits and [file.name for file in tmp_path.iterdir()] == ["edits"]


def test_files_that_hold_no_edits(tmp_path):
    path = save_edits(tmp_path / "edits", [WriteEdit(0, 0, 1, key=KEY, value=KEY)])
    whole = path.read_bytes()
    with pytest.raises(FileNotFoundError, match="no edits file at"):
        load_edits(tmp_path / "nowhere")
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="edits is not a whole safetensors file"):
        load_edits(path)
    path.write_text("key = 1")
    with pytest.raises(ValueError, match="edits is not a whole safetensors file"):
        load_edits(path)
    for metadata in (
        None,
        {"state": "{}"},
        {"edits": "["},
        {"edits": "[]"},
        {"edits": '{"format": "v9", "edits": []}'},
    ):
        save_file({"0.key": KEY}, path, metadata=metadata)
        with pytest.raises(
            ValueError, match="edits holds no saved edits: its format is .* not 'hooked_recurrent.edits"
        ):
            load_edits(path)


SITE = {"layer": 0, "head": 0, "position": 1}
BAD = {
    "kind": (
        {"kind": "GateEdit", "fields": SITE},
        {},
        "edit 0 of .* is of an unknown kind 'GateEdit'; expected one of",
    ),
    "no kind": (7, {}, "edit 0 of .* is of an unknown kind None"),
    "no fields": ({"kind": "WriteEdit"}, {}, "edit 0 of .* is of an unknown kind 'WriteEdit'"),
    "field": (
        {"kind": "WriteEdit", "fields": {**SITE, "op": "delete", "gate": 1}},
        {},
        "edit 0 of .* is a WriteEdit with an unknown field 'gate'",
    ),
    "tensor field": (
        {"kind": "WriteEdit", "fields": {**SITE, "op": "delete"}},
        {"0.gate": KEY},
        "edit 0 of .* is a WriteEdit with an unknown field 'gate'",
    ),
    "missing tensor": (
        {"kind": "WriteEdit", "fields": SITE},
        {},
        "edit 0 of .* is no WriteEdit: op 'replace' needs key",
    ),
    "missing field": ({"kind": "StateEdit", "fields": {"layer": 0}}, {}, "edit 0 of .* is no StateEdit: .*missing"),
    "bad value": (
        {"kind": "WriteEdit", "fields": {**SITE, "op": "swap"}},
        {},
        "edit 0 of .* is no WriteEdit: unknown op 'swap'",
    ),
    "bad slice": (
        {"kind": "StateEdit", "fields": {**SITE, "op": "delete", "position": [1, 2, 3, 4]}},
        {},
        "edit 0 of .* is no StateEdit",
    ),
    "foreign tensor": (
        {"kind": "WriteEdit", "fields": {**SITE, "op": "delete"}},
        {"3.key": KEY},
        "holds a tensor '3.key' that belongs to none of its 1 edits",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_with_something_unknown_is_refused(tmp_path, case, as_users_run):
    entry, tensors, words = BAD[case]
    path = tmp_path / "edits"
    metadata = {"edits": json.dumps({"format": "hooked_recurrent.edits.v1", "edits": [entry]})}
    save_file(tensors, path, metadata=metadata)
    assert set(load_file(path)) == set(tensors)
    with pytest.raises(ValueError, match=words):
        load_edits(path)


def test_the_path_comes_first(tmp_path, as_users_run):
    with pytest.raises(TypeError, match="save_edits takes the path first and then the edits, got list as path"):
        save_edits([WriteEdit(0, 0, 3, "delete")], tmp_path / "edits")
