"""Edits of single writes: what to put in the place of k_t v_t^T at (layer, head, position).

The read-out of position t comes after its write, so an edit at t is seen by the logits of t and of everything after it,
exactly as if the model itself had written so.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent.config import ModelConfig
from hooked_recurrent.factors import Factors

Op = Literal["replace", "add", "delete", "scale"]
Form = Literal["additive", "net"]
Position = int | slice | Int[Tensor, "pos"]


@dataclass(frozen=True)
class WriteEdit:
    """One change to the writes of one head.

    replace writes key value^T instead of the native write; add writes it as well; delete writes nothing; scale multiplies
    the native write by `scale`. With form "additive" (the default) the erase stays what the model computed. With form
    "net" the native write means everything that the token did to the memory, k_t u_t^T: the erase goes too, so that a net
    delete leaves decay alone (it equals beta_t = 0).
    """

    layer: int
    """Which block; it must be recurrent."""
    head: int
    """Which (value) head."""
    position: Position
    """Absolute positions: an int, a slice, or a tensor of ints, counted from the first token the state has seen."""
    op: Op = "replace"
    """What happens to the write."""
    key: Float[Tensor, "*rows_pos d_k"] | None = None
    """Key side for replace and add: [d_k], or anything that broadcasts to [rows, positions, d_k]."""
    value: Float[Tensor, "*rows_pos d_v"] | None = None
    """Value side for replace and add: [d_v], or anything that broadcasts to [rows, positions, d_v]."""
    scale: float | None = None
    """Factor for scale."""
    batch: int | Int[Tensor, "rows"] | None = None
    """Batch rows to edit; None edits all."""
    form: Form = "additive"
    """Whether "the write" is the additive term or the token's net change; see above."""

    def __post_init__(self) -> None:
        if self.op not in get_args(Op):
            raise ValueError(f"unknown op {self.op!r}; expected one of {', '.join(get_args(Op))}")
        if self.form not in get_args(Form):
            raise ValueError(f"unknown form {self.form!r}; expected 'additive' or 'net'")
        _check_position(self.position, f"layer {self.layer}, head {self.head}")
        for name in ("key", "value"):
            self._check_side(name, wanted=self.op in ("replace", "add"))
        if (self.scale is not None) != (self.op == "scale"):
            raise ValueError(f"op {self.op!r} {'needs' if self.op == 'scale' else 'takes no'} scale")
        if self.scale is not None and not math.isfinite(self.scale):
            raise ValueError(f"the scale of the edit at {self.where} is {self.scale}, expected a finite number")
        if self.form == "net" and self.op in ("add", "scale"):
            raise ValueError(f"op {self.op!r} has no net form: only delete and replace can take the erase away")

    def _check_side(self, name: str, wanted: bool) -> None:
        """Whether key or value is there exactly when the op wants it, is finite, and fits the positions."""
        given = getattr(self, name)
        if (given is not None) != wanted:
            raise ValueError(f"op {self.op!r} {'needs' if wanted else 'takes no'} {name}")
        if given is None:
            return
        if not isinstance(given, Tensor) or not given.is_floating_point() or given.ndim not in (1, 2, 3):
            came = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(
                f"the {name} of the edit at {self.where} is {came}, expected a float tensor [d] to [rows, pos, d]"
            )
        if not torch.isfinite(given).all():
            raise ValueError(f"the {name} of the edit at {self.where} holds NaN or Inf")
        count = _count(self.position)
        if given.ndim > 1 and count is not None and given.shape[-2] not in (1, count):
            raise ValueError(
                f"the {name} of the edit at {self.where} is for {given.shape[-2]} positions, not for {count}"
            )

    @property
    def where(self) -> str:
        """The site in words, for messages."""
        return f"layer {self.layer}, head {self.head}, position {_words(self.position)}"

    def check(self, cfg: ModelConfig, end: int | None) -> None:
        """Raise if the site does not exist in this model, or lies at or after position `end` (None: anywhere)."""
        if not 0 <= self.layer < cfg.n_layers:
            raise IndexError(f"layer {self.layer} is out of range: the model has layers 0 to {cfg.n_layers - 1}")
        if self.layer not in cfg.recurrent_layers:
            raise ValueError(
                f"layer {self.layer} is softmax attention; the recurrent layers are {cfg.recurrent_layers}"
            )
        if not 0 <= self.head < cfg.n_heads:
            raise IndexError(f"head {self.head} is out of range: the layer has heads 0 to {cfg.n_heads - 1}")
        for name, width in (("key", cfg.d_k), ("value", cfg.d_v)):
            given = getattr(self, name)
            if given is not None and given.shape[-1] != width:
                raise ValueError(
                    f"the {name} of the edit at {self.where} has width {given.shape[-1]}, expected {width}"
                )
        if end is not None and self._highest() >= end:
            raise IndexError(f"position {self._highest()} is out of range: the text ends before position {end}")

    def local(self, positions: Int[Tensor, "pos"]) -> tuple[Int[Tensor, "hit"], Int[Tensor, "hit"]]:
        """Which of a call's absolute positions are edited: (indices into the call, indices into this edit's positions)."""
        if isinstance(self.position, slice):
            start, stop, stride = self.position.start or 0, self.position.stop, self.position.step or 1
            inside = (positions >= start) & ((positions - start) % stride == 0)
            inside &= positions < (positions[-1] + 1 if stop is None else stop)
            here = inside.nonzero()[:, 0]
            return here, (positions[here] - start) // stride
        wanted = torch.as_tensor(self.position).reshape(-1).to(positions.device)
        matches = (wanted[:, None] == positions[None]).nonzero()
        return matches[:, 1], matches[:, 0]

    def _highest(self) -> int:
        if isinstance(self.position, slice):
            return -1 if self.position.stop is None else self.position.stop - 1
        return int(torch.as_tensor(self.position).max())


