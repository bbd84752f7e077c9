"""Files of torch.save: tensors are read, one copy each; anything else is refused, and nothing in it runs."""

import os
import re

import pytest
import torch

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.loading.checkpoint import FolderCheckpoint, TorchCheckpoint
from hooked_recurrent.loading.load import open_folder
from tests.hooked_recurrent.loading.official_mamba2 import official, save_original


class Hostile:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("beside_tensors", [True, False])
def test_a_malicious_pickle_is_refused_and_runs_nothing(zipped, beside_tensors, tmp_path, as_users_run):
    folder = save_original(official(), tmp_path / "model")
    file, trap = folder / "pytorch_model.bin", tmp_path / "it ran"
    content = {"backbone.norm_f.weight": torch.ones(32), "extra": Hostile(trap)} if beside_tensors else Hostile(trap)
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=re.escape(f"{file} was refused, and nothing in it was run")) as raised:
        HookedRecurrentModel.from_pretrained(folder)
    assert not trap.exists()
    assert str(raised.value).endswith(f"it asks for {os.mkdir.__module__}.mkdir, which is no tensor")
    torch.load(file, weights_only=False)  # the trap is real
    assert trap.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 half a zip file"], ids=["empty", "text", "half"])
def test_damaged_files(content, tmp_path, as_users_run):
    file = tmp_path / "model.pth"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="was refused, and nothing in it was run: it is damaged or"):
        TorchCheckpoint(file)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights file at .*model.pth"):
        TorchCheckpoint(tmp_path / "model.pth")


def test_a_truncated_file(tmp_path, as_users_run):
    file = tmp_path / "model.pth"
    torch.save({"a": torch.ones(1000)}, file)
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ValueError, match="was refused"):
        TorchCheckpoint(file)


@pytest.mark.parametrize(
    "content", [torch.ones(3), [torch.ones(3)], {"a": 1.0}, {"model": {"a": torch.ones(3)}}], ids=str
)
def test_other_contents(content, tmp_path, as_users_run):
    file = tmp_path / "model.pth"
    torch.save(content, file)
    with pytest.raises(ValueError, match="holds no tensors by name"):
        TorchCheckpoint(file)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_by_name(zipped, tmp_path):
    file = tmp_path / "model.pth"
    whole = torch.randn(4, 6)
    torch.save({"a": whole, "b": whole[1:3, ::2]}, file, _use_new_zipfile_serialization=zipped)
    before = file.read_bytes()
    checkpoint = TorchCheckpoint(file)
    assert checkpoint.names() == ["a", "b"] and checkpoint.origin == str(file)
    assert torch.equal(checkpoint.take("b"), whole[1:3, ::2])
    checkpoint.take("a").zero_()
    assert torch.equal(checkpoint.take("a"), whole)
    assert file.read_bytes() == before


def test_safetensors_are_preferred(tmp_path):
    folder = save_original(official(), tmp_path, as_bin=True)
    assert isinstance(open_folder(folder), TorchCheckpoint)
    save_original(official(), tmp_path, as_bin=False)
    assert isinstance(open_folder(folder), FolderCheckpoint)
