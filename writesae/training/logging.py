"""Where the lines of a training log go: log.jsonl always, TensorBoard, wandb and trackio when asked for and installed.

A line is written once, when its step is done, and flushed. A run that is resumed starts from the lines of its checkpoint,
so what a killed run had written past it is written again, not twice.
"""

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from hooked_recurrent.files import write_text

Line = dict[str, int | float]
_MODULES = {"tensorboard": "torch.utils.tensorboard"}


class Log(ABC):
    """Anything that takes lines."""

    @abstractmethod
    def write(self, job: str, line: Line) -> None:
        """One line of one job; its "step" is the step it was measured at."""

    @abstractmethod
    def close(self) -> None:
        """No more lines come."""


class JsonLines(Log):
    """One JSON object a line: {"job": ..., "step": ..., "loss": ..., ...}."""

    def __init__(self, path: Path, before: Mapping[str, Sequence[Line]]):
        """Begin with the lines that were there `before`, by job; whatever else the file held is dropped."""
        lines = [(line["step"], place, job, line) for place, job in enumerate(before) for line in before[job]]
        lines.sort(key=lambda entry: entry[:2])
        write_text(path, "".join(self._text(job, line) for _, _, job, line in lines))
        self.file: TextIO = path.open("a", encoding="utf-8")

    @staticmethod
    def _text(job: str, line: Line) -> str:
        return json.dumps({"job": job, **line}) + "\n"

    def write(self, job: str, line: Line) -> None:
        """Append and flush."""
        self.file.write(self._text(job, line))
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class TensorBoard(Log):
    """One run of TensorBoard per job, in <folder>/<job>; curves past `first_step` of an earlier run are purged."""

    def __init__(self, folder: Path, first_step: int):
        self.writer_class: Any = _module(_MODULES["tensorboard"], "tensorboard").SummaryWriter
        self.folder, self.first_step = folder, first_step
        self.writers: dict[str, Any] = {}

    def write(self, job: str, line: Line) -> None:
        """One scalar per number."""
        if job not in self.writers:
            self.writers[job] = self.writer_class(str(self.folder / job), purge_step=self.first_step)
        for name, value in line.items():
            if name != "step":
                self.writers[job].add_scalar(name, value, int(line["step"]))

    def close(self) -> None:
        """Flush and close."""
        for writer in self.writers.values():
            writer.close()


class Tracker(Log):
    """wandb or trackio, which share their calls: one run; with several jobs the numbers are called <job>/<number>."""

    def __init__(self, package: str, project: str, name: str | None, config: dict[str, Any], several: bool):
        self.module = _module(package, package)
        self.several = several
        self.run = self.module.init(project=project, name=name, config=config)

    def write(self, job: str, line: Line) -> None:
        """One step's numbers."""
        prefix = f"{job}/" if self.several else ""
        numbers = {prefix + name: value for name, value in line.items() if name != "step"}
        self.run.log(numbers, step=int(line["step"]))

    def close(self) -> None:
        """End the run."""
        self.module.finish()


def open_logs(
    log_to: Sequence[str],
    out: Path | None,
    before: Mapping[str, Sequence[Line]],
    *,
    first_step: int,
    project: str,
    config: dict[str, Any],
) -> list[Log]:
    """The logs of one run of the jobs named in `before`, which starts (or goes on) at `first_step`.

    Raises `ValueError` where a package that is asked for is not installed, and for TensorBoard without a folder `out`.
    """
    check_logs(log_to, out)
    logs: list[Log] = []
    for name in log_to:
        if name == "tensorboard" and out is not None:
            logs.append(TensorBoard(out / "tensorboard", first_step))
        else:
            run = None if out is None else out.name
            logs.append(Tracker(name, project, run, config, several=len(before) > 1))
    if out is not None:
        logs.insert(0, JsonLines(out / "log.jsonl", before))
    return logs


def check_logs(log_to: Sequence[str], out: Path | None) -> None:
    """Raise `ValueError`, before anything else is done, where `open_logs` would."""
    for name in log_to:
        if name == "tensorboard" and out is None:
            raise ValueError("log_to 'tensorboard' writes files: give the run a folder out")
        _module(_MODULES.get(name, name), name)


def _module(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        said = f"log_to {package!r} needs the package {package}, which is not installed: pip install {package}"
        raise ValueError(said) from None