def apply_edits(
    factors: Factors, edits: Iterable[WriteEdit], positions: Int[Tensor, "pos"]
) -> tuple[Factors, Factors | None]:
    """Edit the writes of one layer over the absolute positions of a call.

    Returns:
        (factors, added): the factors with edited writes and erases; and, if an edit adds writes, factors whose write_key
        and write_value are those further terms [batch, pos, head, term, d], else None. A key that no longer is the
        native one unties the erase, which is then written out from the native key.
    """
    added: list[tuple[Tensor, Tensor]] = []
    for edit in edits:
        here, chosen = edit.local(positions)
        if len(here) == 0:
            continue
        site = (_rows(edit, factors.query.shape[0])[:, None], here[None], edit.head)
        key, value = (_sides(edit, name, site[0], chosen, factors) for name in ("key", "value"))
        if edit.form == "net":
            factors = _without_erase(factors, site)
        if edit.op == "add":
            none = torch.zeros_like(factors.write_key), torch.zeros_like(factors.write_value)
            added.append((_put(none[0], site, key), _put(none[1], site, value)))
        elif edit.op == "replace":
            factors = factors.decoupled()
            factors = replace(
                factors,
                write_key=_put(factors.write_key, site, key),
                write_value=_put(factors.write_value, site, value),
            )
        else:
            scaled = factors.write_value[site] * (edit.scale if edit.op == "scale" else 0.0)
            factors = replace(factors, write_value=_put(factors.write_value, site, scaled))
            added = [(k, _put(v, site, v[site] * (edit.scale or 0.0))) for k, v in added]
        if edit.op == "replace":
            added = [(k, _put(v, site, v[site] * 0.0)) for k, v in added]
    if not added:
        return factors, None
    keys, values = (torch.stack(side, dim=3) for side in zip(*added, strict=True))
    return factors, replace(factors.decoupled(), write_key=keys, write_value=values)


def _sides(edit: WriteEdit, name: str, rows: Tensor, chosen: Tensor, factors: Factors) -> Tensor:
    """One side of the edit, broadcast to [rows, hit positions, d]."""
    given = getattr(edit, name)
    like = getattr(factors, f"write_{name}")
    if given is None:
        return like.new_zeros(1, 1, 1)
    given = given.to(like)
    try:
        if given.ndim > 1 and given.shape[-2] > 1:
            given = given[..., chosen, :]
        return given.expand(len(rows), len(chosen), like.shape[-1])
    except (RuntimeError, IndexError):
        came, expected = tuple(getattr(edit, name).shape), f"({len(rows)}, positions, {like.shape[-1]})"
        raise ValueError(f"the {name} of the edit at {edit.where} has shape {came}, which is not {expected}") from None


def _rows(edit: WriteEdit, batch: int) -> Tensor:
    rows = torch.arange(batch) if edit.batch is None else torch.as_tensor(edit.batch).reshape(-1)
    outside = rows[(rows < 0) | (rows >= batch)]
    if len(outside):
        raise IndexError(
            f"batch row {int(outside[0])} of the edit at {edit.where} is out of range: the batch has {batch}"
        )
    return rows


def _without_erase(factors: Factors, site: tuple) -> Factors:
    if factors.erase_strength is not None:
        strength = factors.erase_strength
        return replace(factors, erase_strength=_put(strength, site, strength[site] * 0))
    if factors.erase is not None:
        return replace(factors, erase=_put(factors.erase, site, factors.erase[site] * 0))
    return factors


def _put(tensor: Tensor, site: tuple, new: Tensor) -> Tensor:
    changed = tensor.clone()
    changed[site] = new
    return changed


def _check_position(position: Position, site: str) -> None:
    """Raise unless these are one or more positions of a text, counted from 0."""
    if isinstance(position, slice):
        if position.step is not None and position.step < 1:
            raise ValueError(f"a slice of positions must go forward, got step {position.step} at {site}")
        lowest = min(position.start or 0, position.stop or 0)
    else:
        wanted = torch.as_tensor(position)
        if wanted.dtype in (torch.bool, torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"positions must be integers, got {wanted.dtype} at {site}")
        lowest = int(wanted.min()) if wanted.numel() else 0
    if lowest < 0:
        raise IndexError(f"positions are absolute and start at 0, got {_words(position)} at {site}")
    if _count(position) == 0:
        raise ValueError(f"the edit at {site} names no position: {_words(position)}")


def _count(position: Position) -> int | None:
    """How many positions these are; None for a slice without an end."""
    if isinstance(position, slice):
        if position.stop is None:
            return None
        return len(range(position.start or 0, position.stop, position.step or 1))
    return torch.as_tensor(position).numel()


def _words(position: Position) -> str:
    if isinstance(position, slice):
        return f"{position.start or 0}:{'' if position.stop is None else position.stop}"
    return str(position) if isinstance(position, int) else str(torch.as_tensor(position).tolist())
