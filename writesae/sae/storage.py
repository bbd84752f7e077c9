"""A saved WriteSAE is a folder of two files: `sae.safetensors` (every tensor) and `config.json` (everything else).

    config.json   format_version, save_id, config (shape and variant), provenance

The provenance is an open record of plain JSON values that always answers the questions in `ORIGIN`, null where nobody
knows. Version 1, before the family of encoders, decoders and activations, had neither their fields in its config nor a
promise about the provenance; it is read as what it meant then.

Both files are on the disk under temporary names before either is renamed, so a full disk or a killed process leaves
the earlier save as it was. `save_id`, a hash of the contents, stands in both: two halves of different saves are
noticed. Nothing here can run code: no pickle is read or written.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hooked_recurrent.files import tensor_writer, write_together

FORMAT_VERSION = 2
READABLE = (1, 2)
TENSORS, HEADER = "sae.safetensors", "config.json"
ORIGIN = {
    "model": "name of the model, as it is loaded",
    "revision": "commit, tag or branch of the model's repository",
    "hook": "name of the hook whose matrices or vectors these are",
    "head": "value head",
    "layout": "which axis of a matrix comes first; 'key_first' in every version",
    "form": "form of the write: 'additive', or 'net' of what the model erases",
    "split": "text that was read, and which side of which split it is on",
    "training": "configuration of the training run",
}
"""What the provenance of a saved dictionary answers, and what each answer means."""
LAYOUT = "key_first"
# What the fields that version 1 did not have meant while there was one value of each.
_VERSION_1 = {"encoder": "bilinear", "decoder": "outer_product", "activation": "topk"}


def _save_id(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def write_folder(folder: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Save tensors and header; an earlier save in the folder is replaced only when both new files are on the disk.

    Raises:
        ValueError: the header holds something that JSON cannot, the layout is not key-first, a tensor holds NaN or infinity
            (it could not be loaded again), or the folder is a file, or another program's: its config.json is not ours.
        OSError: the disk refuses.
    """
    check_place(folder)
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _check_finite("this WriteSAE", ready)
    header = {**header, "provenance": _answered(header["provenance"])}
    try:
        save_id = _save_id(ready, header)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the provenance of a WriteSAE must be plain JSON values: {error}") from None
    text = json.dumps({"format_version": FORMAT_VERSION, "save_id": save_id, **header}, indent=2) + "\n"
    write_together(
        folder,
        {
            TENSORS: tensor_writer(ready, {"save_id": save_id}),
            HEADER: lambda path: path.write_text(text, encoding="utf-8"),
        },
    )
    return folder


def check_place(folder: Path) -> None:
    """Raise `ValueError` for a path where a save would destroy something that is no WriteSAE.

    `write_folder` asks; a long run had better ask before it starts too.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; a WriteSAE is saved as a folder")
    taken = folder / HEADER
    if taken.exists():
        try:
            _read_object(taken)
        except ValueError as error:
            raise ValueError(f"a WriteSAE is not saved over another program's {HEADER}: {error}") from None


def _answered(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance with an answer, if only null, to everything in `ORIGIN`."""
    layout = provenance.get("layout", LAYOUT)
    if layout != LAYOUT:
        raise ValueError(f"the layout of a saved WriteSAE is {LAYOUT!r}, got {layout!r}: transpose its matrices first")
    return {**dict.fromkeys(ORIGIN), **provenance, "layout": LAYOUT}


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a saved folder, the header of version 1 with what its fields meant filled in.

    Raises `ValueError` when the folder or one of its files is missing or damaged, when the format version is unknown, when
    the provenance leaves something out, or when the two files are of different saves.
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
    # Null is how the file says that nobody knows; in memory what is not known is not there.
    known = {name: answer for name, answer in header["provenance"].items() if answer is not None or name not in ORIGIN}
    return tensors, {**header, "provenance": known}


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a header, whatever its version."""
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}") from None
    if not isinstance(header, dict) or "format_version" not in header:
        raise ValueError(f"{str(path)!r} has no format_version: it is not the header of a saved WriteSAE")
    return header


def _read_header(path: Path) -> dict[str, Any]:
    header = _read_object(path)
    if header["format_version"] not in READABLE:
        came, known = header["format_version"], " and ".join(map(str, READABLE))
        raise ValueError(f"{str(path)!r} has format_version {came!r}; this version reads {known}")
    for name in ("config", "provenance"):
        if not isinstance(header.get(name), dict):
            raise ValueError(f"{str(path)!r} has no {name!r}: it is not the header of a saved WriteSAE")
    # JSON has lists only; what a config has several of, it has in a tuple.
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in header["config"].items()}
    if header["format_version"] == 1:
        return {**header, "config": _VERSION_1 | config}
    if silent := [name for name in ORIGIN if name not in header["provenance"]]:
        raise ValueError(f"the provenance in {str(path)!r} says nothing of {', '.join(silent)}")
    layout = header["provenance"]["layout"]
    if layout != LAYOUT:
        raise ValueError(f"{str(path)!r} has layout {layout!r}; a saved WriteSAE is {LAYOUT!r}")
    return {**header, "config": config}


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
    _check_finite(repr(path), tensors)


def _check_finite(owner: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{owner} has NaN or infinity in {name}")
