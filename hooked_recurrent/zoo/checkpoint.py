"""Checkpoints of a training run: a folder per step, complete or absent, never half written.

`checkpoint-0001200/` holds `model.safetensors` (each parameter once, tied weights included) and `training.pt`
(optimisers, random generator, clock; read back with `weights_only=True`, so no code is ever executed). The folder is
written under a temporary name and renamed, which the file system does in one piece.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hooked_recurrent.files import sync

NAME = re.compile(r"checkpoint-(\d{7,})")


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer once: a tied weight appears under its first name only."""
    unique: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor
    return unique


def found(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the finished checkpoints, oldest first."""
    matches = [(NAME.fullmatch(path.name), path) for path in Path(folder).glob("checkpoint-*")]
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def newest(folder: Path) -> Path | None:
    """The newest finished checkpoint, or None."""
    paths = found(folder)
    return paths[-1][1] if paths else None


def save(folder: Path, step: int, model: nn.Module, state: dict[str, Any]) -> Path:
    """Write the checkpoint of `step` and remove the older ones; returns its path."""
    final = Path(folder) / f"checkpoint-{step:07d}"
    temporary = final.with_name(final.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {name: tensor.detach().contiguous() for name, tensor in tensors_of(model).items()}
    save_file(weights, temporary / "model.safetensors")
    torch.save({"step": step, **state}, temporary / "training.pt")
    for path in temporary.iterdir():
        sync(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    for _, path in found(folder):
        if path != final:
            shutil.rmtree(path)
    return final


def load_newest(folder: Path, model: nn.Module) -> tuple[int, dict[str, Any]]:
    """Copy the newest checkpoint's weights into `model`; returns its step and the state given to `save`.

    Raises `ValueError` when there is no checkpoint or its tensors are not those of the model.
    """
    path = newest(folder)
    if path is None:
        raise ValueError(f"no checkpoint in {str(folder)!r}: nothing to resume")
    weights, own = load_file(path / "model.safetensors"), tensors_of(model)
    if different := sorted(set(weights) ^ set(own)):
        raise ValueError(f"{str(path)!r} is of another model: only one of the two has {', '.join(different[:5])}")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != weights[name].shape:
                came, expected = tuple(weights[name].shape), tuple(tensor.shape)
                raise ValueError(f"{str(path)!r} has {name} of shape {came}, the model expects {expected}")
            tensor.copy_(weights[name])
    state = torch.load(path / "training.pt", weights_only=True)
    return state["step"], state
