"""Files that are there whole or not at all: a temporary name beside the file, the bytes on disk, then a rename."""

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def sync(path: Path) -> None:
    """Ask the system to put a file's bytes on disk before going on."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def make_folder(folder: Path) -> None:
    """Make a folder with those above it. Raises an `OSError` in plain words where something stands in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        raise NotADirectoryError(f"cannot write into {folder}: {there} is a file, not a folder") from None
    except PermissionError:
        raise PermissionError(f"cannot make {folder}: no permission; give another place") from None


def write_together(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write several files of one folder, which is made where it is missing.

    Every file is first written and synced in a hidden folder beside them (`writers` gives, by file name, a function that
    writes to the path it is handed); only when all of them are on the disk are they renamed into place. So a full disk or
    a killed process leaves the earlier files as they were.
    """
    make_folder(folder)
    for name in writers:
        if (folder / name).is_dir():
            raise IsADirectoryError(f"cannot write the file {folder / name}: it is a folder")
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{next(iter(writers), '')}.") as scratch:
        for name, write in writers.items():
            write(Path(scratch) / name)
            sync(Path(scratch) / name)
        for name in writers:
            os.replace(Path(scratch) / name, folder / name)


def write_text(path: Path, text: str) -> None:
    """Write one text file in one piece. Its folder is made where it is missing."""
    write_together(path.parent, {path.name: lambda part: part.write_text(text, encoding="utf-8")})


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Path:
    """Write one safetensors file in one piece; the tensors are copied, so that they may share memory or have gaps."""
    write_together(path.parent, {path.name: tensor_writer(tensors, metadata)})
    return path


def tensor_writer(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Callable[[Path], None]:
    """A writer, for `write_together`, of copies of the tensors: they may share memory, have gaps, or change before it runs."""
    whole = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    return lambda path: save_file(whole, path, metadata=metadata)


def plain(value: Any) -> Any:
    """A value as JSON can hold it: numpy's numbers as Python's, tuples as lists, what is not finite as None."""
    if isinstance(value, dict):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return plain(asdict(value))
    if hasattr(value, "tolist"):  # numpy's and torch's
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
