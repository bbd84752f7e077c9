"""HookedRecurrentModel: embed, blocks, unembed, with transformer_lens's calls and a state that can be passed on.

    logits = model(tokens)                                        [batch, pos, d_vocab]
    logits, state = model(tokens, return_state=True)              and model(more, state=state) goes on from there
    logits, cache = model.run_with_cache(tokens)
    logits = model.run_with_hooks(tokens, fwd_hooks=[(name, function)], edits=[WriteEdit(...)])  also StateEdit, ActivationEdit
    out = model.generate(tokens, max_new_tokens=20, fwd_hooks=[...], edits=[...])

Step equivalence: for any edits, and any hook functions of absolute positions, one call, any split into calls that pass the
state on, and token by token give the same logits, caches and final state up to rounding.
"""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from hooked_recurrent.block import Block
from hooked_recurrent.cache import RecurrentCache, cache_filter, join_pieces, saving_hooks
from hooked_recurrent.compat import HookedRootModule
from hooked_recurrent.config import ModelConfig
from hooked_recurrent.edits import Edit, attached
from hooked_recurrent.factors import state_dtype
from hooked_recurrent.generation import GenerationMixin
from hooked_recurrent.hooks import Clock, RecurrentHookPoint
from hooked_recurrent.layers.norm import make_norm
from hooked_recurrent.mixers.base import Call
from hooked_recurrent.state import LayerState, RecurrentState
from hooked_recurrent.text import TextMixin
from hooked_recurrent.validation import check_edits, check_finite, check_state, check_tokens

RETURN_TYPES = ("logits", "loss", "both", None)
INIT_STD = 0.02


