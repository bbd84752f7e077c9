"""Hook points that know which absolute positions they were given, and whether anything attached to them may edit.

They are transformer_lens HookPoints: the same `fn(tensor, hook)`, the same contexts and handles. Two things are added.
`hook.positions` holds the absolute positions along the tensor's pos axis, so that a function of positions does the same
in a prefill, a continuation and a generated token. And a function marked by `reads_only` is known not to edit, so that
caching never pushes the model off its fast path.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import Module
from transformer_lens.hook_points import HookPoint


class Clock:
    """The absolute positions of the forward call in progress, shared by all hook points of a model."""

    def __init__(self) -> None:
        self.positions: Int[Tensor, "pos"] = torch.zeros(0, dtype=torch.long)
        self.depth = 0  # how many calls run right now, one inside a hook of another

    @contextmanager
    def running(self, start: int, length: int) -> Iterator[None]:
        """A call over positions start .. start + length - 1; if it runs inside another's hook, that one goes on as it was."""
        outer, self.positions = self.positions, torch.arange(start, start + length)
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if self.depth:
                self.positions = outer


def reads_only(function: Callable) -> Callable:
    """Promise that a hook function returns nothing and leaves its tensor as it was."""
    try:
        function.reads_only = True  # type: ignore[attr-defined]
    except AttributeError:  # a bound method or a builtin takes no attributes
        function = partial(function)
        function.reads_only = True  # type: ignore[attr-defined]
    return function


def promises_to_read(function: Callable) -> bool:
    """Whether a hook function was marked by `reads_only`; looks through functools.partial."""
    while isinstance(function, partial):
        if getattr(function, "reads_only", False):
            return True
        function = function.func
    return getattr(function, "reads_only", False)


def in_use(module: Module) -> bool:
    """Whether anything is attached to a hook point of this module or of its parts."""
    return any(point.in_use for point in module.modules() if isinstance(point, RecurrentHookPoint))


def _check_function(function: Any, name: str | None) -> None:
    """Raise `TypeError` unless the function can be called as fn(tensor, hook=...), as far as its signature tells."""
    if not callable(function):
        raise TypeError(f"what is attached to {name} must be a function of (tensor, hook), got {type(function).__name__}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # builtins have none
        return
    try:
        signature.bind(None, hook=None)
    except TypeError as error:
        shown = getattr(function, "__name__", type(function).__name__)
        raise TypeError(
            f"a hook function is called as fn(tensor, hook=...), and {shown}{signature} cannot be: {error}"
        ) from None


def check_pairs(word: str, pairs: Any) -> list[tuple[Any, Callable]]:
    """The hooks of a call as a list. Raises `TypeError` unless they are pairs (name or filter, function)."""
    found = list(pairs) if isinstance(pairs, Iterable) else [pairs]
    for pair in found:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise TypeError(f"{word} must be a list of pairs (name, function), got {pair!r} in it")
    return found


class RecurrentHookPoint(HookPoint):
    """A HookPoint of a recurrent model; see the module docstring."""

    def __init__(self) -> None:
        super().__init__()
        self.clock: Clock | None = None
        self._readers: set[int] = set()

    @property
    def positions(self) -> Int[Tensor, "pos"]:
        """Absolute positions along the pos axis of the tensor that a forward function is being given.

        A backward function finds here the positions of the model's last forward call.
        """
        if self.clock is None:
            raise RuntimeError(f"hook point {self.name!r} belongs to no model yet, so it has no positions")
        return self.clock.positions

    def add_hook(self, hook: Callable, dir: str = "fwd", *args: Any, **kwargs: Any) -> Any:
        """As in transformer_lens; remembers whether the function only reads.

        Raises:
            TypeError: what cannot be called as fn(tensor, hook=...).
            ValueError: a direction other than "fwd" and "bwd".
        """
        _check_function(hook, self.name)
        if dir not in ("fwd", "bwd"):
            raise ValueError(f"dir must be 'fwd' or 'bwd', got {dir!r}")
        before = {handle.hook.id for handle in self.fwd_hooks}
        result = super().add_hook(hook, dir, *args, **kwargs)  # type: ignore[arg-type]
        if dir == "fwd" and promises_to_read(hook):
            self._readers.update(handle.hook.id for handle in self.fwd_hooks if handle.hook.id not in before)
        return result

    @property
    def in_use(self) -> bool:
        """Whether anything is attached, so that a lazy tensor must be computed."""
        return bool(self.fwd_hooks or self.bwd_hooks)

    @property
    def has_editor(self) -> bool:
        """Whether a forward function that may edit is attached."""
        return any(handle.hook.id not in self._readers for handle in self.fwd_hooks)

    @property
    def may_edit(self) -> bool:
        """Whether a forward function that may edit, or any backward function, is attached."""
        return bool(self.bwd_hooks) or self.has_editor

    def forward(self, x: Tensor) -> Tensor:
        """Identity; a possible editor gets a copy, so that an edit in place reaches only what follows this point."""
        return x.clone() if self.may_edit else x

    def __call__(self, x: Tensor) -> Tensor:
        """Fire. With nothing attached this is free; a function that returns another shape is one clear error.

        Where a backward function is attached and nothing below needs a gradient (frozen weights), gradients start here.
        """
        if not self.in_use:
            return x
        if self.bwd_hooks and torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()
        result = super().__call__(x)
        if not isinstance(result, Tensor) or result.shape != x.shape:
            came = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"a function on {self.name} returned {came}, expected a tensor of shape {tuple(x.shape)}")
        return result
