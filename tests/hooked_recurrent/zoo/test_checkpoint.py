import pytest
import torch
from safetensors import safe_open
from torch import nn

from hooked_recurrent.zoo import checkpoint


def tied(width: int = 3) -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(5, width), "unembed": nn.Linear(width, 5, bias=False)})
    model["unembed"].weight = model["embed"].weight
    return model


def test_weights_and_state_come_back(tmp_path):
    model, other = tied(), tied()
    checkpoint.save(tmp_path, 7, model, {"seconds": 1.5, "generator": torch.Generator().get_state()})
    step, state = checkpoint.load_newest(tmp_path, other)
    assert step == 7 and state["seconds"] == 1.5
    assert torch.equal(other["embed"].weight, model["embed"].weight)
    assert other["unembed"].weight is other["embed"].weight


def test_a_tied_weight_is_written_once(tmp_path):
    path = checkpoint.save(tmp_path, 1, tied(), {})
    with safe_open(path / "model.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["embed.weight"]


def test_only_the_newest_is_kept_and_half_written_ones_are_ignored(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, tied(), {})
    (tmp_path / "checkpoint-0000009.tmp").mkdir()
    assert [path.name for _, path in checkpoint.found(tmp_path)] == ["checkpoint-0000003"]
    assert checkpoint.newest(tmp_path).name == "checkpoint-0000003"


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, tied(), {})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path, 2, tied(), {})
    assert checkpoint.newest(tmp_path).name == "checkpoint-0000001"


def test_errors_are_clear(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint in .*nothing to resume"):
        checkpoint.load_newest(tmp_path, tied())
    checkpoint.save(tmp_path, 1, tied(), {})
    with pytest.raises(ValueError, match=r"embed.weight of shape \(5, 3\), the model expects \(5, 4\)"):
        checkpoint.load_newest(tmp_path, tied(4))
    with pytest.raises(ValueError, match="of another model: only one of the two has bias, embed.weight"):
        checkpoint.load_newest(tmp_path, nn.Linear(2, 2))
