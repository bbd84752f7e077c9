"""What a cache keeps of a run: which hooks, positions and heads, where and as what; and the functions that save it.

A tensor is cut before it is kept, so that what was not asked for is free again as soon as the model is done with it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_recurrent.compat.names import first_name, unknown_hook
from hooked_recurrent.hooks import RecurrentHookPoint, reads_only

MATRIX_HOOKS = ("hook_write", "hook_state")
SCORE_HOOKS = ("hook_attn_scores", "hook_pattern")
Indices = int | slice | Iterable[int] | Int[Tensor, "..."] | None
"""Which heads or positions: one, a slice, several, or None for all. The axis stays, also for one."""
Index = SupportsIndex | slice | Iterable[int] | Int[Tensor, "..."]
"""Which heads or positions are read: one, which drops the axis, a slice or several."""


def cache_filter(names_filter: Callable[[str], bool] | Iterable[str] | str | None, names: list[str]) -> list[str]:
    """The hook names to keep: all but the matrix hooks for None; an unknown name is answered with the nearest ones."""
    if names_filter is None:
        return [name for name in names if not name.endswith(MATRIX_HOOKS)]
    if callable(names_filter):
        return [name for name in names if names_filter(name)]
    if not isinstance(names_filter, Iterable):
        raise TypeError(f"names_filter must be hook names or a function of one, got {type(names_filter).__name__}")
    wanted = [names_filter] if isinstance(names_filter, str) else list(names_filter)
    found = [first_name(name, names) for name in wanted]
    for name, known in zip(wanted, found, strict=True):
        if known is None:
            raise KeyError(f"names_filter: this run has {unknown_hook(name, names)}")
    return [name for name in names if name in set(found)]


def missing(name: str) -> str:
    """What to say of a hook's name that a cache does not hold."""
    if name.endswith(MATRIX_HOOKS):
        _, block, _, hook = name.split(".")
        what = hook.removeprefix("hook_")
        return f"{name} is not in the cache: cache.{what}({block}, head, pos) makes it, a names_filter with it keeps it"
    return f"{name} is not in the cache: run_with_cache without a filter, or with one that keeps it"


def indices(word: str, wanted: Indices, size: int) -> list[int]:
    """The wanted indices, counted from 0; negative ones count from the end.

    Raises:
        IndexError: one that is out of range.
        TypeError: what is no integer.
        ValueError: none at all.
    """
    if wanted is None or isinstance(wanted, slice):
        chosen = list(range(size))[slice(None) if wanted is None else wanted]
    else:
        chosen = _integers(word, wanted)
    for index in chosen:
        if not -size <= index < size:
            raise IndexError(f"{word} {index} is out of range: there are {size}")
    if not chosen:
        raise ValueError(f"no {word} is asked for: {wanted} chooses none of {size}")
    return [index % size for index in chosen]


def absolute_positions(wanted: Indices, start: int, length: int) -> tuple[int, ...]:
    """Those of a call's absolute positions that are wanted, ascending.

    Raises:
        IndexError: one before the text or outside this call; negative ones have no meaning, for a text may go on.
        TypeError: what is no integer.
        ValueError: none at all.
    """
    span = range(start, start + length)
    if wanted is None:
        return tuple(span)
    if isinstance(wanted, slice):
        step = 1 if wanted.step is None else wanted.step
        if min(wanted.start or 0, wanted.stop or 0) < 0 or step < 1:
            raise IndexError(f"positions are absolute, start at 0 and go forward, got {wanted}")
        chosen = range(wanted.start or 0, span.stop if wanted.stop is None else wanted.stop, step)
        held = [position for position in span if position in chosen]
    else:
        held = sorted(set(_integers("position", wanted)))
        for position in held:
            if position < 0:
                raise IndexError(f"positions are absolute and start at 0, got {position}")
            if position not in span:
                raise IndexError(f"position {position} is out of range: this call spans {start} to {span.stop - 1}")
    if not held:
        raise ValueError(f"no position is asked for: {wanted} chooses none of {start} to {span.stop - 1}")
    return tuple(held)


def _integers(word: str, wanted: SupportsIndex | Iterable[int] | Tensor) -> list[int]:
    """A list of ints; a bool or a float is no index."""
    given = torch.as_tensor(wanted if hasattr(wanted, "__index__") else list(wanted))
    if given.numel() and (given.dtype == torch.bool or given.is_floating_point()):
        raise TypeError(f"a {word} must be an integer, got {given.dtype}")
    return [int(one) for one in given.reshape(-1)]


