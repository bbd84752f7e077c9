"""HookedRecurrentModel: embed, blocks, unembed, with transformer_lens's calls and a state that can be passed on.

    logits = model(tokens)                                        [batch, pos, d_vocab]
    logits, state = model(tokens, return_state=True)              and model(more, state=state) goes on from there
    logits, cache = model.run_with_cache(tokens)
    logits = model.run_with_hooks(tokens, fwd_hooks=[(name, function)], edits=[WriteEdit(...)])  also StateEdit, ActivationEdit
    out = model.generate(tokens, max_new_tokens=20, fwd_hooks=[...], edits=[...])

Step equivalence: for any edits, and any hook functions of absolute positions, one call, any split into calls that pass the
state on, and token by token give the same logits, caches and final state up to rounding.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from hooked_recurrent.block import Block
from hooked_recurrent.cache.run_with_cache import CachingMixin
from hooked_recurrent.compat import HookedRootModule
from hooked_recurrent.compat.directions import DirectionsMixin, TiedUnembed
from hooked_recurrent.compat.names import first_name, unknown_hook
from hooked_recurrent.config import ModelConfig, refuse_unknown
from hooked_recurrent.display.model import ShownModel
from hooked_recurrent.edits import Edit, attached
from hooked_recurrent.factors import picked, state_dtype
from hooked_recurrent.generation import GenerationMixin
from hooked_recurrent.hooks import Clock, RecurrentHookPoint, check_pairs, in_use
from hooked_recurrent.layers.linear import Linear, linear
from hooked_recurrent.layers.norm import make_norm
from hooked_recurrent.mixers.base import Call
from hooked_recurrent.state import LayerState, RecurrentState
from hooked_recurrent.text import TextMixin
from hooked_recurrent.validation import check_edits, check_entry, check_finite, check_state, check_stop, check_tokens

RETURN_TYPES = ("logits", "loss", "both", None)
INIT_STD = 0.02


class HookedRecurrentModel(ShownModel, TextMixin, GenerationMixin, CachingMixin, DirectionsMixin, HookedRootModule):
    """A recurrent language model, every rank-1 write of which can be seen and changed. See the module docstring."""

    def __init__(self, cfg: ModelConfig, tokenizer: Any = None):
        super().__init__()
        self.cfg, self.tokenizer = cfg, tokenizer
        self.embed = nn.Embedding(cfg.d_vocab, cfg.d_model)
        self.hook_embed = RecurrentHookPoint()
        self.ln_embed = make_norm(cfg) if cfg.embed_norm else None
        self.blocks = nn.ModuleList([Block(cfg, layer) for layer in range(cfg.n_layers)])
        self.ln_final = make_norm(cfg)
        untied = not cfg.tied_embeddings
        self.unembed = Linear(cfg.d_model, cfg.d_vocab, bias=False) if untied else TiedUnembed(self.embed)
        self.clock = Clock()
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, RecurrentHookPoint):
                module.clock = self.clock
        self.setup()

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> "HookedRecurrentModel":
        """Load a bundled model, a local folder (transformers' layout, or state-spaces/mamba's for Mamba-2), RWKV-LM's .pth
        file of an RWKV-7, or a hub model.

        See `loading.load`.
        """
        from hooked_recurrent.loading.load import load_pretrained

        return load_pretrained(name, dtype=dtype, device=device)

    @classmethod
    def from_hf(cls, hf_model: nn.Module, tokenizer: Any = None) -> "HookedRecurrentModel":
        """Convert a transformers model in memory; its weights are copied."""
        from hooked_recurrent.loading.load import load_from_hf

        return load_from_hf(hf_model, tokenizer=tokenizer)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config.json, model.safetensors and the tokenizer in transformers' layout, so that both libraries load it."""
        from hooked_recurrent.loading.load import save_pretrained

        return save_pretrained(self, Path(folder))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.embed.weight.dtype

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The embedding."""
        return self.embed.weight

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding."""
        return self.unembed.weight.T

    @property
    def W_O(self) -> Float[Tensor, "layer head d_v d_model"]:
        """The output projections of all layers; a hybrid's differ in shape: take `model.blocks[l].W_O` there."""
        if len({tuple(block.W_O.shape) for block in self.blocks}) != 1:
            raise ValueError("the layers' W_O differ in shape, so they do not stack: take model.blocks[layer].W_O")
        return torch.stack([block.W_O for block in self.blocks])

    def forward(
        self,
        input: Integer[Tensor, "batch pos"] | Integer[Tensor, "pos"] | str | list[str],
        return_type: str | None = "logits",
        *,
        state: RecurrentState | None = None,
        return_state: bool = False,
        edits: Iterable[Edit] = (),
        loss_per_token: bool = False,
        backend: str | None = None,
        stop_at_layer: int | None = None,
        last_only: bool = False,
        prepend_bos: bool | None = None,
    ) -> Any:
        """Run the model.

        Args:
            input: tokens, or text if the model has a tokenizer.
            return_type: "logits" [batch, pos, d_vocab], "loss" (mean next-token cross-entropy in nats; [batch, pos - 1] with
                loss_per_token), "both" as a tuple, or None.
            state: where to go on from; None starts afresh.
            return_state: return (output, state after the last token).
            edits: changes to writes, states or activations, at absolute positions. With `state` or `return_state`, positions
                outside this call are left to the other calls; without, they are an error.
            backend: which scan, "auto", "step", "chunked" or "triton"; `cfg.backend` by default.
            stop_at_layer: run the blocks below this one only and return the residual stream [batch, pos, d_model] that it
                would read (hook_resid_post of the one below; for 0, hook_embed). Negative ones count from the end; the
                number of layers runs all blocks. It goes with return_type "logits" (the default, which then gives the
                residual stream) or None, and makes no state.
            last_only: unembed the last position alone: logits [batch, 1, d_vocab]. Every hook still sees every position.
            prepend_bos: of text, as in `to_tokens`; tokens stay as they are.

        Raises:
            ValueError, IndexError: for tokens, states or edits that do not fit the model, and for NaN or Inf (naming the
                first hook and position that has them).
        """
        if return_type not in RETURN_TYPES:
            raise ValueError(f"unknown return_type {return_type!r}; expected one of {RETURN_TYPES}")
        if last_only and return_type in ("loss", "both"):
            raise ValueError(f"last_only keeps no logits to make a loss of, but return_type is {return_type!r}")
        tokens, edits = self._tokens(input, prepend_bos), check_edits(edits)
        last = None
        if stop_at_layer is not None:
            last = check_stop(stop_at_layer, self.cfg.n_layers, edits, return_type, return_state)
        whole_text = state is None and not return_state
        stops = (tokens.shape[1],) if return_state else ()
        final, states = self._run(tokens, state, edits, stops, backend, whole_text, last)
        logits = final
        if last is None and return_type is not None:
            logits = linear(final[:, -1:] if last_only else final, self.W_U.T)
            check_finite(self, logits, tokens, state, edits)
        output: Any = None
        if return_type in ("loss", "both"):
            loss = next_token_loss(logits, tokens, loss_per_token)
            output = loss if return_type == "loss" else (logits, loss)
        elif return_type == "logits":
            output = logits
        return (output, states[0]) if return_state else output

    def snapshots(
        self,
        input: Integer[Tensor, "batch pos"] | Integer[Tensor, "pos"] | str | list[str],
        positions: Iterable[int],
        *,
        state: RecurrentState | None = None,
        edits: Iterable[Edit] = (),
    ) -> dict[int, RecurrentState]:
        """States taken on the way through one forward pass: for each absolute position p, the state that reads token p next.

        p runs from the start of the text (or `state.position`) to one past its last token.
        """
        tokens = self._tokens(input)
        start = 0 if state is None else state.position
        wanted = sorted({int(position) for position in positions})
        for position in wanted:
            if not start <= position <= start + tokens.shape[1]:
                raise IndexError(
                    f"snapshot at {position} is out of range: the text spans {start} to {start + tokens.shape[1]}"
                )
        stops = tuple(dict.fromkeys([*(position - start for position in wanted), tokens.shape[1]]))
        _, states = self._run(tokens, state, check_edits(edits), stops, None, False)
        return {taken.position: taken for taken in states if taken.position in wanted}

    def _tokens(self, input: Any, prepend_bos: bool | None = None) -> Tensor:
        texts = input if isinstance(input, list) and input else [input]
        tokens = self.to_tokens(input, prepend_bos) if all(isinstance(text, str) for text in texts) else input
        return check_tokens(tokens, self.cfg.d_vocab).to(self.device)

    def _run(
        self,
        tokens: Tensor,
        state: RecurrentState | None,
        edits: tuple[Edit, ...],
        stops: tuple[int, ...],
        backend: str | None,
        whole_text: bool,
        last: int | None = None,
    ) -> tuple[Tensor, list[RecurrentState]]:
        """What the logits are made of, and the state after each of `stops` tokens.

        With `last`, the residual stream that block `last` would read, and no states.
        """
        if state is None:
            state = RecurrentState(tuple(LayerState() for _ in self.blocks))
        check_state(state, list(self.blocks), tokens.shape[0])
        for edit in edits:
            edit.check(self, tokens.shape[1] if whole_text else None)
        call = Call(self.clock, edits, stops, backend=backend or self.cfg.backend)
        with self.clock.running(state.position, tokens.shape[1]), attached(self, edits):
            resid = self.embed(tokens)
            resid = self.hook_embed(resid if self.ln_embed is None else self.ln_embed(resid))
            if self.cfg.residual_in_fp32:
                resid = resid.to(state_dtype(resid.dtype))
            final, per_layer = self._through(resid, state, call, 0, last)
        check_finite(self, final, tokens, state, edits)
        self.last_call = call
        if last is not None:
            return final, []
        ends = [state.position + stop for stop in stops]
        states = [RecurrentState(layers, end) for layers, end in zip(zip(*per_layer, strict=True), ends, strict=True)]
        return final, states

    def _through(
        self,
        resid: Tensor,
        state: RecurrentState,
        call: Call,
        first: int,
        last: int | None = None,
        at: Int[Tensor, "rows some"] | None = None,
    ) -> tuple[Tensor, list[list[LayerState]]]:
        """The blocks from `first` on (up to `last`, and then nothing more) and the last norm; and these blocks' states.

        `at` says per row at which positions the last block and the last norm are asked for anything.
        """
        per_layer = []
        for block, layer_state in zip(list(self.blocks)[first:last], state.layers[first:last], strict=True):
            call.at = at if block is self.blocks[-1] else None
            resid, layer_states = block(resid, layer_state, call)
            per_layer.append(layer_states)
        return (self.ln_final(resid) if last is None else resid), per_layer

    def run_from(
        self,
        layer: int,
        resid: Float[Tensor, "batch pos d_model"],
        state: RecurrentState,
        *,
        rows: int | None = None,
        shared: Mapping[str, Tensor] | None = None,
        edits: Iterable[Edit] = (),
        at: Int[Tensor, "rows some"] | None = None,
        backend: str | None = None,
    ) -> Float[Tensor, "rows some d_vocab"]:
        """Logits of a run that enters at a layer, for an intervention that leaves everything below as it was.

        Args:
            layer: the first block that runs; the hooks of this and the later ones fire.
            resid: what comes to its hook_resid_pre at these positions; functions attached there still see and may change it.
            state: the state before them; what it holds of the layers below is not looked at.
            rows: run the one row of `resid` and `state` this many times side by side, each with the edits of its row (counted
                in its `batch`). Nothing that rows share is copied, and what the entering layer does before its writes
                is done once, unless a function is attached to that layer's hooks.
            shared: what earlier layers leave for later ones at these positions (`model.last_call.shared` of a plain pass).
            edits: as in `forward`, none of them below `layer`.
            at: per row, which positions of this run are unembedded, counted from its first; all by default.

        Raises:
            ValueError, IndexError: for a layer, input, state, edit or `at` that does not fit, and for NaN or Inf in the logits.
        """
        if not 0 <= layer < self.cfg.n_layers:
            raise IndexError(f"layer {layer} is out of range: the model has layers 0 to {self.cfg.n_layers - 1}")
        checked = check_edits(edits)
        for edit in checked:
            edit.check(self, None)
            if edit.below(layer):
                raise ValueError(f"the edit at {edit.where} lies below layer {layer}, where this run enters")
        check_entry(resid, self.cfg.d_model, rows, at)
        below = (LayerState(),) * layer
        state = RecurrentState((*below, *state.layers[layer:]), state.position)
        check_state(state, list(self.blocks), resid.shape[0])
        call = Call(self.clock, checked, backend=backend or self.cfg.backend, shared=dict(shared or {}))
        with self.clock.running(state.position, resid.shape[1]), attached(self, checked):
            if rows is not None and self.blocks[layer].can_fan_out:
                call.rows = rows
            elif rows is not None:
                resid = resid.expand(rows, -1, -1)
            early = at is not None and self.blocks[-1].can_pick and not in_use(self.ln_final)
            final, _ = self._through(resid, state, call, layer, at=at if early else None)
        if at is not None and not early:
            final = picked(final, at)
        logits = linear(final, self.W_U.T)
        if not torch.isfinite(logits.detach().sum(dtype=torch.float64)):
            raise ValueError(
                f"NaN or Inf in the logits of a run that entered at layer {layer}, position {state.position}"
            )
        return logits

    def add_hook(self, name: str | Callable[[str], bool], hook: Callable, *args: Any, **kwargs: Any) -> None:
        """As in transformer_lens; an unknown name is answered with the nearest ones."""
        super().add_hook(self.checked_hook_name(name), hook, *args, **kwargs)

    def hooks(self, fwd_hooks: Any = (), bwd_hooks: Any = (), *args: Any, **kwargs: Any) -> Any:
        """As in transformer_lens; `TypeError` for what is no list of pairs (name, function)."""
        pairs = check_pairs("fwd_hooks", fwd_hooks), check_pairs("bwd_hooks", bwd_hooks)
        return super().hooks(*pairs, *args, **kwargs)

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformer_lens; `TypeError` for an unknown keyword, with the nearest one."""
        own = ("fwd_hooks", "bwd_hooks", "reset_hooks_end", "clear_contexts")
        refuse_unknown("run_with_hooks", kwargs, (*own, *FORWARD_OPTIONS))
        return super().run_with_hooks(*args, **kwargs)

    def _enable_hook(self, name: Any, hook: Callable, dir: Any) -> None:
        super()._enable_hook(self.checked_hook_name(name), hook, dir)

    def checked_hook_name(self, name: Any) -> Any:
        """The first name of a hook of this model (or a predicate as it is); else `KeyError` with the nearest names."""
        found = name if callable(name) else first_name(str(name), self.hook_dict)
        if found is None:
            raise KeyError(f"this model has {unknown_hook(str(name), self.hook_dict)}")
        return found

    def parameter_count(self) -> int:
        """Number of weights, a tied matrix counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


FORWARD_OPTIONS = tuple(inspect.signature(HookedRecurrentModel.forward).parameters)[1:]
"""What a call of the model takes by name."""


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"], per_token: bool = False
) -> Float[Tensor, "*shape"]:
    """Cross-entropy in nats of each next token: the mean, or [batch, pos - 1]."""
    if tokens.shape[1] < 2:
        raise ValueError("a loss needs at least two tokens")
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return loss.unflatten(0, (tokens.shape[0], -1)) if per_token else loss.mean()
