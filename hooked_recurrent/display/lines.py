"""One line for a notebook instead of pages of numbers: tensors by dtype and shape."""

from dataclasses import fields
from typing import Any

from torch import Tensor

# A longer row of numbers is shortened.
SHOWN = 8


def brief(value: Any) -> str:
    """float32[2, 12, 4] for a tensor, (0, 1, 2, ..., 23) for a long tuple, a dictionary's size, else the value's repr."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple) and len(value) > SHOWN:
        return f"({', '.join(map(str, value[:3]))}, ..., {value[-1]})"
    return f"{len(value)} entries" if isinstance(value, dict) else repr(value)


class OneLine:
    """Gives a dataclass (made with repr=False) a repr of one line; what is None is left out."""

    def __repr__(self) -> str:
        held = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        shown = [f"{name}={brief(value)}" for name, value in held.items() if value is not None]
        return f"{type(self).__name__}({', '.join(shown)})"
