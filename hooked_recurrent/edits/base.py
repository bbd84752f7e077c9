"""What every edit is: some positions and rows of a text, what happens there, and one line that says so."""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import MISSING, Field, fields
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

import hooked_recurrent.edits.positions as places
from hooked_recurrent.config import refuse_unknown
from hooked_recurrent.display.html import card, table
from hooked_recurrent.edits.positions import Position

Rows = int | Int[Tensor, "rows"] | None
Stage = Literal["activation", "write", "state", "carried"]


class Edit(ABC):
    """Base of all edits, which are frozen dataclasses: equal where every field is, tensors by their entries."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # so that type checkers know what `replace` may take
    layer: int | None
    """The block that it acts in; None for a hook outside the blocks."""
    position: Position
    """Absolute positions, counted from the first token the state has seen."""
    op: str
    """What happens there."""
    scale: float | None
    """Factor for op scale, where the class has this field."""
    batch: Rows
    """Batch rows to edit; None edits all."""

    def __new__(cls, *values: Any, **given: Any):
        """Refuse a keyword that is no field, with the nearest one."""
        refuse_unknown(cls.__name__, given, [name for name, one in cls.__dataclass_fields__.items() if one.init])
        return super().__new__(cls)

    @property
    @abstractmethod
    def stage(self) -> Stage:
        """When it acts: at a hook (activation), on a write, on a state before it is read, or after (carried)."""

    @property
    @abstractmethod
    def site(self) -> str:
        """What it changes, in words."""

    @property
    def where(self) -> str:
        """The site and the positions in words, for messages."""
        return f"{self.site}, position {places.words(self.position)}"

    @property
    def first_position(self) -> int:
        """The lowest edited position."""
        return places.first(self.position)

    @property
    def last_position(self) -> int | None:
        """The highest edited position; None for a slice without an end."""
        return places.last(self.position)

    def local(self, positions: Int[Tensor, "pos"]) -> tuple[Int[Tensor, "hit"], Int[Tensor, "hit"]]:
        """Which of a call's absolute positions are edited: (indices into the call, indices into this edit's positions)."""
        return places.local(self.position, positions)

    def below(self, layer: int) -> bool:
        """Whether it acts before this block runs, so that a run which enters there never meets it."""
        return self.layer is not None and self.layer < layer

    def in_rows(self, batch: Rows) -> "Edit":
        """The same edit of other rows; everything else was checked when it was made."""
        other = copy(self)
        object.__setattr__(other, "batch", batch)
        return other

    def check(self, model: Any, end: int | None) -> None:
        """Raise if the site does not exist in this model, or lies at or after position `end` (None: anywhere)."""
        highest = -1 if self.last_position is None else self.last_position
        if end is not None and highest >= end:
            raise IndexError(f"position {highest} is out of range: the text ends before position {end}")

    def rows(self, batch: int) -> Int[Tensor, "rows"]:
        """The edited rows of a batch of this size; `IndexError` for one that it does not have."""
        rows = torch.arange(batch) if self.batch is None else torch.as_tensor(self.batch).reshape(-1).cpu()
        outside = rows[(rows < 0) | (rows >= batch)]
        if len(outside):
            raise IndexError(
                f"batch row {int(outside[0])} of the edit at {self.where} is out of range: the batch has {batch}"
            )
        return rows

    def spread(self, name: str, like: Tensor, tail: Sequence[int], rows: int, chosen: Int[Tensor, "hit"]) -> Tensor:
        """The tensor of a field as [rows, hit positions, *tail] in the dtype of `like`; `ValueError` if it does not fit."""
        given = getattr(self, name).to(like)
        axis = given.ndim - len(tail) - 1
        try:
            if axis >= 0 and given.shape[axis] > 1:
                if int(chosen.max()) >= given.shape[axis]:
                    raise IndexError
                given = given.index_select(axis, chosen.to(given.device))
            return given.expand(rows, len(chosen), *tail)
        except (RuntimeError, IndexError):
            came = tuple(getattr(self, name).shape)
            expected = f"({', '.join(map(str, (rows, 'positions', *tail)))})"
            raise ValueError(
                f"the {name} of the edit at {self.where} has shape {came}, which is not {expected}"
            ) from None

    def _settle(self) -> None:
        """Make lists, ranges and arrays of positions and rows tensors, which compare and save alike; check the positions."""
        for name in ("position", "batch"):
            given = getattr(self, name)
            if given is not None and not isinstance(given, int | slice | Tensor):
                try:
                    object.__setattr__(self, name, torch.as_tensor(given))
                except (TypeError, ValueError, RuntimeError):
                    raise TypeError(f"{name} must be a whole number, a slice or several numbers, got {given!r}") from None
        for name in ("layer", "head"):
            given = getattr(self, name, 0)
            if given is not None and not isinstance(given, Integral):
                raise TypeError(f"{name} must be one whole number, got {given!r}")
        places.check_position(self.position, self.site)

    def _check_choice(self, name: str, choices: Any) -> None:
        given = getattr(self, name)
        if given not in get_args(choices):
            raise ValueError(f"unknown {name} {given!r}; expected one of {', '.join(get_args(choices))}")

    def _check_scale(self) -> None:
        """Whether scale is there exactly when the op wants it, and is finite."""
        if (self.scale is not None) != (self.op == "scale"):
            raise ValueError(f"op {self.op!r} {'needs' if self.op == 'scale' else 'takes no'} scale")
        if self.scale is not None and not isinstance(self.scale, Real):
            raise TypeError(f"the scale of the edit at {self.where} must be a number, got {self.scale!r}")
        if self.scale is not None and not math.isfinite(self.scale):
            raise ValueError(f"the scale of the edit at {self.where} is {self.scale}, expected a finite number")

    def _check_tensor(self, name: str, *axes: str, wanted: bool) -> None:
        """Whether a tensor with these last axes is there exactly when the op wants it, is finite, and fits the positions."""
        given = getattr(self, name)
        if (given is not None) != wanted:
            raise ValueError(f"op {self.op!r} {'needs' if wanted else 'takes no'} {name}")
        if given is None:
            return
        own = len(axes)
        if not isinstance(given, Tensor) or not given.is_floating_point() or not own <= given.ndim <= own + 2:
            came = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            shape = ", ".join(axes)
            raise ValueError(
                f"the {name} of the edit at {self.where} is {came}, expected a float tensor [{shape}] to [rows, pos, {shape}]"
            )
        self._check_finite(name, given)
        count = places.count(self.position)
        if given.ndim > own and count is not None and given.shape[-own - 1] not in (1, count):
            raise ValueError(
                f"the {name} of the edit at {self.where} is for {given.shape[-own - 1]} positions, not for {count}"
            )

    def _check_finite(self, name: str, given: Tensor) -> None:
        if not torch.isfinite(given).all():
            raise ValueError(f"the {name} of the edit at {self.where} holds NaN or Inf")

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    def __hash__(self) -> int:
        return hash((type(self), *(_key(getattr(self, f.name)) for f in fields(self))))  # type: ignore[arg-type]

    def told(self) -> dict[str, str]:
        """Every field in words: tensors by dtype, shape and norm; what is left at its default is left out, but for op."""
        return {
            f.name: _short(getattr(self, f.name))
            for f in fields(self)
            if f.name == "op" or f.default is MISSING or not _same(getattr(self, f.name), f.default)
        }

    def __repr__(self) -> str:
        """One line: `told`."""
        return f"{type(self).__name__}({', '.join(f'{name}={words}' for name, words in self.told().items())})"

    def _repr_html_(self) -> str:
        """A row with a column per field of `told`."""
        return card(type(self).__name__, parts=[table([self.told()])])


class Edits(list):
    """A list of edits that shows itself: a count in a terminal, a table in a notebook. Any list of edits will do elsewhere."""

    def __repr__(self) -> str:
        """One line: how many of which kind."""
        kinds = Counter(type(edit).__name__ for edit in self)
        return f"Edits({', '.join(f'{count} {kind}' for kind, count in kinds.items())})"

    def _repr_html_(self) -> str:
        """A row per edit."""
        return card(
            f"{len(self)} edits", parts=[table([{"edit": type(edit).__name__, **edit.told()} for edit in self])]
        )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other.to(one.device))
    return type(one) is type(other) and not isinstance(one, Tensor) and one == other


def _key(value: Any) -> Any:
    """Something that can be hashed and is the same for values that are."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape)
    return (value.start, value.stop, value.step) if isinstance(value, slice) else value


def _short(value: Any) -> str:
    if isinstance(value, Tensor) and value.is_floating_point():
        shape = ",".join(map(str, value.shape))
        return f"{str(value.dtype).removeprefix('torch.')}[{shape}] |{value.detach().double().norm():#.3g}|"
    return places.words(value) if isinstance(value, slice | Tensor) else repr(value)
