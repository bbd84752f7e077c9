"""Tensors by name, opened one at a time; every one must be used, and every weight of the model must be found.

A checkpoint family describes itself as a list of `Entry`s: one tensor of the file against one or more of our parameters,
with a way there and a way back. `fill` and `export` do the rest, so a family file holds names and layouts only.
"""

import json
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


@runtime_checkable
class Checkpoint(Protocol):
    """A named collection of tensors that are read only when taken."""

    origin: str
    """Where it came from, for messages."""

    def names(self) -> list[str]:
        """All tensor names."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, which is not read for it."""
        ...

    def take(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        ...


class MemoryCheckpoint:
    """The state dict of a model in memory."""

    def __init__(self, tensors: Mapping[str, Tensor], origin: str):
        self.tensors, self.origin = tensors, origin

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor."""
        return tuple(self.tensors[name].shape)

    def take(self, name: str) -> Tensor:
        """One tensor, copied so that the source stays untouched."""
        return self.tensors[name].detach().clone()


class FolderCheckpoint:
    """The safetensors file or shards of a local folder, or one such file by its own name."""

    def __init__(self, folder: Path):
        self.origin = str(folder)
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if folder.is_file():
            single = folder
        if single.is_file():  # before an index, as in transformers: shards of an older model may lie beside it
            files = dict.fromkeys(self._open(single).keys(), single)
        elif index.is_file():
            where = read_mapping(index, "index of shards").get("weight_map")
            if not isinstance(where, dict):
                raise ValueError(f"{index} is no index of shards: it has no weight_map")
            files = {name: folder / file for name, file in where.items()}
        else:
            present = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise FileNotFoundError(f"{folder} holds no model.safetensors (nor an index of shards); it holds {present}")
        missing = sorted({file.name for file in files.values() if not file.is_file()})
        if missing:
            raise FileNotFoundError(f"{folder} lacks the shards {', '.join(missing)} that its index names")
        self.files = files
        self.opened: dict[Path, safe_open] = {}

    @staticmethod
    def _open(file: Path) -> safe_open:
        try:
            return safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file ({error})") from None

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, from the head of its shard."""
        return tuple(self._read(name, lambda shard: shard.get_slice(name).get_shape()))

    def take(self, name: str) -> Tensor:
        """One tensor, read from its shard."""
        return self._read(name, lambda shard: shard.get_tensor(name))

    def _read(self, name: str, reading: Callable[[Any], Any]) -> Any:
        file = self.files[name]
        if file not in self.opened:
            self.opened[file] = self._open(file)
        try:
            return reading(self.opened[file])
        except SafetensorError as error:
            raise ValueError(f"{file} holds no tensor {name!r}, though its index says so ({error})") from None


def read_torch(file: Path) -> Any:
    """What torch.save wrote to a file, where that is tensors, plain values and containers of them.

    Such a file is a pickle, which may name any function to call; `weights_only` reads tensors and calls nothing.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or asks for more than tensors; nothing in it was run.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no weights file at {file}")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a hostile or damaged file may make the reader raise anything
        named = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it asks for {named[1]}, which is no tensor" if named else "it is damaged or holds more than tensors"
        raise ValueError(f"{file} was refused, and nothing in it was run: {why}") from None


class TorchCheckpoint:
    """A file that torch.save wrote (`pytorch_model.bin`, `.pth`): tensors by name, and nothing else.

    Nothing in it is run (`read_torch`). Tensors are mapped from the file and copied when taken, so the peak of memory stays
    about one copy of the model.
    """

    def __init__(self, file: Path):
        self.origin = str(file)
        tensors = read_torch(file)
        if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise ValueError(f"{file} holds no tensors by name, as a saved state dict does")
        self.tensors: dict[str, Tensor] = tensors

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor."""
        return tuple(self.tensors[name].shape)

    def take(self, name: str) -> Tensor:
        """One tensor, copied out of the mapped file."""
        return self.tensors[name].clone()


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """The JSON object of a file; anything else is one clear error that says what it should have been."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the encoding or of the JSON
        raise ValueError(f"{path} is no {what}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no {what}: it holds a {type(values).__name__}")
    return values


@dataclass(frozen=True)
class Entry:
    """One checkpoint tensor against one or more of our parameters."""

    theirs: str
    """Name in the checkpoint."""
    ours: tuple[str, ...]
    """Names of our parameters."""
    split: Callable[[Tensor], tuple[Tensor, ...]] = lambda tensor: (tensor,)
    """Their tensor to ours."""
    join: Callable[..., Tensor] = lambda tensor: tensor
    """Our tensors to theirs."""


def fill(
    model: nn.Module,
    entries: Iterable[Entry],
    checkpoint: Checkpoint,
    *,
    ignored: Callable[[str], bool],
    dtype: torch.dtype,
    device: str | torch.device,
) -> None:
    """Give a model that was built on the meta device its weights, one tensor at a time.

    Raises:
        ValueError: naming the first missing and surplus tensors, a wrong shape, or a tensor with NaN or Inf.
    """
    entries = list(entries)
    _check_names({entry.theirs for entry in entries}, checkpoint, ignored)
    unfilled = {name for name, _ in model.named_parameters()}
    for entry in entries:
        tensor = checkpoint.take(entry.theirs)
        if not torch.isfinite(tensor).all():
            raise ValueError(f"tensor {entry.theirs!r} of {checkpoint.origin} holds NaN or Inf")
        expected = tuple(_meta_join(entry, model).shape)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"tensor {entry.theirs!r} has shape {tuple(tensor.shape)}, its config asks for {expected}")
        for name, part in zip(entry.ours, entry.split(tensor), strict=True):
            owner, _, leaf = name.rpartition(".")
            weight = part.to(
                device=device, dtype=dtype, memory_format=torch.contiguous_format, copy=len(entry.ours) > 1
            )
            setattr(model.get_submodule(owner), leaf, nn.Parameter(weight))
            unfilled.discard(name)
    if unfilled:
        raise ValueError(f"no checkpoint tensor is assigned to {', '.join(sorted(unfilled))}")


def export(model: nn.Module, entries: Iterable[Entry]) -> dict[str, Tensor]:
    """The model's weights under the checkpoint family's names and layouts."""
    ours = dict(model.named_parameters())
    return {e.theirs: e.join(*(ours[name].detach() for name in e.ours)).contiguous() for e in entries}


def factor(part: int, whole: int) -> float:
    """part / whole, such that int(whole * factor), which is how readers of configs undo it, is part again."""
    quotient = part / whole
    return quotient if int(whole * quotient) == part else math.nextafter(quotient, math.inf)


def _meta_join(entry: Entry, model: nn.Module) -> Tensor:
    parameters = [model.get_parameter(name) for name in entry.ours]
    return entry.join(*(torch.empty(p.shape, device="meta") for p in parameters))


def _check_names(wanted: set[str], checkpoint: Checkpoint, ignored: Callable[[str], bool]) -> None:
    present = set(checkpoint.names())
    missing = sorted(wanted - present)
    surplus = sorted(name for name in present - wanted if not ignored(name))
    if not missing and not surplus:
        return
    complaints = []
    if missing:
        near = get_close_matches(missing[0], surplus, n=1)
        hint = f" (it has {near[0]!r})" if near else ""
        complaints.append(f"lacks {_some(missing)}{hint}")
    if surplus:
        complaints.append(f"has tensors that this model does not know: {_some(surplus)}")
    raise ValueError(f"the checkpoint {checkpoint.origin} {' and '.join(complaints)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more
