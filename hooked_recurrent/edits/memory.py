"""What edits of a matrix memory share: a layer, a head, and whether the token's own query reads what they change.

At a position t the recurrence goes through three moments, and edits act in this order, within each as they were given:

    write       the write is changed before it reaches the state           WriteEdit, reading "in_recurrence"
    state       S_t is changed before the query of t reads it              StateEdit, reading "in_recurrence"
    carried     o_t has been read; only what comes later sees the change   both, reading "cache"
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent.edits.base import Edit
from hooked_recurrent.factors import Factors, State

Op = Literal["replace", "add", "delete", "scale"]
Reading = Literal["in_recurrence", "cache"]

# The tensors of an edit, each with the number of its own axes, behind [rows, positions].
OWN_AXES = {"key": 1, "value": 1, "matrix": 2}


@dataclass
class Moment:
    """The memory of a layer at one position; edits change `state`, which must be theirs, in place, one after the other."""

    state: State
    """S_t so far."""
    before: State
    """S_{t-1}, from which the token started."""
    factors: Factors
    """The six roles of this one position, as they were consumed."""
    dense: Float[Tensor, "batch one head d_k d_v"] | None = None
    """The write as a matrix, where a function on hook_write made one."""

    @cached_property
    def write(self) -> State:
        """What the token wrote, as far as it still is in the state."""
        write = self.factors.write_matrix() if self.dense is None else self.dense.to(self.state.dtype).clone()
        return write[:, 0]

    @cached_property
    def erased(self) -> State:
        """What the token's erase added to the state, a_t b_t^T S_{t-1}, as far as it still is there."""
        apart = self.factors.decoupled()
        if apart.erase is None or apart.probe is None:
            return torch.zeros_like(self.state)
        erase, probe = (side[:, 0].to(self.state.dtype) for side in (apart.erase, apart.probe))
        return erase[..., None] * torch.einsum("bhk,bhkv->bhv", probe, self.before)[..., None, :]


class MemoryEdit(Edit):
    """An edit of the memory of one head."""

    layer: int
    head: int
    reading: Reading

    @abstractmethod
    def act(self, moment: Moment, chosen: Int[Tensor, "one"]) -> None:
        """Change the state of a moment in place; `chosen` is the moment's index into this edit's positions."""

    def for_rows(self, rows: Sequence[int], batch: int) -> "MemoryEdit | None":
        """The same edit in a batch made of these rows of one with `batch` rows; None where it edits none of them."""
        mine = {row: place for place, row in enumerate(self.rows(batch).tolist())}
        held = [(row, mine[old]) for row, old in enumerate(rows) if old in mine]
        if not held:
            return None
        changed: dict[str, Any] = {"batch": None if self.batch is None else torch.tensor([row for row, _ in held])}
        for name, axes in OWN_AXES.items():
            given = getattr(self, name, None)
            if given is not None and given.ndim == axes + 2 and len(given) > 1:
                changed[name] = given[[place for _, place in held]]
        return replace(self, **changed)

    @property
    def site(self) -> str:
        """The layer and the head in words."""
        return f"layer {self.layer}, head {self.head}"

    def check(self, model: Any, end: int | None) -> None:
        """As in `Edit`; also the layer and the head."""
        cfg = model.cfg
        if not 0 <= self.layer < cfg.n_layers:
            raise IndexError(f"layer {self.layer} is out of range: the model has layers 0 to {cfg.n_layers - 1}")
        if self.layer not in cfg.recurrent_layers:
            raise ValueError(
                f"layer {self.layer} is softmax attention; the recurrent layers are {cfg.recurrent_layers}"
            )
        if not 0 <= self.head < cfg.n_heads:
            raise IndexError(f"head {self.head} is out of range: the layer has heads 0 to {cfg.n_heads - 1}")
        super().check(model, end)

    def _check_op(self) -> None:
        """What both kinds ask of op, reading, positions and scale."""
        self._check_choice("op", Op)
        self._check_choice("reading", Reading)
        self._settle()
        self._check_scale()

    def _check_width(self, name: str, *widths: int) -> None:
        """Whether the last axes of a tensor are those of the layer."""
        given = getattr(self, name)
        if given is not None and tuple(given.shape[-len(widths) :]) != widths:
            came, expected = (" x ".join(map(str, w)) for w in (given.shape[-len(widths) :], widths))
            raise ValueError(f"the {name} of the edit at {self.where} has width {came}, expected {expected}")
