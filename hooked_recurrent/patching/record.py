"""What a sweep has measured so far, on disk: a JSON line per run, so that a sweep that was killed goes on where it stopped.

The first line says which sweep this is; a file of another one is refused before anything runs. A last line that was cut off by
the kill is dropped, and its run measured again.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from hooked_recurrent.files import write_text

# The unchanged runs are measured anew on resuming; another thread count or processor may round them differently.
TOLERANCE = 1e-4


class Record:
    """The values of some runs by index; kept in memory alone where `path` is None."""

    def __init__(self, path: str | Path | None, about: dict[str, Any], baseline: dict[str, tuple[float, ...] | None]):
        """Open or begin a record.

        Args:
            path: the file, or None.
            about: which sweep this is, as plain JSON values; must be the same on resuming.
            baseline: metrics of the unchanged runs; must be the same up to rounding.

        Raises:
            ValueError: for a file that holds another sweep, or none.
        """
        self.path = None if path is None else Path(path)
        self.values: dict[int, float] = {}
        about = json.loads(json.dumps(about))
        if self.path is None:
            return
        if self.path.exists():
            self._resume(about, json.loads(json.dumps(baseline)))
        else:
            write_text(self.path, json.dumps({"sweep": about, "unchanged": baseline}) + "\n")

    def add(self, values: dict[int, float]) -> None:
        """Keep the values of some runs; on disk they are whole when this returns."""
        self.values |= values
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps([index, value]) + "\n" for index, value in values.items())
                file.flush()
                os.fsync(file.fileno())

    def _resume(self, about: dict[str, Any], baseline: dict[str, list[float] | None]) -> None:
        assert self.path is not None
        text = self.path.read_text(encoding="utf-8")
        whole, _, torn = text.rpartition("\n")
        lines = whole.split("\n")
        try:
            head = json.loads(lines[0])
            held, unchanged = head["sweep"], head["unchanged"]
            self.values = {int(index): float(value) for index, value in map(json.loads, lines[1:])}
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            raise ValueError(f"{self.path} is no record of a sweep; give another path, or remove it") from None
        for name in sorted({*held, *about}):
            if held.get(name) != about.get(name):
                raise ValueError(
                    f"{self.path} records another sweep: its {name} is {held.get(name)!r}, "
                    f"this one's {about.get(name)!r}; give another path, or remove it"
                )
        for name, numbers in baseline.items():
            if not _alike(unchanged.get(name), numbers):
                raise ValueError(
                    f"{self.path} records another model or metric: there the {name} run's metric is "
                    f"{unchanged.get(name)}, here {numbers}; give another path, or remove it"
                )
        if torn:
            write_text(self.path, whole + "\n")


def _alike(held: list[float] | None, now: list[float] | None) -> bool:
    if held is None or now is None:
        return held is now
    close = (math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE) for a, b in zip(held, now, strict=False))
    return len(held) == len(now) and all(close)
