"""Checks at the door of a forward call, and the search for the first hook that turned NaN or Inf."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_recurrent.edits import WriteEdit
from hooked_recurrent.hooks import RecurrentHookPoint, reads_only
from hooked_recurrent.state import RecurrentState

if TYPE_CHECKING:
    from hooked_recurrent.model import HookedRecurrentModel


def check_tokens(tokens: Any, d_vocab: int) -> Int[Tensor, "batch pos"]:
    """Integer tokens [batch, pos] within the vocabulary, with a batch axis added to [pos]; else one clear error."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"expected text or a tensor of tokens, got {type(tokens).__name__}")
    if tokens.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(f"tokens must be integers, got {tokens.dtype}")
    if tokens.ndim not in (1, 2) or tokens.numel() == 0:
        raise ValueError(f"tokens must be [batch, pos] with at least one token, got shape {tuple(tokens.shape)}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= d_vocab:
        raise IndexError(f"token {low if low < 0 else high} is out of range: the vocabulary has {d_vocab} tokens")
    return (tokens[None] if tokens.ndim == 1 else tokens).long()


def check_state(state: RecurrentState, n_layers: int, batch: int) -> None:
    """A state must come from a model with as many layers and hold as many sequences as the tokens."""
    if len(state.layers) != n_layers:
        raise ValueError(f"the state has {len(state.layers)} layers, the model {n_layers}")
    if state.batch_size not in (None, batch):
        raise ValueError(f"the state holds {state.batch_size} sequences, the tokens {batch}; fork or index the state")


def check_finite(
    model: "HookedRecurrentModel",
    logits: Tensor,
    tokens: Tensor,
    state: RecurrentState,
    edits: tuple[WriteEdit, ...],
) -> None:
    """Raise if the logits hold NaN or Inf, naming the first hook and position that did.

    The sum is one cheap pass; only when it is not finite is the call run again with a look at every hook.
    """
    if torch.isfinite(logits.detach().sum(dtype=torch.float64)) or getattr(model, "_locating", False):
        return
    found: list[str] = []

    @reads_only
    def look(tensor: Tensor, hook: RecurrentHookPoint) -> None:
        bad = ~torch.isfinite(tensor)
        if hook.name is None or hook.name.endswith("hook_attn_scores") or found or not bad.any():
            return
        row, place = bad.flatten(2).any(-1).nonzero()[0].tolist()
        kind = "NaN" if torch.isnan(tensor).any() else "Inf"
        found.append(f"{kind} in {hook.name} at position {int(hook.positions[place])} of batch row {row}")

    names = [name for name in model.hook_dict if not name.endswith(("hook_write", "hook_state"))]
    model._locating = True
    try:
        with torch.no_grad(), model.hooks(fwd_hooks=[(name, look) for name in names]):
            model(tokens, return_type=None, state=state, return_state=True, edits=edits)
    finally:
        model._locating = False
    raise ValueError(found[0] if found else "NaN or Inf in the logits, though in no hook before them")
