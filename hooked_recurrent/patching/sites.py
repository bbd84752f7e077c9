"""What a sweep can change: residual streams, outputs, reads, and the two matrices, a write and a state.

A site says which hooks show it and which edits put something else in its place. What stands there in some run, and what is put
there, are `Values`: an activation as it is, a write as its two factors, a state (or a write of more than one rank) as a matrix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_recurrent.cache import RecurrentCache
from hooked_recurrent.display import OneLine
from hooked_recurrent.edits import ActivationEdit, Edit, StateEdit, WriteEdit
from hooked_recurrent.edits.positions import Position
from hooked_recurrent.edits.write import Form

ROLES = ("log_decay", "erase", "probe", "write_key", "write_value", "query")


@dataclass(frozen=True, repr=False)
class Values(OneLine):
    """What stands at a site in one layer, or is to be put there, along the positions of a text."""

    value: Float[Tensor, "pos *head d"] | None = None
    """An activation; of a write its value side."""
    key: Float[Tensor, "pos head d_k"] | None = None
    """Of a write its key side."""
    matrix: Float[Tensor, "pos head d_k d_v"] | None = None
    """A state, or a write that is no single outer product."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Values":
        """A copy with `change` applied to every tensor that is present."""
        return Values(**{name: change(tensor) for name, tensor in vars(self).items() if tensor is not None})

    def same_everywhere(self, length: int) -> "Values":
        """The values of a single position, at `length` ones."""
        return self.map(lambda tensor: tensor.expand(length, *tensor.shape[1:]))


@dataclass(frozen=True)
class Site:
    """An activation with a pos axis; `write` and `state` are sites of their own kind."""

    name: str
    hook: str
    """Name of its hook in a block."""
    by_head: bool
    """Whether axis 2 is a head axis."""

    def layers(self, model: Any) -> list[int]:
        """The layers that have it; of a site with heads only recurrent ones, whose heads are alike."""
        layers = model.cfg.recurrent_layers if self.by_head else range(model.cfg.n_layers)
        return [layer for layer in layers if self.hook_name(layer) in model.hook_dict]

    def hook_name(self, layer: int) -> str:
        """The full name of the hook that shows it."""
        return f"blocks.{layer}.{self.hook}"

    def names(self, model: Any, layers: list[int]) -> list[str]:
        """What a cache must keep, for `read`."""
        return [self.hook_name(layer) for layer in layers]

    def read(self, cache: RecurrentCache, layer: int, row: int) -> Values:
        """What stood there in a run."""
        return Values(value=cache[self.hook_name(layer)][row])

    def mean(self, cache: RecurrentCache, layer: int) -> Values:
        """The mean over all positions of all rows of a run, at one position."""
        return Values(value=cache[self.hook_name(layer)].flatten(0, 1).mean(0, keepdim=True))

    def put(self, values: Values, layer: int, heads: list[int] | None, position: Position, form: Form) -> list[Edit]:
        """The edits that put values there: in these heads (None where it has none), at these positions."""
        assert values.value is not None
        if heads is None:
            return [ActivationEdit(self.hook_name(layer), position, values.value[position])]
        return [
            ActivationEdit(self.hook_name(layer), position, values.value[position][..., head, :], head=head)
            for head in heads
        ]

    def remove(self, layer: int, heads: list[int] | None, position: Position, form: Form) -> list[Edit]:
        """The edits that leave nothing there."""
        each: Sequence[int | None] = [None] if heads is None else heads
        return [ActivationEdit(self.hook_name(layer), position, 0.0, head=head) for head in each]


class WriteSite(Site):
    """The write of every head: replaced as the two factors that it is."""

    def names(self, model: Any, layers: list[int]) -> list[str]:
        """The two factors."""
        return [f"blocks.{layer}.mixer.hook_write_{side}" for layer in layers for side in ("key", "value")]

    def read(self, cache: RecurrentCache, layer: int, row: int) -> Values:
        """The two factors."""
        key, value = (cache[f"blocks.{layer}.mixer.hook_write_{side}"][row] for side in ("key", "value"))
        return Values(value=value, key=key)

    def mean(self, cache: RecurrentCache, layer: int) -> Values:
        """The mean matrix, which is of any rank."""
        key, value = (cache[f"blocks.{layer}.mixer.hook_write_{side}"].flatten(0, 1) for side in ("key", "value"))
        return Values(matrix=torch.einsum("nhk,nhv->hkv", key, value)[None] / len(key))

    def put(self, values: Values, layer: int, heads: list[int] | None, position: Position, form: Form) -> list[Edit]:
        """A write for a write; a matrix is added to the state that the deleted write leaves, before it is read."""
        assert heads is not None
        if values.key is not None and values.value is not None:
            key, value = values.key[position], values.value[position]
            return [
                WriteEdit(layer, head, position, key=key[..., head, :], value=value[..., head, :], form=form)
                for head in heads
            ]
        assert values.matrix is not None
        matrix = values.matrix[position]
        added = [StateEdit(layer, head, position, "add", matrix=matrix[..., head, :, :]) for head in heads]
        return [*self.remove(layer, heads, position, form), *added]

    def remove(self, layer: int, heads: list[int] | None, position: Position, form: Form) -> list[Edit]:
        """Deleted writes; in net form the erase goes too."""
        assert heads is not None
        return [WriteEdit(layer, head, position, "delete", form=form) for head in heads]


class StateSite(Site):
    """The matrix memory of every head after the write."""

    def names(self, model: Any, layers: list[int]) -> list[str]:
        """The six roles, from which states are recomputed."""
        names = [f"blocks.{layer}.mixer.hook_{role}" for layer in layers for role in ROLES]
        return [name for name in names if name in model.hook_dict]

    def read(self, cache: RecurrentCache, layer: int, row: int) -> Values:
        """Every state of the layer, [pos, head, d_k, d_v]."""
        return Values(matrix=cache.state(layer, slice(None), slice(None))[row])

    def mean(self, cache: RecurrentCache, layer: int) -> Values:
        """The mean state, head by head so that only one head's trajectory is held."""
        heads = [cache.state(layer, head, slice(None)).flatten(0, 1).mean(0) for head in cache.heads]
        return Values(matrix=torch.stack(heads)[None])

    def put(self, values: Values, layer: int, heads: list[int] | None, position: Position, form: Form) -> list[Edit]:
        """A state for a state."""
        assert heads is not None and values.matrix is not None
        matrix = values.matrix[position]
        return [StateEdit(layer, head, position, matrix=matrix[..., head, :, :]) for head in heads]

    def remove(self, layer: int, heads: list[int] | None, position: Position, form: Form) -> list[Edit]:
        """An empty memory."""
        assert heads is not None
        return [StateEdit(layer, head, position, "delete") for head in heads]


STREAMS = ("resid_pre", "mixer_out", "resid_mid", "mlp_out", "resid_post")
BY_HEAD = ("q", "k", "v", "query", "read", "z")
SITES: dict[str, Site] = {
    **{name: Site(name, f"hook_{name}", False) for name in STREAMS},
    **{name: Site(name, f"mixer.hook_{name}", True) for name in BY_HEAD},
    "write": WriteSite("write", "mixer.hook_write", True),
    "state": StateSite("state", "mixer.hook_state", True),
}


def site_named(name: str) -> Site:
    """The site of this name; `ValueError` with the nearest ones for any other."""
    if name not in SITES:
        near = get_close_matches(str(name), SITES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(SITES)}"
        raise ValueError(f"there is no site {name!r} to sweep; {hint}")
    return SITES[name]
