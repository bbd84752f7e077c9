"""Absolute positions of a text, as an edit names them: an int, a slice, or a tensor of ints."""

import torch
from jaxtyping import Int
from torch import Tensor

Position = int | slice | Int[Tensor, "place"]

NO_INTEGERS = (torch.bool, torch.float64, torch.float32, torch.float16, torch.bfloat16)
# As many numbers of a tensor are written out in a message or a repr.
SHOWN = 8


def check_position(position: Position, site: str) -> None:
    """Raise unless these are one or more different positions of a text, counted from 0."""
    if isinstance(position, slice):
        if position.step is not None and position.step < 1:
            raise ValueError(f"a slice of positions must go forward, got step {position.step} at {site}")
        lowest = min(position.start or 0, position.stop or 0)
    elif type(position) is int:  # thousands of edits are made of these: no tensor for each
        lowest = position
    else:
        wanted = torch.as_tensor(position)
        if wanted.dtype in NO_INTEGERS:
            raise TypeError(f"positions must be integers, got {wanted.dtype} at {site}")
        lowest = int(wanted.min()) if wanted.numel() else 0
        if wanted.unique().numel() < wanted.numel():
            raise ValueError(f"the edit at {site} names a position twice: {words(position)}")
    if lowest < 0:
        raise IndexError(f"positions are absolute and start at 0, got {words(position)} at {site}")
    if count(position) == 0:
        raise ValueError(f"the edit at {site} names no position: {words(position)}")


def count(position: Position) -> int | None:
    """How many positions these are; None for a slice without an end."""
    if isinstance(position, slice):
        return None if position.stop is None else len(_range(position))
    if type(position) is int:
        return 1
    return torch.as_tensor(position).numel()


def first(position: Position) -> int:
    """The lowest of them."""
    if type(position) is int:
        return position
    return position.start or 0 if isinstance(position, slice) else int(torch.as_tensor(position).min())


def last(position: Position) -> int | None:
    """The highest of them; None for a slice without an end."""
    if isinstance(position, slice):
        return None if position.stop is None else _range(position)[-1]
    if type(position) is int:
        return position
    return int(torch.as_tensor(position).max())


def local(position: Position, positions: Int[Tensor, "pos"]) -> tuple[Int[Tensor, "hit"], Int[Tensor, "hit"]]:
    """Which of a call's absolute positions are meant: (indices into the call, indices into `position`)."""
    if isinstance(position, slice):
        start, stop, stride = position.start or 0, position.stop, position.step or 1
        inside = (positions >= start) & ((positions - start) % stride == 0)
        inside &= positions < (positions[-1] + 1 if stop is None else stop)
        here = inside.nonzero()[:, 0]
        return here, (positions[here] - start) // stride
    wanted = torch.as_tensor(position).reshape(-1).to(positions.device)
    matches = (wanted[:, None] == positions[None]).nonzero()
    return matches[:, 1], matches[:, 0]


def words(position: Position) -> str:
    """5, 2:9, 2:9:3, [8, 2, 5], or [8, 2, 5, ... 40 in all]."""
    if isinstance(position, slice):
        step = f":{position.step}" if (position.step or 1) != 1 else ""
        return f"{position.start or 0}:{'' if position.stop is None else position.stop}{step}"
    if isinstance(position, int):
        return str(position)
    numbers = torch.as_tensor(position).tolist()
    if not isinstance(numbers, list) or len(numbers) <= SHOWN:
        return str(numbers)
    return f"[{', '.join(map(str, numbers[:3]))}, ... {len(numbers)} in all]"


def _range(position: slice) -> range:
    return range(position.start or 0, position.stop, position.step or 1)
