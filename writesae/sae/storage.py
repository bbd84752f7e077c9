"""A saved WriteSAE is a folder of two files: `sae.safetensors` (every tensor) and `config.json` (everything else).

    config.json   format_version, config (shape and variant), provenance (model, hook, layer, head, layout, split,
                  training configuration, metrics), save_id

Both files are written whole under temporary names in the same folder and then renamed, so a full disk or a killed
process leaves the earlier save as it was. `save_id`, a hash of the contents, stands in both: two halves of different
saves are noticed. Nothing here can run code: no pickle is read or written.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT_VERSION = 1
TENSORS, HEADER = "sae.safetensors", "config.json"


def _temporary(folder: Path, name: str, write: Callable[[str], None]) -> str:
    """Write a file under a temporary name beside its final place, down to the disk; returns the temporary path."""
    handle, path = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=folder)
    os.close(handle)
    try:
        write(path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(path, 0o644)
    except BaseException:
        os.unlink(path)
        raise
    return path


def _save_id(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def write_folder(folder: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Save tensors and header; an earlier save in the folder is replaced only when both new files are on the disk.

    Raises `ValueError` when the header holds something that JSON cannot, and `OSError` when the disk refuses.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; a WriteSAE is saved as a folder")
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_id = _save_id(ready, header)
    except TypeError as error:
        raise ValueError(f"the provenance of a WriteSAE must be plain JSON values: {error}") from None
    text = json.dumps({"format_version": FORMAT_VERSION, "save_id": save_id, **header}, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    finished = {
        TENSORS: _temporary(folder, TENSORS, lambda path: save_file(ready, path, metadata={"save_id": save_id}))
    }
    try:
        finished[HEADER] = _temporary(folder, HEADER, lambda path: _write_text(path, text))
    except BaseException:
        os.unlink(finished[TENSORS])
        raise
    for name, temporary in finished.items():
        os.replace(temporary, folder / name)
    return folder


def _write_text(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a saved folder.

    Raises `ValueError` when the folder or one of its files is missing or damaged, when the format version is not this
    one, or when the two files are of different saves.
    """
    for path in (folder, folder / HEADER, folder / TENSORS):
        if not path.exists():
            raise ValueError(f"no saved WriteSAE at {str(folder)!r}: {str(path)!r} does not exist")
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; give the folder that holds {HEADER} and {TENSORS}")
    header = _read_header(folder / HEADER)
    try:
        with safe_open(str(folder / TENSORS), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            save_id = (file.metadata() or {}).get("save_id")
    except SafetensorError as error:
        raise ValueError(f"{str(folder / TENSORS)!r} is damaged or truncated: {error}") from None
    if save_id and save_id != header.get("save_id"):
        raise ValueError(f"{HEADER} and {TENSORS} in {str(folder)!r} are of different saves; save the dictionary again")
    return tensors, header


def _read_header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}") from None
    if not isinstance(header, dict) or "format_version" not in header:
        raise ValueError(f"{str(path)!r} has no format_version: it is not the header of a saved WriteSAE")
    if header["format_version"] != FORMAT_VERSION:
        came = header["format_version"]
        raise ValueError(f"{str(path)!r} has format_version {came!r}; this version reads {FORMAT_VERSION}")
    for name in ("config", "provenance"):
        if not isinstance(header.get(name), dict):
            raise ValueError(f"{str(path)!r} has no {name!r}: it is not the header of a saved WriteSAE")
    return header


def check_tensors(folder: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` unless the tensors have the expected names, shapes and kinds, and only finite numbers."""
    path = str(folder / TENSORS)
    if missing := sorted(set(expected) - set(tensors)):
        raise ValueError(f"{path!r} lacks the tensors {', '.join(missing)}")
    if surplus := sorted(set(tensors) - set(expected)):
        raise ValueError(f"{path!r} has tensors that this configuration does not: {', '.join(surplus)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            came, wanted = tuple(tensor.shape), tuple(expected[name].shape)
            raise ValueError(f"{path!r} has {name} of shape {came}, its configuration expects {wanted}")
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise ValueError(f"{path!r} has {name} of type {tensor.dtype}, expected {expected[name].dtype}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{path!r} has NaN or infinity in {name}")
