"""Edits in a file: one safetensors file whose metadata tells each edit's kind and fields, and whose tensors fill them."""

import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hooked_recurrent.edits.activation import ActivationEdit
from hooked_recurrent.edits.base import Edit, Edits
from hooked_recurrent.edits.state import StateEdit
from hooked_recurrent.edits.write import WriteEdit
from hooked_recurrent.files import save_tensors

FORMAT = "hooked_recurrent.edits.v1"
KINDS: dict[str, Any] = {kind.__name__: kind for kind in (WriteEdit, StateEdit, ActivationEdit)}


def save_edits(path: str | Path, edits: Iterable[Edit]) -> Path:
    """Write edits to one safetensors file, atomically; `load_edits` gives back equal ones.

    Raises:
        TypeError: for something that is none of the three kinds of edit, or for a path that is none.
    """
    if not isinstance(path, str | Path):
        raise TypeError(f"save_edits takes the path first and then the edits, got {type(path).__name__} as path")
    tensors: dict[str, Tensor] = {}
    described = []
    for index, edit in enumerate(edits):
        kind = type(edit).__name__
        if KINDS.get(kind) is not type(edit):
            raise TypeError(f"edits must be {', '.join(KINDS)}, got {kind}")
        known: dict[str, Any] = {}
        for name in (f.name for f in fields(edit)):
            value = getattr(edit, name)
            if isinstance(value, slice):
                known[name] = [None if part is None else int(part) for part in (value.start, value.stop, value.step)]
            elif isinstance(value, str | int | float):
                known[name] = value
            elif value is not None:
                tensors[f"{index}.{name}"] = torch.as_tensor(value)
        described.append({"kind": kind, "fields": known})
    return save_tensors(Path(path), tensors, {"edits": json.dumps({"format": FORMAT, "edits": described})})


def load_edits(path: str | Path, device: str | torch.device = "cpu") -> Edits:
    """The edits of a file that `save_edits` wrote, in their order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, not such a file, or holds a kind, a field or a tensor that is not known here.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no edits file at {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            described = _described(file.metadata(), path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None
    edits = [_edit(path, index, entry, tensors) for index, entry in enumerate(described)]
    if tensors:
        raise ValueError(f"{path} holds a tensor {min(tensors)!r} that belongs to none of its {len(edits)} edits")
    return Edits(edits)


def _edit(path: Path, index: int, entry: Any, tensors: dict[str, Tensor]) -> Edit:
    """One edit out of its description and its tensors, which are taken away from `tensors`."""
    kind, known = (entry.get("kind"), entry.get("fields")) if isinstance(entry, dict) else (None, None)
    if kind not in KINDS or not isinstance(known, dict):
        raise ValueError(f"edit {index} of {path} is of an unknown kind {kind!r}; expected one of {', '.join(KINDS)}")
    mine = [name for name in tensors if name.startswith(f"{index}.")]
    given = known | {name.partition(".")[2]: tensors.pop(name) for name in mine}
    unknown = set(given) - {f.name for f in fields(KINDS[kind])}
    if unknown:
        raise ValueError(f"edit {index} of {path} is a {kind} with an unknown field {min(unknown)!r}")
    try:
        given = {name: slice(*value) if isinstance(value, list) else value for name, value in given.items()}
        return KINDS[kind](**given)
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"edit {index} of {path} is no {kind}: {error}") from None


def _described(metadata: dict[str, str] | None, path: Path) -> list[Any]:
    """What the metadata tells of the edits, if the file is one of edits."""
    try:
        about = json.loads((metadata or {}).get("edits", "{}"))
    except json.JSONDecodeError:
        about = None
    about = about if isinstance(about, dict) else {}
    if about.get("format") != FORMAT or not isinstance(about.get("edits"), list):
        raise ValueError(f"{path} holds no saved edits: its format is {about.get('format')!r}, not {FORMAT!r}")
    return about["edits"]
