"""What every recurrent mixer does: project to factors, hook each, edit, scan, read out. A rule only fills in its two ends.

Hooks of `blocks.{l}.mixer`, in firing order (a rule adds its upstream ones, hook_q, hook_k, hook_v and its gates, before):

    hook_log_decay     log d_t <= 0                       [batch, pos, head] or [batch, pos, head, d_k]
    hook_erase         a_t                                [batch, pos, head, d_k]; absent where nothing is erased
    hook_probe         b_t                                [batch, pos, head, d_k]; absent where nothing is erased
    hook_write_key     k_t                                [batch, pos, head, d_k]
    hook_write_value   v_t                                [batch, pos, head, d_v]
    hook_query         q_t                                [batch, pos, head, d_k]
    hook_write         k_t v_t^T, only when asked for     [batch, pos, head, d_k, d_v]
    hook_state         S_t, only when asked for           [batch, pos, head, d_k, d_v]
    hook_read          o_t = S_t^T q_t                    [batch, pos, head, d_v]
    hook_z             just before W_O                    [batch, pos, head, d_v]

A `WriteEdit` acts before hook_write_key and hook_write_value fire, so they show what is written; a `StateEdit` acts before
hook_state fires. With reading "cache" both act after hook_read, so that these hooks show what is native. A function on
hook_state that may edit is called token by token, and what it returns is carried on; one marked `reads_only` gets all
tokens at once.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hooked_recurrent.config import MixerConfig
from hooked_recurrent.edits import Edit, Stage, apply_edits
from hooked_recurrent.factors import Factors, Read, picked
from hooked_recurrent.hooks import Clock, RecurrentHookPoint
from hooked_recurrent.scan.dispatch import scan
from hooked_recurrent.scan.edited import edited_scan
from hooked_recurrent.state import LayerState, Shapes


@dataclass
class Call:
    """What a forward call tells its layers."""

    clock: Clock
    """The absolute positions of the call."""
    edits: tuple[Edit, ...] = ()
    """Edits of every layer."""
    stops: tuple[int, ...] = ()
    """Lengths (in tokens of this call) after which each layer's state is wanted; none where no state is."""
    rows: int | None = None
    """Into how many rows the entering layer fans out its one, behind its projections; None for no fan."""
    at: Int[Tensor, "rows some"] | None = None
    """Per row the positions at which the block now running, the last one, is asked for anything; None for all."""
    backend: str = "auto"
    """Which scan runs."""
    shared: dict[str, Tensor] = field(default_factory=dict)
    """What a layer leaves for the layers above it, per position of this call (RWKV-7: the values of its layer 0)."""
    added_writes: dict[int, Factors] = field(default_factory=dict)
    """Filled in: per layer, the further write terms that `add` edits made."""
    dense_layers: list[int] = field(default_factory=list)
    """Filled in: layers whose writes a function on hook_write may have replaced by matrices."""
    stepped_layers: list[int] = field(default_factory=list)
    """Filled in: layers whose states a function on hook_state may have replaced."""

    def edits_of(self, layer: int, *stages: Stage) -> list[Any]:
        """The edits of a layer that act in these stages, in the order given."""
        return [edit for edit in self.edits if edit.layer == layer and edit.stage in stages]


