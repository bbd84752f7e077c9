"""Files that are there whole or not at all: a temporary name beside the file, the bytes on disk, then a rename."""

import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def sync(path: Path) -> None:
    """Ask the system to put a file's bytes on disk before going on."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a file in one piece: a temporary file beside it, then a rename. Its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    """Write one safetensors file in one piece; the tensors are copied, so that they may share memory or have gaps."""
    whole = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        part = Path(scratch) / path.name
        save_file(whole, part, metadata=metadata)
        sync(part)
        os.replace(part, path)
    return path