class HookedRecurrentModel(TextMixin, GenerationMixin, HookedRootModule):
    """A recurrent language model, every rank-1 write of which can be seen and changed. See the module docstring."""

    def __init__(self, cfg: ModelConfig, tokenizer: Any = None):
        super().__init__()
        self.cfg, self.tokenizer = cfg, tokenizer
        self.embed = nn.Embedding(cfg.d_vocab, cfg.d_model)
        self.hook_embed = RecurrentHookPoint()
        self.ln_embed = make_norm(cfg) if cfg.embed_norm else None
        self.blocks = nn.ModuleList([Block(cfg, layer) for layer in range(cfg.n_layers)])
        self.ln_final = make_norm(cfg)
        self.unembed = None if cfg.tied_embeddings else nn.Linear(cfg.d_model, cfg.d_vocab, bias=False)
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
        return (self.embed if self.unembed is None else self.unembed).weight.T

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
        backend: str = "auto",
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
            backend: which scan, "auto", "step" or "chunked".

        Raises:
            ValueError, IndexError: for tokens, states or edits that do not fit the model, and for NaN or Inf (naming the
                first hook and position that has them).
        """
        if return_type not in RETURN_TYPES:
            raise ValueError(f"unknown return_type {return_type!r}; expected one of {RETURN_TYPES}")
        tokens = self._tokens(input)
        whole_text = state is None and not return_state
        stops, unembed = (tokens.shape[1],), return_type is not None
        logits, states = self._run(tokens, state, check_edits(edits), stops, backend, whole_text, unembed)
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
        _, states = self._run(tokens, state, check_edits(edits), stops, "auto", False, unembed=False)
        return {taken.position: taken for taken in states if taken.position in wanted}

    def _tokens(self, input: Any) -> Tensor:
        texts = input if isinstance(input, list) and input else [input]
        tokens = self.to_tokens(input) if all(isinstance(text, str) for text in texts) else input
        return check_tokens(tokens, self.cfg.d_vocab).to(self.device)

    def _run(
        self,
        tokens: Tensor,
        state: RecurrentState | None,
        edits: tuple[Edit, ...],
        stops: tuple[int, ...],
        backend: str,
        whole_text: bool,
        unembed: bool,
    ) -> tuple[Tensor, list[RecurrentState]]:
        """Logits (or without `unembed` what they are made of), and the state after each of `stops` tokens."""
        if state is None:
            state = RecurrentState(tuple(LayerState() for _ in self.blocks))
        check_state(state, list(self.blocks), tokens.shape[0])
        for edit in edits:
            edit.check(self, tokens.shape[1] if whole_text else None)
        call = Call(self.clock, edits, stops, backend)
        with self.clock.running(state.position, tokens.shape[1]), attached(self, edits):
            resid = self.embed(tokens)
            resid = self.hook_embed(resid if self.ln_embed is None else self.ln_embed(resid))
            if self.cfg.residual_in_fp32:
                resid = resid.to(state_dtype(resid.dtype))
            final, per_layer = self._through(resid, state, call, 0, unembed)
        check_finite(self, final, tokens, state, edits)
        self.last_call = call
        ends = [state.position + stop for stop in stops]
        states = [RecurrentState(layers, end) for layers, end in zip(zip(*per_layer, strict=True), ends, strict=True)]
        return final, states

    def _through(
        self, resid: Tensor, state: RecurrentState, call: Call, first: int, unembed: bool
    ) -> tuple[Tensor, list[list[LayerState]]]:
        """The blocks from `first` on, the last norm and the unembedding; and the states of these blocks."""
        per_layer = []
        for block, layer_state in zip(list(self.blocks)[first:], state.layers[first:], strict=True):
            resid, layer_states = block(resid, layer_state, call)
            per_layer.append(layer_states)
        final = self.ln_final(resid)
        return (nn.functional.linear(final, self.W_U.T) if unembed else final), per_layer

    def run_from(
        self,
        layer: int,
        resid: Float[Tensor, "batch pos d_model"],
        state: RecurrentState,
        *,
        shared: Mapping[str, Tensor] | None = None,
        edits: Iterable[Edit] = (),
        backend: str = "auto",
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of a run that enters at a layer, for an intervention that leaves everything below as it was.

        Args:
            layer: the first block that runs; the hooks of this and the later ones fire.
            resid: what its hook_resid_pre shows at these positions.
            state: the state before them; what it holds of the layers below is not looked at.
            shared: what earlier layers leave for later ones at these positions (`model.last_call.shared` of a plain pass).
            edits: as in `forward`, none of them below `layer`.

        Raises:
            ValueError, IndexError: for a layer, state or edit that does not fit, and for NaN or Inf in the logits.
        """
        if not 0 <= layer < self.cfg.n_layers:
            raise IndexError(f"layer {layer} is out of range: the model has layers 0 to {self.cfg.n_layers - 1}")
        checked = check_edits(edits)
        for edit in checked:
            edit.check(self, None)
            if edit.below(layer):
                raise ValueError(f"the edit at {edit.where} lies below layer {layer}, where this run enters")
        below = (LayerState(),) * layer
        state = RecurrentState((*below, *state.layers[layer:]), state.position)
        check_state(state, list(self.blocks), resid.shape[0])
        call = Call(self.clock, checked, (resid.shape[1],), backend, dict(shared or {}))
        with self.clock.running(state.position, resid.shape[1]), attached(self, checked):
            logits, _ = self._through(resid, state, call, layer, unembed=True)
        if not torch.isfinite(logits.detach().sum(dtype=torch.float64)):
            raise ValueError(
                f"NaN or Inf in the logits of a run that entered at layer {layer}, position {state.position}"
            )
        return logits

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: Callable[[str], bool] | Iterable[str] | str | None = None,
        device: str | torch.device | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        return_cache_object: bool = True,
        **model_kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run and keep activations, as in transformer_lens, together with any attached or editing hooks.

        hook_write and hook_state are matrices per token, so only a filter that names them keeps them; the cache gives
        single writes and states on demand: `cache.write(layer, head, pos)`, `cache.state(layer, head, pos)`.

        Args:
            names_filter: a hook name, several, a predicate, or None for all but the two matrix hooks.
            device: where to keep the activations.
            remove_batch_dim: drop a batch axis of size 1.
            incl_bwd: also run backward from the (scalar) output and keep gradients as name + "_grad".
        """
        chosen = cache_filter(names_filter, list(self.hook_dict))
        if not return_cache_object and remove_batch_dim:
            raise ValueError("remove_batch_dim needs return_cache_object=True")
        pieces: dict[str, list[Tensor]] = {}
        forward, backward = saving_hooks(chosen, pieces, device, incl_bwd, self.clock.depth + 1)
        with self.hooks(fwd_hooks=forward, bwd_hooks=backward):
            output = self(*model_args, **model_kwargs)
            if incl_bwd:
                output.backward()
        tensors = join_pieces(pieces)
        if not return_cache_object:
            return output, tensors
        cache = RecurrentCache(tensors, self, self.last_call, model_kwargs.get("state"))
        batch = {tensor.shape[0] for tensor in tensors.values()} - {1}
        if remove_batch_dim and batch:
            raise ValueError(f"remove_batch_dim needs one sequence, got a batch of {batch.pop()}")
        return output, cache.remove_batch_dim() if remove_batch_dim else cache

    def add_hook(self, name: str | Callable[[str], bool], hook: Callable, *args: Any, **kwargs: Any) -> None:
        """As in transformer_lens; an unknown name is answered with the nearest ones."""
        super().add_hook(self.checked_hook_name(name), hook, *args, **kwargs)

    def _enable_hook(self, name: Any, hook: Callable, dir: Any) -> None:
        super()._enable_hook(self.checked_hook_name(name), hook, dir)

    def checked_hook_name(self, name: Any) -> Any:
        """The name itself if it is a hook of this model (or a predicate); else `KeyError` with the nearest names."""
        if callable(name) or name in self.hook_dict:
            return name
        near = get_close_matches(str(name), list(self.hook_dict), n=3)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "; model.hook_dict lists them all"
        raise KeyError(f"this model has no hook {name!r}{hint}")

    def parameter_count(self) -> int:
        """Number of weights, a tied matrix counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"], per_token: bool = False
) -> Float[Tensor, "*shape"]:
    """Cross-entropy in nats of each next token: the mean, or [batch, pos - 1]."""
    if tokens.shape[1] < 2:
        raise ValueError("a loss needs at least two tokens")
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return loss.unflatten(0, (tokens.shape[0], -1)) if per_token else loss.mean()
