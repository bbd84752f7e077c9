"""The folder of a training run, and whether a run may go on in it.

config.json      jobs, training configuration, tokens, model: what the numbers depend on
log.jsonl        a line per job every `log_every` steps
checkpoints/     see checkpoint.py
sae/             the dictionary, or sae/<job>/ where there are several; written at the end
metrics.json     quality at the end, by job and text
tensorboard/     where asked for
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import writesae.training.checkpoint as checkpoint
from hooked_recurrent.files import write_text
from writesae.parallel import World

FORMAT_VERSION = 1
FREE = ("training.save_every", "training.keep", "training.log_to", "training.log_project")
"""What may change when a run is resumed: nothing of it touches the numbers."""


class RunFolder:
    """Paths of one run's folder, and the check that decides whether the run may use it."""

    def __init__(self, out: str | Path, names: list[str]):
        self.out, self.names = Path(out), names
        self.checkpoints = self.out / "checkpoints"

    def of_dictionary(self, name: str) -> Path:
        """Where the dictionary of a job is saved."""
        return self.out / "sae" / name if len(self.names) > 1 else self.out / "sae"

    def contents(self) -> dict[str, Path]:
        """What lies where, by what it is; only what is there."""
        places = {
            "config": "config.json",
            "log": "log.jsonl",
            "tensorboard": "tensorboard",
            "checkpoints": "checkpoints",
        }
        places |= {"metrics": "metrics.json", "dictionaries" if len(self.names) > 1 else "dictionary": "sae"}
        return {what: self.out / name for what, name in places.items() if (self.out / name).exists()}

    def claim(self, description: dict[str, Any], resume: bool, world: World) -> Path | None:
        """Take the folder for a run of this description; returns the checkpoint to go on from, if there is one.

        Every process calls it and gets the same answer. Raises `ValueError` when the folder holds a run and `resume` is
        not set, when that run is another (naming what differs), and when it has checkpoints but none is whole.
        """
        plain = json.loads(json.dumps({"format_version": FORMAT_VERSION, **description}))
        self._check(plain, resume)
        world.barrier()  # all have looked before anything is written
        found, complaint = None, None
        if world.is_main:
            write_text(self.out / "config.json", json.dumps(plain, indent=1))
            try:
                found = checkpoint.latest(self.checkpoints, self.names)
            except ValueError as error:
                complaint = str(error)
        found, complaint = world.broadcast((found, complaint))
        if complaint:
            raise ValueError(complaint)
        return found

    def _check(self, description: dict[str, Any], resume: bool) -> None:
        path = self.out / "config.json"
        if not path.exists():
            if checkpoint.finished(self.checkpoints):
                raise ValueError(f"{self.out} has checkpoints but no config.json, so whose they are cannot be known")
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        if not isinstance(before, dict) or "jobs" not in before:
            raise ValueError(f"{path} is not that of a training run; choose another folder")
        if not resume:
            raise ValueError(f"{self.out} holds a training run already: resume it, or choose another folder")
        differing = list(differences(before, description))
        if differing:
            raise ValueError(f"the run in {self.out} cannot go on with other settings: {'; '.join(differing)}")


def differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What differs between two descriptions, in words, without what is `FREE` to change."""
    old, new = dict(_flat(before)), dict(_flat(now))
    for name in {**old, **new}:
        if name in FREE or old.get(name) == new.get(name):
            continue
        yield f"{name} was {old.get(name, 'absent')!r}, is {new.get(name, 'absent')!r}"


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, inner
