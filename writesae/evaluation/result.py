"""What every experiment gives back: a table of measurements, what they amount to, a picture, and a file that tells all."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from matplotlib.figure import Figure

from hooked_recurrent.display import OneLine, brief
from hooked_recurrent.display.html import card, details, render, table
from hooked_recurrent.files import plain, write_text

FORMAT = "writesae.result.v1"
# Measurements that a notebook shows.
ROWS_SHOWN = 5

Told = Callable[[int, int], None]
"""Told (how much is done, how much there is)."""


@dataclass(frozen=True, repr=False)
class Result(OneLine):
    """Every measurement of one experiment on one cell (layer, head), with what is needed to run it again.

    A subclass names its `kind` and says in `summary` and `figure` what the table means. Fields that it adds must be plain
    JSON values.
    """

    kind: ClassVar[str] = ""
    """Name of the experiment; also that of its command."""

    table: pd.DataFrame
    """A row per measurement."""
    layer: int
    """The cell's layer."""
    head: int
    """The cell's head."""
    config: dict[str, Any]
    """The experiment's config as plain values."""
    about: dict[str, Any] = field(default_factory=dict)
    """Where model, dictionary and text came from."""

    def to_dataframe(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.table.copy()

    def summary(self) -> list[dict[str, Any]]:
        """What the table amounts to: rows of plain values, estimates with their intervals."""
        raise NotImplementedError

    def figure(self) -> Figure:
        """A picture of the summary."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """One line: the experiment, its cell, and how much was measured."""
        return f"{type(self).__name__}({self._cell()}, {len(self.table):,} measurements)"

    def _cell(self) -> str:
        """The cell in words; results of many cells hold -1 where they do not share one."""
        return "several cells" if min(self.layer, self.head) < 0 else f"layer {self.layer}, head {self.head}"

    def _repr_html_(self) -> str:
        """The cell, the summary, and behind clicks the first measurements, the config and where all came from."""
        try:
            amounts = table(plain(self.summary()))
        except (ValueError, KeyError, IndexError, ZeroDivisionError) as error:  # as where nothing fired
            amounts = render("<div>{{ why }}</div>", why=f"no summary: {error}")
        parts = [amounts]
        first = plain(self.table.head(ROWS_SHOWN).to_dict("records"))
        parts.append(details(f"the first of {len(self.table):,} measurements", table(first)))
        for name, values in (("config", self.config), ("about", self.about)):
            if values:
                told = [{"name": str(key), "value": brief(value)} for key, value in values.items()]
                parts.append(details(name, table(told, most=len(told))))
        facts = {"cell": self._cell(), "measurements": len(self.table), "model": self.about.get("model")}
        return card(type(self).__name__, facts, parts, note=f"{self.kind}; result.figure() draws it")

    def to_json(self, path: str | Path, records: bool = True) -> Path:
        """Write summary, config and (with `records`) the whole table, atomically; what is not finite is written as null."""
        path = Path(path)
        more = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "table"}
        content = {"format": FORMAT, "kind": self.kind, **more, "summary": self.summary()}
        if records:
            content["records"] = json.loads(self.table.to_json(orient="records", double_precision=15))
        write_text(path, json.dumps(plain(content), indent=1, allow_nan=False) + "\n")
        return path

    @classmethod
    def from_json(cls, path: str | Path) -> "Result":
        """Read a file that `to_json` wrote with its records; anything else raises `ValueError`."""
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no whole JSON file ({error})") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("kind") != cls.kind:
            raise ValueError(f"{path} does not hold the result of a {cls.kind or cls.__name__} experiment")
        if "records" not in content:
            raise ValueError(f"{path} holds a summary without its records: run the experiment again to get the table")
        given = {f.name: content[f.name] for f in fields(cls) if f.name != "table" and f.name in content}
        return cls(pd.DataFrame(content["records"]), **given)
