"""run_with_cache: one run whose activations are kept, and one backward pass whose gradients are."""

import inspect
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from hooked_recurrent.cache import RecurrentCache
from hooked_recurrent.cache.backward import off_the_graph, run_backward, weights_apart
from hooked_recurrent.cache.saving import Indices, Kept, Recorder, cache_filter
from hooked_recurrent.config import refuse_unknown
from hooked_recurrent.state import RecurrentState
from hooked_recurrent.validation import check_stop


class CachingMixin:
    """Gives a model `run_with_cache`."""

    def run_with_cache(
        self: Any,
        *model_args: Any,
        names_filter: Callable[[str], bool] | Iterable[str] | str | None = None,
        positions: Indices = None,
        heads: Indices = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        metric: Callable[[Any], Tensor] | None = None,
        return_cache_object: bool = True,
        **model_kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run and keep activations, as in transformer_lens, together with any attached or editing hooks.

        hook_write and hook_state are matrices per token, so only a filter that names them keeps them; the cache gives
        single writes and states on demand: `cache.write(layer, head, pos)`, `cache.state(layer, head, pos)`. After
        `incl_bwd` it also gives the gradient with respect to every write: `cache.write_grad`, `cache.write_effect`.

        Args:
            names_filter: a hook name, several, a predicate, or None for all but the two matrix hooks.
            positions: absolute positions to keep, one, a slice or several; None keeps all. The pos axis stays, in ascending
                order, and `cache.positions` names them. Attention scores and patterns keep these query positions.
            heads: heads to keep of the recurrent mixers' hooks (a softmax layer's hooks have heads of their own and keep
                them all), one, a slice or several; None keeps all. The head axis stays, ascending, and `cache.heads` names
                them.
            device, dtype: where to keep the activations, and as what floats.
            remove_batch_dim: drop a batch axis of size 1.
            incl_bwd: also run backward, and keep of every kept activation the gradient as name + "_grad". Unlike in
                transformer_lens it works with frozen weights and inside torch.no_grad, leaves the weights' own .grad
                alone, takes a `state` as constants, and gives an output that is cut from the graph.
            metric: a function from the model's output (without its state) to the scalar that is differentiated; None
                differentiates the output itself, so return_type="loss", or the loss of "both".
            model_args, model_kwargs: as in `forward`, stop_at_layer for instance.

        Raises:
            KeyError, IndexError, TypeError, ValueError: for names, positions or heads that this run does not have, and for
                a scalar that is none.
        """
        own = list(inspect.signature(CachingMixin.run_with_cache).parameters)[2:-1]
        taken = inspect.signature(self.forward).parameters
        if not any(one.kind is one.VAR_KEYWORD for one in taken.values()):  # a forward of one's own may take any
            refuse_unknown("run_with_cache", model_kwargs, (*own, *taken))
        state, stop = model_kwargs.get("state"), model_kwargs.get("stop_at_layer")
        tokens = self._tokens(model_args[0] if model_args else model_kwargs.pop("input", None))
        if remove_batch_dim and not return_cache_object:
            raise ValueError("remove_batch_dim needs return_cache_object=True")
        if remove_batch_dim and tokens.shape[0] != 1:
            raise ValueError(f"remove_batch_dim needs one sequence, got a batch of {tokens.shape[0]}")
        if metric is not None and not incl_bwd:
            raise ValueError("metric is what incl_bwd differentiates: give incl_bwd=True as well")
        chosen, start = cache_filter(names_filter, self._hooks_below(stop)), getattr(state, "position", 0)
        kept = Kept.of(start, tokens.shape[1], self.cfg.n_heads, positions, heads, device, dtype)
        recorder = Recorder(chosen, kept, incl_bwd, self.clock.depth + 1)
        if incl_bwd and isinstance(state, RecurrentState):
            model_kwargs["state"] = state.detach()
        forward, backward = recorder.hooks()
        with self.hooks(fwd_hooks=forward, bwd_hooks=backward), weights_apart(self) if incl_bwd else nullcontext():
            output = self(tokens, *model_args[1:], **model_kwargs)
            edited = [layer for layer in self.cfg.recurrent_layers if self.blocks[layer].mixer.hook_read.has_editor]
            if incl_bwd:
                run_backward(output[0] if model_kwargs.get("return_state") else output, metric)
                output = off_the_graph(output)
        tensors = recorder.tensors()
        if not return_cache_object:
            return output, tensors
        cache = RecurrentCache(tensors, self, self.last_call, state, kept, frozenset(edited))
        return output, cache.remove_batch_dim() if remove_batch_dim else cache

    def _hooks_below(self: Any, stop: int | None) -> list[str]:
        """The hooks that a run can fire, which ends below layer `stop`."""
        names = list(self.hook_dict)
        if stop is None:
            return names
        last = check_stop(stop, self.cfg.n_layers)
        above = tuple(["ln_final.", *(f"blocks.{layer}." for layer in range(last, self.cfg.n_layers))])
        return [name for name in names if not name.startswith(above)]
