"""What edits show in a notebook: every field that was chosen, and lists of them as one table."""

import torch

from hooked_recurrent import ActivationEdit, Edits, StateEdit, WriteEdit, load_edits, save_edits
from tests.hooked_recurrent.display.reading import Reader, table_of

EDITS = [
    WriteEdit(0, 1, slice(2, 9), key=torch.ones(3), value=torch.full((5,), 2.0), reading="cache"),
    StateEdit(1, 2, torch.tensor([3, 5]), "scale", scale=0.5),
    ActivationEdit("blocks.0.hook_resid_pre", 4, 0.0, batch=1),
]


def test_a_row_with_the_fields_that_were_chosen():
    (row,) = table_of(EDITS[0]._repr_html_())
    assert row == {
        "layer": "0", "head": "1", "position": "2:9", "op": "'replace'", "key": "float32[3] |1.73|",
        "value": "float32[5] |4.47|", "reading": "'cache'",
    }  # fmt: skip
    (row,) = table_of(EDITS[2]._repr_html_())
    assert row == {
        "hook": "'blocks.0.hook_resid_pre'",
        "position": "4",
        "value": "0.0",
        "batch": "1",
        "op": "'replace'",
    }


def test_many_edits_are_one_table_and_one_line():
    many = Edits(EDITS * 100)
    assert repr(many) == "Edits(100 WriteEdit, 100 StateEdit, 100 ActivationEdit)" and repr(Edits()) == "Edits()"
    rows = table_of(many._repr_html_())
    assert [row["edit"] for row in rows[:3]] == ["WriteEdit", "StateEdit", "ActivationEdit"]
    assert rows[1]["scale"] == "0.5" and rows[1]["position"] == "[3, 5]" and rows[0]["scale"] == ""
    assert "300 edits" in Reader(many._repr_html_()).text


def test_what_comes_from_a_file_shows_itself(tmp_path):
    loaded = load_edits(save_edits(tmp_path / "edits.safetensors", EDITS))
    assert loaded == EDITS and repr(loaded) == "Edits(1 WriteEdit, 1 StateEdit, 1 ActivationEdit)"