@dataclass(frozen=True)
class Kept:
    """Which part of a call's activations a cache holds."""

    start: int
    """The first absolute position of the call."""
    length: int
    """How many positions the call had."""
    n_heads: int
    """How many heads a recurrent layer has."""
    positions: tuple[int, ...]
    """The absolute positions along the pos axis, ascending."""
    heads: tuple[int, ...]
    """The layer's number of each head along the head axis of the recurrent mixers' hooks, ascending."""
    device: str | torch.device | None = None
    """Where the activations live; None leaves them where they were made."""
    dtype: torch.dtype | None = None
    """What floating tensors are cast to; None leaves them as they were made."""

    @staticmethod
    def of(
        start: int,
        length: int,
        n_heads: int,
        positions: Indices = None,
        heads: Indices = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Kept":
        """From what a user asks for; raises as `absolute_positions` and `indices` do."""
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(
                f"activations are kept as floats, got dtype {dtype!r}; give one of torch's, such as torch.bfloat16"
            )
        numbers = tuple(sorted(set(indices("head", heads, n_heads))))
        return Kept(start, length, n_heads, absolute_positions(positions, start, length), numbers, device, dtype)

    @property
    def local(self) -> tuple[int, ...]:
        """The positions that are held, counted from the first one of the call."""
        return tuple(position - self.start for position in self.positions)

    @property
    def begins(self) -> bool:
        """Whether nothing is left out before the last held position."""
        return self.local == tuple(range(len(self.positions)))

    @property
    def ends(self) -> bool:
        """Whether nothing is left out after the first held position."""
        return self.local == tuple(range(self.length))[self.length - len(self.positions) :]

    def cut(self, name: str, tensor: Tensor, positions: Int[Tensor, "pos"]) -> Tensor:
        """What is kept of an activation over these absolute positions, cut from the graph and free of what is left out."""
        kept = tensor.detach()
        if len(self.positions) < self.length:
            held = set(self.positions)
            places = [place for place, position in enumerate(positions.tolist()) if position in held]
            kept = _select(kept, 2 if name.endswith(SCORE_HOOKS) else 1, places)
        if len(self.heads) < self.n_heads and ".mixer." in name:
            kept = _select(kept, 2, list(self.heads))
        return kept.to(device=self.device, dtype=self.dtype if kept.is_floating_point() else None)

    def head_places(self, word: str, heads: Indices) -> tuple[list[int], tuple[int, ...]]:
        """Heads by their numbers in the layer: (their places along the head axis, their numbers); None is all that is held."""
        numbers = list(self.heads) if heads is None else indices(word, heads, self.n_heads)
        for number in numbers:
            if number not in self.heads:
                raise IndexError(f"{word} {number} is not in the cache, which kept heads {_words(self.heads)}")
        return [self.heads.index(number) for number in numbers], tuple(numbers)

    def places(self, word: str, index: Index) -> int | list[int]:
        """Where heads or positions (word) lie along the cached axis; an int gives an int.

        They are given as numbers of the layer's heads and of the call's positions; negative ones count from the end, and
        slice(None) is all that is held.

        Raises:
            IndexError: one that the call did not have, or that was not kept.
            TypeError: what is no integer.
        """
        held, size = (self.heads, self.n_heads) if word == "head" else (self.local, self.length)
        if isinstance(index, slice):
            if index == slice(None):
                return list(range(len(held)))
            wanted = list(range(size))[index]
        else:
            wanted = _integers(word, index)
            for one in wanted:
                if not -size <= one < size:
                    raise IndexError(f"{word} {one} is out of range: the cache holds {size}")
            wanted = [one % size for one in wanted]
        for one in wanted:
            if one not in held:
                where = f" of the call (absolute {self.start + one})" if word == "position" and self.start else ""
                raise IndexError(f"{word} {one}{where} is not in the cache, which kept {word}s {_words(held)}")
        found = [held.index(one) for one in wanted]
        single = hasattr(index, "__index__") and getattr(index, "ndim", 0) == 0
        return found[0] if single else found


class Recorder:
    """Hook functions that keep what a call shows them, and the gradients with respect to it.

    A stepped hook_state comes in one piece per token. Each piece gets a gradient function of its own, so that gradients find
    their pieces in whatever order they come, and those that never come are known to be zero.
    """

    def __init__(self, names: list[str], kept: Kept, incl_bwd: bool, depth: int):
        """`depth` is the clock's depth in the call to be kept: calls that a hook function makes inside it are not."""
        self.kept, self.incl_bwd, self.depth = kept, incl_bwd, depth
        self.pieces: dict[str, list[Tensor]] = {name: [] for name in names}
        self.gradients: dict[str, list[Tensor | None]] = {name: [] for name in names}

    def hooks(self) -> tuple[list[tuple[str, Callable]], list[tuple[str, Callable]]]:
        """Forward and backward functions to attach. The backward ones only tell a hook that gradients are wanted."""

        @reads_only
        def save(tensor: Tensor, hook: RecurrentHookPoint) -> Tensor | None:
            return self._save(tensor, hook)

        def note(gradient: Tensor, hook: RecurrentHookPoint) -> None:
            return None

        names = list(self.pieces)
        return [(name, save) for name in names], [(name, note) for name in names] if self.incl_bwd else []

    def _save(self, tensor: Tensor, hook: RecurrentHookPoint) -> Tensor | None:
        if hook.clock is None or hook.clock.depth != self.depth:
            return None
        name, positions = str(hook.name), hook.positions
        self.pieces[name].append(self.kept.cut(name, tensor, positions))
        if not self.incl_bwd:
            return None
        gradients, place = self.gradients[name], len(self.gradients[name])
        gradients.append(None)

        def keep(gradient: Tensor) -> None:
            gradients[place] = self.kept.cut(name, gradient, positions)

        # A fresh view, so that the gradient is of what this hook hands on, and of no other use of the same tensor.
        seen = tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
        seen.register_hook(keep)
        return seen

    def tensors(self) -> dict[str, Tensor]:
        """One tensor per name, and with incl_bwd its gradient as name + "_grad"."""
        whole = {name: _join(name, pieces) for name, pieces in self.pieces.items() if pieces}
        if not self.incl_bwd:
            return whole
        for name, found in self.gradients.items():
            if found:
                pairs = zip(found, self.pieces[name], strict=True)
                whole[f"{name}_grad"] = _join(name, [torch.zeros_like(p) if g is None else g for g, p in pairs])
        return whole


def _join(name: str, pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _select(tensor: Tensor, dim: int, places: list[int]) -> Tensor:
    """A copy of some places along an axis: a view would keep all the others in memory."""
    return tensor.index_select(dim, torch.tensor(places, dtype=torch.long, device=tensor.device))


def _words(numbers: tuple[int, ...]) -> str:
    """Numbers in words, a long row of them shortened."""
    shown = [str(number) for number in numbers]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:6], "...", *shown[-3:]])
