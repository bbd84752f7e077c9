"""From parts of the residual stream to logits: the norms as they act on a part, and what each part says of a token.

Nothing is folded into W_U here, so `apply_ln` means the norm as it acts on a part of the stream while its scale is held: minus
the part's mean (LayerNorm alone), over the cached scale, times the norm's weight. The norm's bias belongs to no part:
`logit_contributions` lists it by itself, so that its rows add up to the logit.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_recurrent.compat.directions import Tokens
from hooked_recurrent.compat.slices import as_slice

Stack = Float[Tensor, "component *batch_pos d_model"]
Labelled = tuple[Tensor, list[str]]
UNITS = ("component", "head", "neuron")


class LensTools:
    """Mixed into a cache: overrides what transformer_lens's ActivationCache does for folded norms only."""

    model: Any
    has_batch_dim: bool

    def apply_ln_to_stack(
        self: Any,
        residual_stack: Stack,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Float[Tensor, "component *kept d_model"]:
        """A norm applied to parts of its input, its scale held at the cached one (see the module docstring).

        Args:
            residual_stack: the parts, already cut to pos_slice; batch_slice is applied here, as in transformer_lens.
            layer, mlp_input: which norm: ln1 (with mlp_input ln2) of this block; None, -1 or n_layers is ln_final.
            recompute_ln: take each component for a whole stream instead: its own scale, and the norm's bias.
        """
        layer = self._layer(layer, mlp_input)
        batch = as_slice(batch_slice)
        if has_batch_dim:
            residual_stack = batch.apply(residual_stack, dim=1)
        norm, name = self._norm(layer, mlp_input)
        if recompute_ln:
            with torch.set_grad_enabled(residual_stack.requires_grad):
                return norm(residual_stack)
        scale = as_slice(pos_slice).apply(self[f"{name}.hook_scale"], dim=-2)
        if self.has_batch_dim:
            scale = batch.apply(scale, dim=0)
        wide = residual_stack.to(torch.promote_types(residual_stack.dtype, scale.dtype))
        if _centres(norm):
            wide = wide - wide.mean(-1, keepdim=True)
        return wide / scale * _weight(norm).to(wide)

    def logit_attrs(
        self: Any,
        residual_stack: Stack,
        tokens: Tokens,
        incorrect_tokens: Tokens | None = None,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
    ) -> Float[Tensor, "component *kept"]:
        """What each part of the stream adds to a token's logit, or to its lead over `incorrect_tokens`.

        Args:
            residual_stack: parts of the final stream, already cut to pos_slice.
            tokens, incorrect_tokens: one token for everything, one per row [batch], or one per place [batch, pos].
        """
        direction = self._direction(tokens, incorrect_tokens)
        options = {"pos_slice": pos_slice, "batch_slice": batch_slice, "has_batch_dim": has_batch_dim}
        scaled = self.apply_ln_to_stack(residual_stack, -1, **options)
        if direction.ndim == 2 and scaled.ndim == 4:
            direction = direction[:, None]  # a token per row, the same at all its positions
        return (scaled * direction.to(scaled)).sum(-1)

    def logit_contributions(
        self: Any,
        tokens: Tokens,
        incorrect_tokens: Tokens | None = None,
        *,
        unit: str = "component",
        pos_slice: Any = None,
    ) -> tuple[Float[Tensor, "component *batch_pos"], list[str]]:
        """A token's logit (or its lead over another's) as a sum over parts of the stream, with their labels.

        Args:
            tokens, incorrect_tokens: as in `logit_attrs`.
            unit: "component" (embedding, mixers, MLPs), "head" or "neuron" (heads and MLPs or neurons, embedding, biases).
            pos_slice: positions to keep.
        """
        if unit not in UNITS:
            raise ValueError(f"unit must be one of {UNITS}, got {unit!r}")
        if unit == "component":
            stack, labels = self.decompose_resid(pos_slice=pos_slice, return_labels=True)
        else:
            options = {"expand_neurons": unit == "neuron", "pos_slice": pos_slice, "return_labels": True}
            stack, labels = self.get_full_resid_decomposition(**options)
        found = self.logit_attrs(stack, tokens, incorrect_tokens, pos_slice, has_batch_dim=self.has_batch_dim)
        if _centres(self.model.ln_final):
            bias = self._direction(tokens, incorrect_tokens) @ self.model.ln_final.bias.detach()
            if bias.ndim == 1 and found.ndim == 3:
                bias = bias[:, None]
            found = torch.cat([found, bias.to(found).expand(found[:1].shape)])
            labels = [*labels, "ln_final_bias"]
        return found, labels

    def layer_logits(
        self: Any, incl_mid: bool = False, pos_slice: Any = None, return_labels: bool = False
    ) -> Float[Tensor, "component *batch_pos d_vocab"] | Labelled:
        """The logit lens: the stream before the first layer and after each, through ln_final and W_U; the last are the logits.

        (nostalgebraist 2020, "interpreting GPT: the logit lens".) transformer_lens 4 also has its own, `cache.logit_lens`.
        """
        stack, labels = self.accumulated_resid(None, incl_mid, pos_slice=pos_slice, return_labels=True)
        with torch.no_grad():
            logits = self.model.ln_final(stack) @ self.model.W_U
        return (logits, labels) if return_labels else logits

    def _layer(self, layer: int | None, mlp_input: bool = False) -> int:
        """The layer whose input is meant, counted from 0; n_layers stands for what ln_final reads."""
        n_layers = self.model.cfg.n_layers
        layer = n_layers if layer is None or layer == -1 else layer
        if not 0 <= layer <= n_layers:
            raise IndexError(f"layer {layer} is out of range: the model has layers 0 to {n_layers - 1}")
        if mlp_input and self.model.cfg.d_mlp is None:
            raise ValueError("mlp_input asks for what an MLP reads, but this model's blocks have none")
        if mlp_input and layer == n_layers:
            raise ValueError("mlp_input needs the layer whose MLP reads the stream")
        return layer

    def _norm(self, layer: int, mlp_input: bool) -> tuple[nn.Module, str]:
        """The norm that reads the stream there, and its name."""
        if layer == self.model.cfg.n_layers:
            return self.model.ln_final, "ln_final"
        place = "ln2" if mlp_input else "ln1"
        return getattr(self.model.blocks[layer], place), f"blocks.{layer}.{place}"

    def _direction(self, tokens: Tokens, incorrect_tokens: Tokens | None) -> Tensor:
        direction = self.model.tokens_to_residual_directions(tokens).detach()
        if incorrect_tokens is None:
            return direction
        other = self.model.tokens_to_residual_directions(incorrect_tokens).detach()
        if direction.shape != other.shape:
            came = f"{tuple(direction.shape[:-1])} and {tuple(other.shape[:-1])}"
            raise ValueError(f"tokens and incorrect_tokens must have the same shape, got {came}")
        return direction - other

    def _ln_projection(self, project: Tensor, layer: int, mlp_input: bool) -> Tensor:
        """P' such that norm(part) @ project is part @ P' over the cached scale."""
        norm, _ = self._norm(layer, mlp_input)
        project = _weight(norm).to(project)[:, None] * project
        return project - project.mean(0) if _centres(norm) else project


def _centres(norm: Any) -> bool:
    """Whether a norm subtracts the mean and adds a bias."""
    return hasattr(norm, "bias")


def _weight(norm: Any) -> Float[Tensor, "d_model"]:
    """What a norm multiplies by."""
    return norm.weight.detach() + getattr(norm, "offset", 0.0)
