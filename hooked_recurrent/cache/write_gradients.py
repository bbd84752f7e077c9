"""What a cache with gradients tells of the writes: how the loss depends on each, from the factors and hook_read_grad.

Lambda_t [d_k, d_v], the gradient of the loss with respect to the write at t, obeys the recurrence run backward
(`scan.adjoint`). So it is there for every write after one backward pass, is made only where it is asked for, and its product
with a rank-1 write costs what the factors cost.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_recurrent.cache.saving import Index, Indices
from hooked_recurrent.factors import Factors, Read
from hooked_recurrent.scan.adjoint import write_effects, write_gradients

ROLES = ("log_decay", "erase", "probe", "query")


class WriteGradientMixin:
    """Gives a cache `write_grad` and `write_effect`; both need a run with `incl_bwd=True`."""

    def write_grad(self: Any, layer: int, head: Index, pos: Index) -> Float[Tensor, "batch *pos_head d_k d_v"]:
        """Lambda_t, the gradient of what was differentiated with respect to the write at pos: [batch, (pos,) (head,) d_k, d_v].

        head and pos are those of `write`; an int drops its axis. It is recomputed from the factors, for these heads and
        positions only. Edited writes change it only through the model above them: it does not depend on the writes of its
        own head. Changes that functions made to gradients below hook_read are not in it.

        Raises:
            KeyError: activations that the cache lacks, with the call that keeps them.
            ValueError: a layer without matrix memory; one where a function changed states or reads, or an edit the states
                of these or later positions, or whose later positions were not kept.
            IndexError: heads or positions that the cache does not hold.
        """
        factors, read_grad = self._backward_factors(layer)
        heads, places = self.kept.places("head", head), self.kept.places("position", pos)
        some = [heads] if isinstance(heads, int) else heads
        wanted = [places] if isinstance(places, int) else places
        self._need_later_positions(wanted)
        self._need_states_unedited(layer, wanted, some)
        found = write_gradients(factors.map(lambda tensor: tensor[:, :, some]), read_grad[:, :, some], wanted)
        none = factors.zero_state()[:, None, some][:, :0]
        stacked = torch.stack([found[place] for place in wanted], dim=1) if wanted else none
        stacked = stacked[:, 0] if isinstance(places, int) else stacked
        return stacked.select(-3, 0) if isinstance(heads, int) else stacked

    def write_effect(
        self: Any,
        layer: int,
        key: Float[Tensor, "*batch_pos_head d_k"],
        value: Float[Tensor, "*batch_pos_head d_v"],
        heads: Indices = None,
    ) -> Float[Tensor, "batch pos head"]:
        """key^T Lambda_t value at every position: the first-order effect of adding key value^T to the write there.

        At the cost of the factors, without a matrix per position: a scan whose query is the key.

        Args:
            layer: a recurrent layer.
            key: broadcast to [batch, pos, head, d_k] over the positions and heads that are asked for.
            value: broadcast to [batch, pos, head, d_v].
            heads: which of the layer's heads, by their numbers; the axis stays. None is all that the cache holds.

        Raises:
            KeyError, ValueError, IndexError: as `write_grad` does; ValueError also for a key or value that does not fit.
        """
        factors, read_grad = self._backward_factors(layer)
        self._need_later_positions([0])
        places, _ = self.kept.head_places("head", heads)
        self._need_states_unedited(layer, [0], places)
        factors, read_grad = factors.map(lambda tensor: tensor[:, :, places]), read_grad[:, :, places]
        key = _spread("key", key, factors.query)
        return write_effects(factors, read_grad, key, _spread("value", value, read_grad))

    def _need_later_positions(self: Any, places: list[int]) -> None:
        """The gradient of a write gathers what later reads made of it, so all positions from the earliest one on are needed."""
        kept = self.kept
        if places and kept.local[min(places) :] != tuple(range(kept.local[min(places)], kept.length)):
            first = kept.positions[min(places)]
            raise ValueError(
                f"the gradient of the write at position {first} takes all later positions of the call, which were not all "
                f"kept: run_with_cache(..., positions=slice({first}, None)) keeps them"
            )

    def _need_states_unedited(self: Any, layer: int, places: list[int], heads: list[int]) -> None:
        """What an edit leaves of a state is not in the factors; what it adds is a constant, which no gradient sees."""
        numbers = {self.kept.heads[place] for place in heads}
        for edit in self.state_edits(layer):
            later = places and (edit.last_position is None or edit.last_position >= self.positions[min(places)])
            if later and edit.op != "add" and edit.head in numbers:
                name = f"blocks.{layer}.mixer.hook_write"
                raise ValueError(
                    f"{edit} changed states, so the factors do not tell what became of a write: "
                    f"run_with_cache(..., incl_bwd=True, names_filter={name!r}) keeps its gradients, cache[{name + '_grad'!r}]"
                )

    def _backward_factors(self: Any, layer: int) -> tuple[Factors, Read]:
        """The factors of all that is held, with no writes worth looking at, and the gradient of the reads."""
        prefix = f"blocks.{layer}.mixer.hook_"
        self._check_recurrent(layer)
        for changed, what in ((self.stepped_layers, "state"), (self.edited_reads, "read")):
            if layer in changed:
                raise ValueError(
                    f"a function on {prefix}{what} may have changed {what}s, and then no factors tell what became of a "
                    "write: mark it reads_only if it does not"
                )
        names = [f"{prefix}{role}" for role in ROLES if f"{prefix}{role}" in self.model.hook_dict]
        missing = [name for name in [*names, f"{prefix}read_grad"] if name not in self.cache_dict]
        if missing:
            call = f"run_with_cache(..., incl_bwd=True, names_filter={[*names, f'{prefix}read']})"
            raise KeyError(f"the cache lacks {', '.join(missing)}: {call} keeps what it takes")
        roles = {name.removeprefix(prefix): self._role(name) for name in names}
        read_grad = self._role(f"{prefix}read_grad")
        # any write will do: the recurrence run backward does not look at it
        return Factors(**roles, write_key=roles["query"], write_value=read_grad), read_grad


def _spread(name: str, given: Tensor, like: Tensor) -> Tensor:
    """One side of a write over all positions and heads, as dtype and device of the factors have it."""
    try:
        return given.to(like).expand(like.shape)
    except RuntimeError:
        came, expected = tuple(given.shape), tuple(like.shape)
        raise ValueError(
            f"the {name} has shape {came}, which does not broadcast to [batch, pos, head, d] {expected}"
        ) from None
