"""Checks at the door of a forward call, and the search for the first hook that turned NaN or Inf."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_recurrent.block import Block
from hooked_recurrent.edits import Edit
from hooked_recurrent.hooks import RecurrentHookPoint, reads_only
from hooked_recurrent.state import RecurrentState


def check_tokens(tokens: Any, d_vocab: int) -> Int[Tensor, "batch pos"]:
    """Integer tokens [batch, pos] within the vocabulary, with a batch axis added to [pos]; else one clear error."""
    if not isinstance(tokens, Tensor):
        if isinstance(tokens, str):
            raise TypeError("expected a tensor of tokens, got text: model.to_tokens(text) makes one of it")
        what = type(tokens).__name__
        if isinstance(tokens, list):
            what = f"a list of {' and '.join(sorted({type(one).__name__ for one in tokens}) or ['nothing'])}"
        raise TypeError(f"expected text or a tensor of tokens, got {what}")
    if tokens.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(f"tokens must be integers, got {tokens.dtype}")
    if tokens.ndim not in (1, 2) or tokens.numel() == 0:
        raise ValueError(f"tokens must be [batch, pos] with at least one token, got shape {tuple(tokens.shape)}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= d_vocab:
        raise IndexError(f"token {low if low < 0 else high} is out of range: the vocabulary has {d_vocab} tokens")
    return (tokens[None] if tokens.ndim == 1 else tokens).long()


def check_state(state: Any, blocks: Sequence[Block], batch: int) -> None:
    """A state must come from a model with the same layers and hold as many sequences as the tokens."""
    if not isinstance(state, RecurrentState):
        raise TypeError(f"state must be a RecurrentState, got {type(state).__name__}")
    if len(state.layers) != len(blocks):
        raise ValueError(f"the state has {len(state.layers)} layers, the model {len(blocks)}")
    if state.batch_size not in (None, batch):
        raise ValueError(f"the state holds {state.batch_size} sequences, the tokens {batch}; fork or index the state")
    for layer, (entry, block) in enumerate(zip(state.layers, blocks, strict=True)):
        held, wanted = entry.shapes(), block.remembers()
        if held and set(held) != set(wanted):
            came, expected = " and ".join(held), " and ".join(wanted)
            raise ValueError(f"layer {layer} of the state holds {came}, but this layer of the model keeps {expected}")
        for name, shape in held.items():
            fits = len(shape) == len(wanted[name]) and all(
                w in (None, s) for s, w in zip(shape, wanted[name], strict=True)
            )
            if not fits:
                expected = str(wanted[name]).replace("None", "any")
                raise ValueError(f"{name} of layer {layer} of the state has shape {shape}, this layer's is {expected}")


def check_edits(edits: Any) -> tuple[Edit, ...]:
    """Any iterable of edits, as a tuple; anything else is one clear error."""
    if isinstance(edits, Edit):
        raise TypeError(f"edits must be several, got a single {type(edits).__name__}: put it into a list")
    if not isinstance(edits, Iterable):
        raise TypeError(f"edits must be a list of edits, got {type(edits).__name__}: () is none")
    edits = tuple(edits)
    for edit in edits:
        if not isinstance(edit, Edit):
            raise TypeError(f"edits must be WriteEdits, StateEdits or ActivationEdits, got {type(edit).__name__}")
    return edits


def check_entry(resid: Tensor, d_model: int, rows: int | None, at: Tensor | None) -> None:
    """What enters at a layer must be [batch, pos, d_model], one row of it where it fans out, and `at` say where in each row."""
    if resid.ndim != 3 or resid.shape[2] != d_model:
        raise ValueError(f"resid must be [batch, pos, {d_model}], got {tuple(resid.shape)}")
    if rows is not None and resid.shape[0] != 1:
        raise ValueError(f"rows fans out a single row, got a batch of {resid.shape[0]}")
    if at is None:
        return
    count, length = resid.shape[0] if rows is None else rows, resid.shape[1]
    if at.ndim != 2 or at.shape[0] != count:
        raise ValueError(f"at must be [{count}, positions], got {tuple(at.shape)}")
    if at.numel() and not 0 <= int(at.min()) <= int(at.max()) < length:
        raise IndexError(f"at names positions {int(at.min())} to {int(at.max())}, but the run has 0 to {length - 1}")


def check_stop(
    stop_at_layer: int,
    n_layers: int,
    edits: tuple[Edit, ...] = (),
    return_type: str | None = "logits",
    return_state: bool = False,
) -> int:
    """The number of blocks that run below `stop_at_layer`; raises where what is asked for needs more than these."""
    if not isinstance(stop_at_layer, int):
        raise TypeError(f"stop_at_layer must be a layer's number, got {stop_at_layer!r}")
    if not -n_layers <= stop_at_layer <= n_layers:
        raise IndexError(f"stop_at_layer {stop_at_layer} is out of range: the model has {n_layers} layers")
    last = stop_at_layer % n_layers if stop_at_layer < 0 else stop_at_layer
    if return_type not in ("logits", None):
        raise ValueError(f"stop_at_layer returns the residual stream, so there is no return_type {return_type!r}")
    if return_state:
        raise ValueError(
            f"no state can be returned: layers {last} to {n_layers - 1} do not run with this stop_at_layer"
        )
    for edit in edits:
        if not edit.below(last):
            raise ValueError(
                f"the edit at {edit.where} does not run: stop_at_layer={stop_at_layer} ends below layer {last}"
            )
    return last


class NotFiniteError(ValueError):
    """A run came to NaN or Inf; the message names the first hook and position that did."""


def check_finite(
    model: Any,
    logits: Tensor,
    tokens: Tensor,
    state: RecurrentState | None,
    edits: tuple[Edit, ...],
) -> None:
    """Raise `NotFiniteError` if the logits hold NaN or Inf, naming the first hook and position that did.

    The sum is one cheap pass; only when it is not finite is the call run again with a look at every hook.
    """
    if torch.isfinite(logits.detach().sum(dtype=torch.float64)) or getattr(model, "_locating", False):
        return
    found: list[str] = []

    @reads_only
    def look(tensor: Tensor, hook: RecurrentHookPoint) -> None:
        name = str(hook.name)
        # masked scores are -inf by design; scores and patterns have their query positions behind the heads
        bad = torch.isnan(tensor) if name.endswith("hook_attn_scores") else ~torch.isfinite(tensor)
        if found or not bad.any():
            return
        by_position = bad.transpose(1, 2) if name.endswith(("hook_attn_scores", "hook_pattern")) else bad
        row, place = by_position.flatten(2).any(-1).nonzero()[0].tolist()
        kind = "NaN" if torch.isnan(tensor).any() else "Inf"
        found.append(f"{kind} in {name} at position {int(hook.positions[place])} of batch row {row}")

    matrices = ("hook_write", "hook_state")  # looked at only where a function has made them exist
    names = [name for name, point in model.hook_dict.items() if point.in_use or not name.endswith(matrices)]
    model._locating = True
    try:
        with torch.no_grad(), model.hooks(fwd_hooks=[(name, look) for name in names]):
            model(tokens, return_type=None, state=state, return_state=True, edits=edits)
    finally:
        model._locating = False
    raise NotFiniteError(found[0] if found else "NaN or Inf in the logits, though in no hook before them")
