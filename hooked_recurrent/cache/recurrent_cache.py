"""What run_with_cache returns: transformer_lens's ActivationCache, which also gives single writes and states on demand."""

from copy import copy
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache, FactoredMatrix

from hooked_recurrent.cache.residual import ResidualTools
from hooked_recurrent.cache.saving import Index, Kept, missing
from hooked_recurrent.cache.write_gradients import WriteGradientMixin
from hooked_recurrent.compat.slices import as_slice
from hooked_recurrent.display import brief
from hooked_recurrent.display.model import cache_html
from hooked_recurrent.factors import Factors
from hooked_recurrent.scan.edited import edited_scan
from hooked_recurrent.state import RecurrentState


class RecurrentCache(WriteGradientMixin, ResidualTools, ActivationCache):
    """An ActivationCache of a recurrent model; see `write`, `state` and `factors`, `write_grad` and `write_effect`."""

    def __init__(
        self,
        tensors: dict[str, Tensor],
        model: Any,
        call: Any,
        initial: RecurrentState | None,
        kept: Kept,
        edited_reads: frozenset[int] = frozenset(),
    ):
        """`edited_reads` are the layers where a function may have changed what the queries read."""
        super().__init__(tensors, model)
        self.initial_state, self.kept, self.edited_reads = initial, kept, edited_reads
        self.added_writes: dict[int, Factors] = call.added_writes
        self.dense_layers: frozenset[int] = frozenset(call.dense_layers)
        self.stepped_layers: frozenset[int] = frozenset(call.stepped_layers)
        whole = torch.arange(kept.start, kept.start + kept.length)
        held = [edit for edit in call.edits if edit.stage in ("state", "carried")]
        self._state_edits = [edit for edit in held if len(edit.local(whole)[0])]

    def state_edits(self, layer: int) -> list[Any]:
        """The edits that changed states of this layer during the run: StateEdits, and WriteEdits with reading "cache"."""
        return [edit for edit in self._state_edits if edit.layer == layer]

    @property
    def positions(self) -> tuple[int, ...]:
        """The absolute positions along the pos axis."""
        return self.kept.positions

    @property
    def heads(self) -> tuple[int, ...]:
        """The layer's number of each head along the head axis of the recurrent mixers' hooks."""
        return self.kept.heads

    def factors(self, layer: int) -> Factors:
        """The six roles of a layer as the recurrence consumed them, with every write term. Needs its role hooks cached.

        They are those of the positions and heads that were kept; where positions are missing between them, they still are
        the factors of each position, but their scan is no memory.
        """
        prefix = f"blocks.{layer}.mixer.hook_"
        self._check_recurrent(layer)
        erases = f"{prefix}erase" in self.model.hook_dict
        if layer in self.dense_layers:
            raise ValueError(f"a function on {prefix}write replaced writes by matrices, so they have no factors")
        roles = ["log_decay", "write_key", "write_value", "query", *(["erase", "probe"] if erases else [])]
        kept = {role: self._role(prefix + role) for role in roles}
        if layer in self.added_writes:
            span = torch.arange(self.kept.start, self.kept.start + self.kept.length)
            for role in ("write_key", "write_value"):
                added = self.kept.cut(prefix + role, getattr(self.added_writes[layer], role), span)
                kept[role] = torch.cat([kept[role][:, :, :, None], added.to(kept[role])], dim=3)
        return Factors(**kept)

    def write(self, layer: int, head: Index, pos: Index) -> FactoredMatrix:
        """The writes of a head as a FactoredMatrix [batch, (pos,) (head,) d_k, d_v], one rank per write term.

        head and pos are ints, slices or lists of the layer's heads and of this call's positions, negative ones counted
        from the end; an int drops its axis, and slice(None) is all that was kept. The batch axis stays, whatever the cache.

        Raises:
            ValueError: a layer without matrix memory, or one whose writes a function replaced by matrices.
            KeyError: roles that the cache did not keep.
            IndexError: heads or positions that the call did not have or the cache did not keep.
        """
        factors = self.factors(layer)
        heads, places = self.kept.places("head", head), self.kept.places("position", pos)
        key, value = factors.write_key, factors.write_value
        if key.ndim == 4:
            key, value = key[:, :, :, None], value[:, :, :, None]
        dtype = torch.promote_types(key.dtype, value.dtype)  # a bfloat16 Mamba-2 makes its values in float32
        key, value = (side[:, places][..., heads, :, :].to(dtype) for side in (key, value))
        return FactoredMatrix(key.mT, value)

    def state(
        self, layer: int, head: Index, pos: Index, *, carried: bool = False
    ) -> Float[Tensor, "batch *pos_head d_k d_v"]:
        """S_t, the state after the write at pos that the query of pos read, recomputed from the factors for these heads only.

        head and pos are those of `write`. All positions of the call up to the last of them must have been kept. With
        `carried` it is the state that the next position started from: the same one, unless an edit with reading "cache"
        changed it after the read.
        """
        factors = self.factors(layer)
        heads, places = self.kept.places("head", head), self.kept.places("position", pos)
        if layer in self.stepped_layers:
            name = f"blocks.{layer}.mixer.hook_state"
            raise ValueError(f"a function on {name} changed states, so no factors tell them: keep it by names_filter")
        wanted = [places] if isinstance(places, int) else places
        self._need_earlier_positions(wanted)
        some = [heads] if isinstance(heads, int) else heads
        factors = factors.map(lambda tensor: tensor[:, :, some])
        initial = None if self.initial_state is None else self.initial_state.layers[layer].matrix
        numbers = [self.heads[place] for place in some]
        edits = [replace(e, head=numbers.index(e.head)) for e in self.state_edits(layer) if e.head in numbers]
        matrix = None if initial is None else initial.detach().to(factors.query.device)[:, numbers]
        states: dict[int, Any] = {}
        start = 0
        for index in sorted(set(wanted)):
            stretch = slice(start, index + 1)
            positions = torch.arange(start, index + 1) + self.kept.start
            with torch.no_grad():  # the roles are kept without a graph; so are the edits' own tensors
                _, seen, matrix = edited_scan(factors.at(stretch), matrix, edits, positions)
            states[index], start = matrix if carried else seen, index + 1
        if isinstance(places, int):
            out = states[places]
            return out[:, 0] if isinstance(heads, int) else out
        none = factors.zero_state()[:, None][:, :0]
        stacked = torch.stack([states[index] for index in wanted], dim=1) if wanted else none
        return stacked[:, :, 0] if isinstance(heads, int) else stacked

    def to(self, device: str | torch.device) -> "RecurrentCache":
        """Move everything that is kept, in place, with what `write` and `state` need besides."""
        super().to(device)
        self.added_writes = {layer: more.map(lambda x: x.to(device)) for layer, more in self.added_writes.items()}
        self.initial_state = None if self.initial_state is None else self.initial_state.to(device)
        return self

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> "RecurrentCache":
        """A cache of the chosen rows; an int drops the batch axis. Takes what transformer_lens's Slice takes."""
        cut = as_slice(batch_slice)
        if cut.mode != "identity" and not self.has_batch_dim:
            raise ValueError("this cache holds one sequence without a batch axis, so it has no rows to choose from")
        part = copy(self)
        part.cache_dict = dict(self.cache_dict)
        if cut.mode == "identity":
            return part
        batch = self._batch_size()
        rows = torch.atleast_1d(cut.apply(torch.arange(batch), dim=0))
        part.cache_dict = {name: cut.apply(tensor, dim=0) for name, tensor in self.items()}
        part.has_batch_dim = cut.mode != "int"
        part.added_writes = {layer: more.map(lambda x: x[rows]) for layer, more in self.added_writes.items()}
        part.initial_state = None if self.initial_state is None else self.initial_state.index(rows)
        moved = [edit.for_rows(rows.tolist(), batch) for edit in self._state_edits]
        part._state_edits = [edit for edit in moved if edit is not None]
        return part

    def __repr__(self) -> str:
        """One line: how many activations of what; the names are `cache.keys()`."""
        held = ", ".join(self.keys()) if 0 < len(self) <= 3 else f"{len(self)} activations"
        batch = f"batch {self._batch_size()}" if self.has_batch_dim else "no batch axis"
        return f"RecurrentCache({held}; {batch}, positions {brief(self.positions)}, heads {brief(self.heads)})"

    def _repr_html_(self) -> str:
        """A row per kind of activation: layers, shape, size; above them what the run was."""
        facts = {
            "texts": self._batch_size() if self.has_batch_dim else "one, without a batch axis",
            "positions": brief(self.positions),
            "heads": brief(self.heads),
            "went on from": None if self.initial_state is None else f"position {self.initial_state.position}",
            "edits of states": len(self._state_edits) or None,
        }
        return cache_html(self.cache_dict, facts)

    def _role(self, name: str) -> Tensor:
        if name not in self.cache_dict:
            raise KeyError(missing(name))
        tensor = self.cache_dict[name]
        return tensor if self.has_batch_dim else tensor[None]

    def _check_recurrent(self, layer: int) -> None:
        recurrent = self.model.cfg.recurrent_layers
        if layer not in recurrent:
            raise ValueError(f"layer {layer} has no matrix memory; the recurrent ones are {recurrent}")

    def _need_earlier_positions(self, places: list[int]) -> None:
        """A state is made of all writes of the call up to it."""
        last = max(places, default=-1)
        if self.kept.local[: last + 1] != tuple(range(last + 1)):
            start, end = self.kept.start, self.positions[last]
            raise ValueError(
                f"the state after position {end} takes all positions of the call up to it, which were not all kept: "
                f"run_with_cache(..., positions=slice({start}, {end + 1})) keeps them"
            )
