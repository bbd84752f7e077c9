"""Edits of single writes: what to put in the place of k_t v_t^T at (layer, head, position).

The read-out of position t comes after its write, so by default an edit at t is seen by the logits of t and of everything
after it, exactly as if the model itself had written so.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent.edits.base import Rows, Stage
from hooked_recurrent.edits.memory import MemoryEdit, Moment, Op, Reading
from hooked_recurrent.edits.positions import Position
from hooked_recurrent.factors import Factors

Form = Literal["additive", "net"]


@dataclass(frozen=True, eq=False, repr=False)
class WriteEdit(MemoryEdit):
    """One change to the writes of one head.

    replace writes key value^T instead of the native write; add writes it as well; delete writes nothing; scale multiplies
    the native write by `scale`. With form "additive" (the default) the erase stays what the model computed. With form
    "net" the native write means everything that the token did to the memory, k_t u_t^T: the erase goes too, so that a net
    delete leaves decay alone (it equals beta_t = 0).

    With reading "cache" the native write is read at t and exchanged for the new one afterwards, S_t += new - native (with
    form "net" the native includes the erase a_t b_t^T S_{t-1}): what comes of changing a cached state after token t. The
    hooks then show the native write. What is native to such an edit is what earlier edits, and functions on hooks, left.
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
    batch: Rows = None
    """Batch rows to edit; None edits all."""
    form: Form = "additive"
    """Whether "the write" is the additive term or the token's net change; see above."""
    reading: Reading = "in_recurrence"
    """Whether the query of t reads the new write ("in_recurrence") or still the native one ("cache"); see above."""

    def __post_init__(self) -> None:
        self._check_choice("form", Form)
        self._check_op()
        for name, axis in (("key", "d_k"), ("value", "d_v")):
            self._check_tensor(name, axis, wanted=self.op in ("replace", "add"))
        if self.form == "net" and self.op in ("add", "scale"):
            raise ValueError(f"op {self.op!r} has no net form: only delete and replace can take the erase away")

    @property
    def stage(self) -> Stage:
        """On the write, or on the state that is carried on."""
        return "write" if self.reading == "in_recurrence" else "carried"

    def check(self, model: Any, end: int | None) -> None:
        """Raise if the site does not exist in this model, or lies at or after position `end` (None: anywhere)."""
        super().check(model, end)
        self._check_width("key", model.cfg.d_k)
        self._check_width("value", model.cfg.d_v)

    def act(self, moment: Moment, chosen: Int[Tensor, "one"]) -> None:
        """S_t += new - native, in place."""
        site = (self.rows(moment.state.shape[0]), self.head)
        native = moment.write[site]
        if self.op in ("replace", "add"):
            key, value = (_sides(self, name, len(site[0]), chosen, moment.factors) for name in ("key", "value"))
            new = (key[..., :, None].to(native.dtype) * value[..., None, :].to(native.dtype))[:, 0]
            new = new if self.op == "replace" else native + new
        else:
            new = native * (self.scale if self.op == "scale" else 0.0)
        gone = native
        if self.form == "net":
            gone = native + moment.erased[site]
            moment.erased[site] = 0.0
        moment.state[site] = moment.state[site] + (new - gone)
        moment.write[site] = new


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
        site = (edit.rows(factors.query.shape[0])[:, None], here[None], edit.head)
        key, value = (_sides(edit, name, len(site[0]), chosen, factors) for name in ("key", "value"))
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


def _sides(edit: WriteEdit, name: str, rows: int, chosen: Tensor, factors: Factors) -> Tensor:
    """One side of the edit, broadcast to [rows, hit positions, d]; zero where the op has none."""
    like = getattr(factors, f"write_{name}")
    if getattr(edit, name) is None:
        return like.new_zeros(1, 1, 1)
    return edit.spread(name, like, like.shape[-1:], rows, chosen)


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