class RecurrentMixer(nn.Module, ABC):
    """Base of every rule's mixer. `erases` says whether hook_erase and hook_probe exist."""

    Config: ClassVar[type[MixerConfig]]
    """The rule's config class, which also names the rule."""
    erases: bool = True
    cfg: MixerConfig
    out: nn.Linear
    """The output projection over all heads; a rule makes it."""

    def __init__(self, cfg: MixerConfig, d_model: int, layer: int):
        super().__init__()
        self.cfg, self.d_model, self.layer = cfg, d_model, layer
        self.hook_log_decay, self.hook_query = RecurrentHookPoint(), RecurrentHookPoint()
        if self.erases:
            self.hook_erase, self.hook_probe = RecurrentHookPoint(), RecurrentHookPoint()
        self.hook_write_key, self.hook_write_value = RecurrentHookPoint(), RecurrentHookPoint()
        self.hook_write, self.hook_state = RecurrentHookPoint(), RecurrentHookPoint()
        self.hook_read, self.hook_z = RecurrentHookPoint(), RecurrentHookPoint()

    @abstractmethod
    def project(
        self, x: Float[Tensor, "batch pos d_model"], state: LayerState, call: Call
    ) -> tuple[Factors, Any, list[LayerState]]:
        """x to (factors, whatever `read_out` needs besides the read, per stop of `call.stops` the state around the matrix)."""

    @abstractmethod
    def read_out(self, read: Float[Tensor, "batch pos head d_v"], beside: Any) -> Float[Tensor, "batch pos head d_v"]:
        """The read to z, just before W_O."""

    def remembers(self) -> Shapes:
        """What the state of this layer holds; a rule adds its tails to the matrix memory."""
        return {"matrix": (self.cfg.n_heads, self.cfg.d_k, self.cfg.d_v)}

    @staticmethod
    def heads(x: Float[Tensor, "batch pos channel"], width: int) -> Float[Tensor, "batch pos head width"]:
        """Channels to heads of this width."""
        return x.view(*x.shape[:-1], x.shape[-1] // width, width)

    @staticmethod
    def per_value_head(
        x: Float[Tensor, "batch pos key_head d_k"], repeats: int
    ) -> Float[Tensor, "batch pos head d_k"]:
        """Each key head once per value head that shares it; a view where one serves all (hooks that edit get a copy)."""
        return x[:, :, :, None].expand(-1, -1, -1, repeats, -1).flatten(2, 3)

    @property
    def W_O(self) -> Float[Tensor, "head d_v d_model"]:
        """The output projection per head."""
        return self.out.weight.T.unflatten(0, (self.cfg.n_heads, self.cfg.d_v))

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], state: LayerState, call: Call
    ) -> tuple[Float[Tensor, "rows some d_model"], list[LayerState]]:
        """The mixer's contribution to the residual stream, and its state after each of `call.stops`."""
        factors, beside, around = self.project(x, state, call)
        if call.rows is not None:
            matrices: list[Tensor] = []
            read = self._fanned_out(factors, state.matrix, call)
            beside = tree_map_only(Tensor, lambda tensor: tensor.expand(len(read), *tensor.shape[1:]), beside)
            call.rows = None  # the layers above find the rows in the residual stream
        else:
            factors, writes = self._hook_factors(factors, call)
            read, matrices = self._scan(factors, writes, state.matrix, call)
        if call.at is not None:
            pick = partial(picked, at=call.at)
            read, beside = pick(read), tree_map_only(Tensor, pick, beside)
        z = self.hook_z(self.read_out(self.hook_read(read), beside))
        states = [replace(tails, matrix=matrix) for tails, matrix in zip(around, matrices, strict=True)]
        return self.out(z.flatten(2)), states

    def _fanned_out(self, native: Factors, matrix: Tensor | None, call: Call) -> Read:
        """What the rows of a fan read: one row's reads for all, but in the heads that are edited."""
        read, _ = scan(native, matrix, backend=call.backend, want_state=False)
        on_writes, on_states = call.edits_of(self.layer, "write"), call.edits_of(self.layer, "state", "carried")
        heads = sorted({edit.head for edit in (*on_writes, *on_states)})
        read = read.expand(call.rows, *read.shape[1:])
        if not heads:
            return read
        read = read.clone()
        factors = native.map(lambda tensor: tensor[:, :, heads].expand(call.rows, *tensor[:, :, heads].shape[1:]))
        on_writes, on_states = ([replace(e, head=heads.index(e.head)) for e in edits] for edits in (on_writes, on_states))
        factors, added = apply_edits(factors, on_writes, call.clock.positions)
        before = None if matrix is None else matrix[:, heads]
        factors, positions = factors.with_terms(added), call.clock.positions
        edited = edited_scan(factors, before, on_states, positions, backend=call.backend, want_state=False)
        read[:, :, heads] = edited.read
        return read

    def _hook_factors(self, native: Factors, call: Call) -> tuple[Factors, Tensor | None]:
        """Edit and hook the six roles; also the write matrices, if a function may have changed them."""
        edits = call.edits_of(self.layer, "write")
        factors, added = apply_edits(native, edits, call.clock.positions) if edits else (native, None)
        untied = added is not None or self.hook_write_key.may_edit
        if self.erases:
            untied = untied or self.hook_erase.may_edit or self.hook_probe.may_edit
        if untied:
            factors = factors.decoupled()
        log_decay = self.hook_log_decay(factors.log_decay)
        if self.erases and (factors.erase is not None or self.hook_erase.in_use or self.hook_probe.in_use):
            apart = factors.decoupled()
            erase, probe = self.hook_erase(apart.erase), self.hook_probe(apart.probe)
            if factors.erase is not None:
                factors = replace(factors, erase=erase, probe=probe)
        key, value = self.hook_write_key(factors.write_key), self.hook_write_value(factors.write_value)
        if added is not None:
            call.added_writes[self.layer] = added
        query = self.hook_query(factors.query)
        factors = replace(factors, log_decay=log_decay, write_key=key, write_value=value, query=query).with_terms(added)
        if not self.hook_write.in_use:
            return factors, None
        writes = self.hook_write(factors.write_matrix())
        if not self.hook_write.may_edit:
            return factors, None
        if self.hook_write.has_editor:
            call.dense_layers.append(self.layer)
        return factors, writes

    def _scan(
        self, factors: Factors, writes: Tensor | None, matrix: Tensor | None, call: Call
    ) -> tuple[Tensor, list[Tensor]]:
        """Scan stretch by stretch between the stops; returns the read and the matrix at every stop, the last one included."""
        seen: list[Tensor] = []
        on_state = self._state_hook(call, seen) if self.hook_state.in_use else None
        edits, positions = call.edits_of(self.layer, "state", "carried"), call.clock.positions
        reads, matrices, start = [], [], 0
        for stop in dict.fromkeys([*call.stops, factors.length]):
            wanted = stop in call.stops
            if stop > start:
                stretch = slice(start, stop)
                hook = None if on_state is None else (lambda s, index, first=start: on_state(s, first + index))
                dense = None if writes is None else writes[:, stretch]
                read, _, matrix = edited_scan(
                    factors.at(stretch),
                    matrix,
                    edits,
                    positions[stretch],
                    writes=dense,
                    on_state=hook,
                    backend=call.backend,
                    want_state=wanted,
                )
                reads.append(read)
            elif matrix is None:
                matrix = factors.zero_state()
            if wanted:
                matrices.append(matrix)
            start = stop
        if seen:
            self.hook_state(torch.cat(seen, dim=1))
        return (reads[0] if len(reads) == 1 else torch.cat(reads, dim=1)), matrices

    def _state_hook(self, call: Call, seen: list[Tensor]):
        """Per-token calls of hook_state if a function may edit; else collect every state for one call at the end."""
        whole = call.clock.positions

        def edit(state: Tensor, index: int) -> Tensor:
            call.clock.positions = whole[index : index + 1]
            try:
                return self.hook_state(state)
            finally:
                call.clock.positions = whole

        def collect(state: Tensor, index: int) -> Tensor:
            seen.append(state)
            return state

        if not self.hook_state.may_edit:
            return collect
        if self.hook_state.has_editor:
            call.stepped_layers.append(self.layer)
        return edit
