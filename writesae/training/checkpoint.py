"""Checkpoints that are there whole or not at all: everything a run needs to go on bit for bit.

    <folder>/step-00000500/<job>.safetensors    weights, buffers, Adam's moments, state of the generator
    <folder>/step-00000500/<job>.json           format version, step (= data position), log, and the SHA-256 of the former

A checkpoint is written under a hidden name in the same folder, down to the disk, and then renamed; only then are the oldest
removed. A full disk or a kill at any moment therefore leaves every finished checkpoint as it was. Several processes that
train different jobs write their own files, and the main one renames when all have finished.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from hooked_recurrent.files import save_tensors, write_text
from writesae.parallel import World
from writesae.training.together import anyone

FORMAT_VERSION = 1
_FINISHED = re.compile(r"step-(\d{8,})")
_LEFT_OVER = re.compile(r"\.step-\d{8,}\.(part|old)")
State = dict[str, Any]
"""What `Trainer.state_dict` gives: tensors and record."""


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after so many steps lies."""
    return folder / f"step-{step:08d}"


def finished(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first; whether their files are whole is for `read` to say."""
    if not folder.is_dir():
        return []
    found = [(int(match.group(1)), path) for path in folder.iterdir() if (match := _FINISHED.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def write(folder: Path, step: int, states: Mapping[str, State], *, keep: int, world: World) -> Path:
    """Write the states of this process's jobs as one checkpoint; returns its path.

    Every process calls it, with the jobs it owns (none is fine). Keeps the `keep` newest up to this step. Raises
    `OSError` in all processes when the disk is full or a file cannot be written: no finished checkpoint is touched.
    """
    final, part = path_of(folder, step), folder / f".{path_of(folder, step).name}.part"
    if not anyone(not _is_whole(final, list(states)), world):  # the same step of the same run: bit for bit the same
        return final
    cause: Exception | None = None
    if world.is_main:
        cause = _try(lambda: _begin(folder, part))
    world.barrier()
    for name, state in states.items():
        cause = cause or _try(lambda name=name, state=state: _write_job(part, name, step, state))  # type: ignore[misc]
    if anyone(cause is not None, world):
        raise _gave_up(folder, part, step, cause, world)
    if world.is_main:
        cause = _try(lambda: _put_in_place(part, final, keep))
    if anyone(cause is not None, world):
        raise _gave_up(folder, part, step, cause, world)
    return final


def read(path: Path, names: Sequence[str]) -> dict[str, State]:
    """The states of these jobs in one checkpoint.

    Raises `ValueError` for a checkpoint of another format version, of other jobs, or with files that are missing,
    truncated or changed.
    """
    return {name: _read_job(path, name) for name in names}


def latest(folder: Path, names: Sequence[str]) -> Path | None:
    """The newest checkpoint that is whole and holds these jobs; None where there is none at all.

    Every one that is passed over is named in a warning. Raises `ValueError` when there are some but none can be used.
    """
    complaints = []
    for path in reversed(finished(folder)):
        try:
            read(path, names)
            return path
        except ValueError as error:
            complaints.append(str(error))
            warnings.warn(f"passing over a checkpoint: {error}", stacklevel=2)
    if complaints:
        raise ValueError(f"no checkpoint in {folder} can be used; the newest: {complaints[0]}")
    return None


# --- one job -------------------------------------------------------------------------------------------------------


def _write_job(part: Path, name: str, step: int, state: State) -> None:
    path = save_tensors(part / f"{name}.safetensors", state["tensors"], {"step": str(step)})
    record = {"format_version": FORMAT_VERSION, "sha256": _hash(path), **state["record"]}
    write_text(part / f"{name}.json", json.dumps(record))


def _read_job(path: Path, name: str) -> State:
    try:
        record = json.loads((path / f"{name}.json").read_text(encoding="utf-8"))
        version, hashed = record.pop("format_version"), record.pop("sha256")
        if version != FORMAT_VERSION:
            raise ValueError(f"{path} has format version {version}; this library reads {FORMAT_VERSION}")
        tensors_path = path / f"{name}.safetensors"
        if _hash(tensors_path) != hashed:
            raise ValueError(f"{tensors_path} is truncated or changed: its contents are not what was written")
        if int(record["step"]) != int(path.name.removeprefix("step-")):
            raise ValueError(f"{path} holds step {record['step']}: it has been renamed")
        return {"tensors": load_file(tensors_path), "record": record}
    except FileNotFoundError as error:
        raise ValueError(f"{path} lacks {Path(error.filename).name}: it is incomplete, or of other jobs") from None
    except (
        OSError,
        SafetensorError,
        json.JSONDecodeError,
        UnicodeDecodeError,
        KeyError,
        AttributeError,
        TypeError,
    ) as error:
        raise ValueError(f"{path / name}.json or .safetensors cannot be read: {error}") from None


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(path: Path, names: Sequence[str]) -> bool:
    try:
        read(path, names)
        return True
    except ValueError:
        return False


# --- folders -------------------------------------------------------------------------------------------------------


def _try(action: Callable[[], None]) -> Exception | None:
    """What went wrong with the disk, if anything: the other processes must hear of it before it is raised."""
    try:
        action()
        return None
    except (OSError, SafetensorError) as error:
        return error


def _begin(folder: Path, part: Path) -> None:
    _sweep(folder)
    part.mkdir(parents=True)


def _put_in_place(part: Path, final: Path, keep: int) -> None:
    """Rename, make the renaming last, and only then remove what is too old.

    What stood in this place was found damaged: it is moved aside, and goes when the new one is complete.
    """
    _sync_folder(part)
    if final.exists():
        os.replace(final, final.with_name(f".{final.name}.old"))
    os.replace(part, final)
    _sync_folder(final.parent)
    _sweep(final.parent)
    up_to_this = [path for path in finished(final.parent) if path.name <= final.name]
    for path in up_to_this[:-keep]:
        _remove(path)


def _remove(path: Path) -> None:
    """First hidden, then deleted: a half-deleted folder must not look like a checkpoint."""
    hidden = path.with_name(f".{path.name}.old")
    os.replace(path, hidden)
    shutil.rmtree(hidden)


def _sweep(folder: Path) -> None:
    """Remove what killed processes left half-written or half-deleted."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _LEFT_OVER.fullmatch(path.name):
            shutil.rmtree(path)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _gave_up(folder: Path, part: Path, step: int, cause: Exception | None, world: World) -> OSError:
    world.barrier()  # nobody is still writing
    if world.is_main:
        shutil.rmtree(part, ignore_errors=True)
    kept = finished(folder)
    rest = f"the newest finished one is {kept[-1]}" if kept else "there is no earlier one"
    why = cause or "another process could not write its part"
    return OSError(f"the checkpoint after step {step} could not be written ({why}); {rest}")
