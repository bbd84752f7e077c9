"""Files that are written whole."""

import pytest
import torch
from safetensors.torch import load_file

from hooked_recurrent.files import save_tensors, tensor_writer, write_text, write_together


def test_text_is_replaced_in_one_piece(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two" and [file.name for file in path.parent.iterdir()] == ["a.json"]


def write(text):
    return lambda path: path.write_text(text)


def fail(path):
    path.write_text("half")
    raise OSError(28, "No space left on device")


def test_several_files_are_replaced_only_when_all_are_written(tmp_path):
    folder = tmp_path / "deep"
    write_together(folder, {"a": write("1"), "b": write("1")})
    with pytest.raises(OSError, match="No space"):
        write_together(folder, {"a": write("2"), "b": fail})
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "1", "b": "1"}
    write_together(folder, {"a": write("3"), "b": write("3")})
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "3", "b": "3"}


def test_tensors_are_copied_before_they_are_written(tmp_path):
    whole = torch.arange(6.0).view(2, 3)
    writer = tensor_writer({"whole": whole, "column": whole[:, 1]}, {"id": "x"})
    whole.zero_()
    writer(tmp_path / "t.safetensors")
    assert torch.equal(load_file(tmp_path / "t.safetensors")["column"], torch.tensor([1.0, 4.0]))
    path = save_tensors(tmp_path / "deep" / "s.safetensors", {"column": whole[:, 1]}, {})
    assert torch.equal(load_file(path)["column"], torch.zeros(2))
