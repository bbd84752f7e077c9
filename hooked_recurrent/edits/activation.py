"""Edits of any activation at a named hook: what a function on that hook would do, as data."""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent.edits.base import Edit, Rows, Stage
from hooked_recurrent.edits.positions import Position
from hooked_recurrent.hooks import RecurrentHookPoint

ActivationOp = Literal["replace", "add", "scale"]

REFUSED = {
    "hook_attn_scores": "its axes are query and key positions: change hook_q or hook_k, or use a function",
    "hook_pattern": "its axes are query and key positions: change hook_z, or use a function",
    "hook_write": "a matrix per token is made only when asked for: use a WriteEdit",
    "hook_state": "a matrix per token is made only when asked for: use a StateEdit",
}
BLOCK = re.compile(r"blocks\.(\d+)\.")
WITH_HEADS = re.compile(r"blocks\.\d+\.(mixer|attn)\.")


@dataclass(frozen=True, eq=False, repr=False)
class ActivationEdit(Edit):
    """One change to an activation [batch, pos, ...] at some positions.

    replace puts `value` in its place, add adds it, scale multiplies by it. It acts before every function on that hook, so
    that functions and caches see what it left; several at one hook act in the order given.
    """

    hook: str
    """The hook's name, e.g. "blocks.1.hook_resid_pre" or "blocks.0.mixer.hook_z"."""
    position: Position
    """Absolute positions: an int, a slice, or a tensor of ints, counted from the first token the state has seen."""
    value: Float[Tensor, "*rows_pos_rest"] | float
    """A number (the only kind for scale), or what broadcasts to [rows, positions, ...], with `head` to what follows it."""
    head: int | None = None
    """Which entry of axis 2, for a hook of a mixer or of attention; None changes all."""
    batch: Rows = None
    """Batch rows to edit; None edits all."""
    op: ActivationOp = "replace"
    """What happens to the activation."""

    def __post_init__(self) -> None:
        if not isinstance(self.hook, str):
            raise TypeError(f"hook must be the name of a hook, got {type(self.hook).__name__}")
        self._check_choice("op", ActivationOp)
        self._settle()
        if isinstance(self.value, int | float):
            if not math.isfinite(self.value):
                raise ValueError(f"the value of the edit at {self.where} is {self.value}, expected a finite number")
        elif self.op == "scale":
            raise ValueError(f"op 'scale' needs a number as value, got {type(self.value).__name__}")
        elif not isinstance(self.value, Tensor) or not self.value.is_floating_point():
            came = self.value.dtype if isinstance(self.value, Tensor) else type(self.value).__name__
            raise ValueError(f"the value of the edit at {self.where} is {came}, expected a float tensor or a number")
        else:
            self._check_finite("value", self.value)

    @property
    def layer(self) -> int | None:  # type: ignore[override]
        """The block of the hook; None for one outside the blocks."""
        block = BLOCK.match(self.hook)
        return None if block is None else int(block[1])

    @property
    def stage(self) -> Stage:
        """At its hook."""
        return "activation"

    @property
    def site(self) -> str:
        """The hook and the head in words."""
        return self.hook if self.head is None else f"{self.hook}, head {self.head}"

    def below(self, layer: int) -> bool:
        """As in `Edit`; hooks outside the blocks lie below all of them, but for the last norm's."""
        return super().below(layer) if self.layer is not None else not self.hook.startswith("ln_final.")

    def check(self, model: Any, end: int | None) -> None:
        """Raise if the hook does not exist, has no positions or heads to pick, or a position is at or after `end`."""
        model.checked_hook_name(self.hook)
        reason = REFUSED.get(self.hook.rpartition(".")[2])
        if reason is not None:
            raise ValueError(f"an ActivationEdit cannot change {self.hook}: {reason}")
        if self.head is not None and WITH_HEADS.match(self.hook) is None:
            raise ValueError(f"{self.hook} has no head axis, so the edit of its head {self.head} has no place")
        super().check(model, end)

    def act(self, tensor: Float[Tensor, "batch pos *rest"], positions: Int[Tensor, "pos"]) -> None:
        """Change in place what a hook shows at these absolute positions."""
        here, chosen = self.local(positions)
        if len(here) == 0:
            return
        if self.head is not None and not 0 <= self.head < tensor.shape[2]:
            raise IndexError(f"head {self.head} is out of range: {self.hook} has heads 0 to {tensor.shape[2] - 1}")
        rows = self.rows(tensor.shape[0])
        heads = () if self.head is None else (self.head,)
        site = (rows[:, None], here[None], *heads)
        new: Tensor | float
        if isinstance(self.value, Tensor):
            new = self.spread("value", tensor, tensor.shape[2 + len(heads) :], len(rows), chosen)
        else:
            new = self.value
        if self.op == "replace":
            tensor[site] = new
        else:
            tensor[site] = tensor[site] + new if self.op == "add" else tensor[site] * new


@contextmanager
def attached(model: Any, edits: Iterable[Edit]) -> Iterator[None]:
    """Have a model's hooks make these activation edits, in the call whose positions its clock shows, and in no other.

    They come before all functions that are attached already.
    """
    depth, positions = model.clock.depth, model.clock.positions
    at_hook: dict[str, list[Any]] = {}
    for edit in edits:
        if edit.stage == "activation" and len(edit.local(positions)[0]):
            at_hook.setdefault(edit.hook, []).append(edit)  # type: ignore[attr-defined]

    def function(several: list[Any]) -> Callable:
        def make_edits(tensor: Tensor, hook: RecurrentHookPoint) -> None:
            if hook.clock is not None and hook.clock.depth == depth:  # not in a call that a hook function makes
                for edit in several:
                    edit.act(tensor, hook.positions)

        return make_edits

    handles = []
    for name, several in at_hook.items():
        point = model.hook_dict[name]
        point.add_hook(function(several), level=model.context_level, prepend=True)
        handles.append((point, point.fwd_hooks[0]))
    try:
        yield
    finally:
        for point, handle in handles:
            handle.hook.remove()
            point.fwd_hooks = [other for other in point.fwd_hooks if other is not handle]
