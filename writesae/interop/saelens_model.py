"""One head of one hook of our models, as SAELens expects activations: [batch, pos, d_in].

SAELens's trainer takes a HookedRecurrentModel as its `override_model` as it is, and `hook_head_index` cuts the head out of a
vector hook. Two things it cannot do by itself: read matrices (hook_write, hook_state), and put a reconstruction back into
one head of a hook that is not called hook_q, hook_k, hook_v or hook_z, which its evaluations do. A `HeadView` does both: it
shows the one hook flattened, key-first and row after row, and takes what is put there back to its shape.
"""

from collections.abc import Callable, Iterable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel


class HeadView:
    """A model whose hook `hook` holds head `head` alone, flattened; everything else is the model's own.

    Give it to SAELens as `override_model`, with `hook_head_index=None` and `d_in` the numbers of one head: d_k or d_v for a
    vector, d_k * d_v for a matrix.
    """

    def __init__(self, model: HookedRecurrentModel, hook: str, head: int):
        if hook not in model.hook_dict:
            raise ValueError(f"the model has no hook {hook!r}")
        n_heads = model.cfg.n_heads
        if not 0 <= head < n_heads:
            raise ValueError(f"head must be 0..{n_heads - 1}, got {head}")
        self.model, self.hook, self.head = model, hook, head

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward pass."""
        return self.model(*args, **kwargs)

    def run_with_cache(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The model's, with the hook's activations as [batch, pos, d_in]."""
        names = kwargs.get("names_filter")
        alone = names == self.hook or (isinstance(names, list | tuple) and list(names) == [self.hook])
        if alone:  # keep one head of what may be a matrix per token
            kwargs["heads"] = self.head
        output, cache = self.model.run_with_cache(*args, **kwargs)
        kept = dict(cache.items())
        if self.hook in kept:
            kept[self.hook] = self._view(kept[self.hook], 0 if alone else self.head)
        return output, kept

    def run_with_hooks(
        self, *args: Any, fwd_hooks: Iterable[tuple[Any, Callable[..., Any]]] = (), **kwargs: Any
    ) -> Any:
        """The model's, with functions at the hook seeing and returning [batch, pos, d_in]."""
        hooks = [(name, self._inside(function) if name == self.hook else function) for name, function in fwd_hooks]
        return self.model.run_with_hooks(*args, fwd_hooks=hooks, **kwargs)

    def _view(self, activations: Float[Tensor, "batch pos head *d"], head: int) -> Float[Tensor, "batch pos d_in"]:
        return activations[:, :, head].flatten(2)

    def _inside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def on_one_head(activations: Tensor, hook: Any) -> Tensor | None:
            result = function(self._view(activations, self.head), hook=hook)
            if result is None:
                return None
            whole = activations.clone()
            whole[:, :, self.head] = result.reshape(whole[:, :, self.head].shape)
            return whole

        return on_one_head


def saelens_model(model: HookedRecurrentModel, hook: str, head: int) -> HeadView:
    """A view of the model for SAELens: at `hook`, head `head` alone, as [batch, pos, d_in].

    Raises `ValueError` for a hook that the model has not and a head that is out of range.
    """
    return HeadView(model, hook, head)
