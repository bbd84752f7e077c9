"""One line for a terminal instead of pages of numbers, and the same by field for a notebook."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from hooked_recurrent.display.html import card, details, table

# A longer row of numbers is shortened, and so is a longer text.
SHOWN = 8
MOST_CHARACTERS = 40
# The range of a larger tensor is not looked for: showing a value should cost nothing.
MOST_NUMBERS = 1 << 22


def brief(value: Any) -> str:
    """float32[2, 12, 4] for a tensor, (0, 1, 2, ..., 23) for a long tuple, sizes of dictionaries and tables, else the repr."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return _row(value)
    if isinstance(value, dict):
        return f"{len(value)} entries"
    if hasattr(value, "to_numpy"):  # pandas' tables and series, which nothing here has to import
        return f"{'x'.join(map(str, value.shape))} table"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}{list(value.shape)}"
    return _short(value) if isinstance(value, str) else repr(value)


def _row(values: tuple | list) -> str:
    """Its entries in brief; of a longer one the first three and the last."""
    shown = [brief(value) for value in (values if len(values) <= SHOWN else (*values[:3], values[-1]))]
    if len(values) > SHOWN:
        shown.insert(3, "...")
    comma = "," if isinstance(values, tuple) and len(values) == 1 else ""
    return f"({', '.join(shown)}{comma})" if isinstance(values, tuple) else f"[{', '.join(shown)}]"


def _short(value: Any) -> str:
    """A repr that fits on a line."""
    shown = repr(value)
    return shown if len(shown) <= MOST_CHARACTERS else f"{shown[:MOST_CHARACTERS]}..."


def span(values: Tensor) -> str:
    """The smallest and the largest number of a tensor; nothing where there are none, too many, or no order among them."""
    if not 0 < values.numel() <= MOST_NUMBERS or values.dtype == torch.bool or values.is_complex():
        return ""
    low, high = (f"{float(end):.4g}" for end in values.detach().aminmax())
    return f"{low} to {high}"


class OneLine:
    """Gives a dataclass (made with repr=False) a repr of one line and a small table; what is None is left out."""

    def _held(self) -> dict[str, Any]:
        """The fields that are not None."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in named.items() if value is not None}

    def __repr__(self) -> str:
        shown = [f"{name}={brief(value)}" for name, value in self._held().items()]
        return f"{type(self).__name__}({', '.join(shown)})"

    def _repr_html_(self) -> str:
        """A row per field: what it holds, and of tensors the range of their numbers."""
        rows = [
            {"field": name, "holds": brief(value), "from to": span(value) if isinstance(value, Tensor) else ""}
            for name, value in self._held().items()
        ]
        return card(type(self).__name__, parts=[table(rows)])


def config_html(config: Any) -> str:
    """A row per field of a dataclass; those at their defaults stand behind a click."""
    default = {field.name: field.default for field in fields(config)}
    rows = [{"field": name, "value": brief(getattr(config, name))} for name in default]
    chosen = [row for row in rows if getattr(config, row["field"]) != default[row["field"]]]
    others = [row for row in rows if row not in chosen]
    parts = [table(chosen)] if chosen else []
    if others:
        parts.append(details(f"{len(others)} at their defaults", table(others)))
    return card(type(config).__name__, parts=parts)
