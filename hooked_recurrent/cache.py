"""What run_with_cache returns: transformer_lens's ActivationCache, which also gives single writes and states on demand."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import ActivationCache, FactoredMatrix

from hooked_recurrent.factors import Factors
from hooked_recurrent.hooks import RecurrentHookPoint, reads_only
from hooked_recurrent.scan.edited import edited_scan
from hooked_recurrent.state import RecurrentState

MATRIX_HOOKS = ("hook_write", "hook_state")


def cache_filter(names_filter: Callable[[str], bool] | Iterable[str] | str | None, names: list[str]) -> list[str]:
    """The hook names to keep: all but the matrix hooks for None; an unknown name is answered with the nearest ones."""
    if names_filter is None:
        return [name for name in names if not name.endswith(MATRIX_HOOKS)]
    if callable(names_filter):
        return [name for name in names if names_filter(name)]
    wanted = [names_filter] if isinstance(names_filter, str) else list(names_filter)
    for name in wanted:
        if name not in names:
            near = get_close_matches(name, names, n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise KeyError(f"names_filter asks for {name!r}, which is no hook of this model{hint}")
    return [name for name in names if name in set(wanted)]


def saving_hooks(
    names: list[str], pieces: dict[str, list[Tensor]], device: Any, incl_bwd: bool, depth: int
) -> tuple[list[tuple[str, Callable]], list[tuple[str, Callable]]]:
    """Hooks that append what they see to `pieces[name]`; a stepped hook_state comes in one piece per token.

    `depth` is the clock's depth in the call to be kept: calls that a hook function makes inside it are not.
    """

    @reads_only
    def save(tensor: Tensor, hook: RecurrentHookPoint, suffix: str = "") -> None:
        if suffix or hook.clock is None or hook.clock.depth == depth:
            kept = tensor.detach()
            pieces.setdefault(f"{hook.name}{suffix}", []).append(kept if device is None else kept.to(device))

    forward: list[tuple[str, Callable]] = [(name, save) for name in names]
    backward: list[tuple[str, Callable]] = [(name, partial(save, suffix="_grad")) for name in names] if incl_bwd else []
    return forward, backward


def join_pieces(pieces: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """One tensor per name. Gradients of a stepped hook_state arrive from the last token to the first."""
    tensors = {}
    for name, kept in pieces.items():
        in_order = kept[::-1] if name.endswith("_grad") else kept
        tensors[name] = kept[0] if len(kept) == 1 else torch.cat(in_order, dim=1)
    return tensors


class RecurrentCache(ActivationCache):
    """An ActivationCache of a recurrent model; see `write`, `state` and `factors`."""

    def __init__(self, tensors: dict[str, Tensor], model: Any, call: Any, initial: RecurrentState | None):
        super().__init__(tensors, model)
        self.initial_state = initial
        self.added_writes: dict[int, Factors] = call.added_writes
        self.dense_layers: frozenset[int] = frozenset(call.dense_layers)
        self.stepped_layers: frozenset[int] = frozenset(call.stepped_layers)
        start = 0 if initial is None else initial.position
        self.positions: Int[Tensor, "pos"] = torch.arange(start, start + call.stops[-1])
        held = [edit for edit in call.edits if edit.stage in ("state", "carried")]
        self._state_edits = [edit for edit in held if len(edit.local(self.positions)[0])]

    def state_edits(self, layer: int) -> list[Any]:
        """The edits that changed states of this layer during the run: StateEdits, and WriteEdits with reading "cache"."""
        return [edit for edit in self._state_edits if edit.layer == layer]

    def factors(self, layer: int) -> Factors:
        """The six roles of a layer as the recurrence consumed them, with every write term. Needs its role hooks cached."""
        prefix = f"blocks.{layer}.mixer.hook_"
        erases = f"{prefix}erase" in self.model.hook_dict
        if f"{prefix}write_key" not in self.model.hook_dict:
            recurrent = self.model.cfg.recurrent_layers
            raise ValueError(f"layer {layer} has no matrix memory; the recurrent ones are {recurrent}")
        if layer in self.dense_layers:
            raise ValueError(f"a function on {prefix}write replaced writes by matrices, so they have no factors")
        roles = ["log_decay", "write_key", "write_value", "query", *(["erase", "probe"] if erases else [])]
        kept = {role: self._role(prefix + role) for role in roles}
        if layer in self.added_writes:
            added = self.added_writes[layer]
            kept["write_key"] = torch.cat([kept["write_key"][:, :, :, None], added.write_key.detach()], dim=3)
            kept["write_value"] = torch.cat([kept["write_value"][:, :, :, None], added.write_value.detach()], dim=3)
        return Factors(**kept)

    def write(self, layer: int, head: int | slice, pos: int | slice) -> FactoredMatrix:
        """The writes of a head as a FactoredMatrix [batch, (pos,) (head,) d_k, d_v], one rank per write term.

        head and pos are ints or slices of this call's heads and positions; an int drops its axis.
        """
        factors = self.factors(layer)
        self._check(factors, head, pos)
        key, value = factors.write_key, factors.write_value
        if key.ndim == 4:
            key, value = key[:, :, :, None], value[:, :, :, None]
        heads, places = _forward(head, key.shape[2]), _forward(pos, key.shape[1])
        return FactoredMatrix(key[:, places][..., heads, :, :].mT, value[:, places][..., heads, :, :])

    def state(
        self, layer: int, head: int | slice, pos: int | slice, *, carried: bool = False
    ) -> Float[Tensor, "batch *pos_head d_k d_v"]:
        """S_t, the state after the write at pos that the query of pos read, recomputed from the factors for these heads only.

        head and pos are ints or slices of this call's heads and positions; an int drops its axis. With `carried` it is the
        state that the next position started from: the same one, unless an edit with reading "cache" changed it after the
        read.
        """
        factors = self.factors(layer)
        self._check(factors, head, pos)
        if layer in self.stepped_layers:
            name = f"blocks.{layer}.mixer.hook_state"
            raise ValueError(f"a function on {name} changed states, so no factors tell them: keep it by names_filter")
        heads = slice(head, head + 1 or None) if isinstance(head, int) else head
        some, numbers = _forward(heads, factors.query.shape[2]), list(range(factors.query.shape[2]))[heads]
        edits = [replace(e, head=numbers.index(e.head)) for e in self.state_edits(layer) if e.head in numbers]
        factors = factors.map(lambda tensor: tensor[:, :, some])
        initial = None if self.initial_state is None else self.initial_state.layers[layer].matrix
        matrix = None if initial is None else initial.detach()[:, some]
        wanted = [pos % factors.length] if isinstance(pos, int) else list(range(factors.length))[pos]
        states, start = {}, 0
        for index in sorted(wanted):
            stretch = slice(start, index + 1)
            with torch.no_grad():  # the roles are kept without a graph; so are the edits' own tensors
                _, seen, matrix = edited_scan(factors.at(stretch), matrix, edits, self.positions[stretch])
            states[index], start = matrix if carried else seen, index + 1
        if isinstance(pos, int):
            out = states[wanted[0]]
            return out[:, 0] if isinstance(head, int) else out
        none = factors.zero_state()[:, None][:, :0]
        stacked = torch.stack([states[index] for index in wanted], dim=1) if wanted else none
        return stacked[:, :, 0] if isinstance(head, int) else stacked

    def _role(self, name: str) -> Tensor:
        if name not in self.cache_dict:
            raise KeyError(f"{name} is not in the cache: run_with_cache without a filter, or with one that keeps it")
        tensor = self.cache_dict[name]
        return tensor if self.has_batch_dim else tensor[None]

    @staticmethod
    def _check(factors: Factors, head: int | slice, pos: int | slice) -> None:
        for word, index, size in (("head", head, factors.query.shape[2]), ("position", pos, factors.length)):
            if isinstance(index, int) and not -size <= index < size:
                raise IndexError(f"{word} {index} is out of range: the cache holds {size}")


def _forward(index: int | slice, size: int) -> int | slice | list[int]:
    """The same index in a form that torch takes: it has no slices that run backward."""
    backward = isinstance(index, slice) and index.step is not None and index.step < 0
    return list(range(size))[index] if backward else index
