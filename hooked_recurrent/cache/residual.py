"""The residual stream taken apart: transformer_lens's own methods of a cache, for models with any mixer.

The parts of a stream are its embedding, every mixer's or every head's output, every MLP's or every neuron's, and biases; they
add up to it. A head's part is its z [batch, pos, head, d_v] times its W_O [head, d_v, d_model].
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities import get_act_name

from hooked_recurrent.cache.lens import Labelled, LensTools, Stack
from hooked_recurrent.cache.saving import missing
from hooked_recurrent.compat.names import first_name, unknown_hook
from hooked_recurrent.compat.slices import as_slice


class ResidualTools(LensTools):
    """Mixed into a cache: overrides what transformer_lens's ActivationCache does for attention layers only."""

    cache_dict: dict[str, Tensor]

    def __getitem__(self, key: str | tuple) -> Tensor:
        """By a hook's name, or by transformer_lens's short names: cache["resid_pre", 0], cache["z", -1], cache["read", 2]."""
        if isinstance(key, str):
            name = key if key in self.cache_dict else get_act_name(key)
        else:
            if len(key) > 1 and isinstance(key[1], int) and key[1] < 0:
                key = (key[0], self.model.cfg.n_layers + key[1], *key[2:])
            name = get_act_name(*key)
        found = first_name(name, self.cache_dict)
        if found is not None:
            return self.cache_dict[found]
        hook = first_name(name, self.model.hook_dict)
        gradient_of = first_name(name.removesuffix("_grad"), self.model.hook_dict)
        if hook is None and gradient_of is not None:
            raise KeyError(
                f"{gradient_of}_grad is not in the cache: run_with_cache(..., incl_bwd=True) keeps gradients"
            )
        if hook is None:
            raise KeyError(f"this model has {unknown_hook(name, self.model.hook_dict)}")
        raise KeyError(missing(hook))

    def stack_activation(
        self, activation_name: str, layer: int = -1, sublayer_type: str | None = None
    ) -> Float[Tensor, "layer *shape"]:
        """One activation of all layers below `layer`; they must have one shape."""
        found = [self[activation_name, index, sublayer_type] for index in range(self._layer(layer))]
        shapes = list(dict.fromkeys(tuple(tensor.shape) for tensor in found))
        if len(shapes) > 1:
            raise ValueError(f"{activation_name!r} has shapes {' and '.join(map(str, shapes))}, which do not stack")
        return torch.stack(found)

    def accumulated_resid(self, layer: int | None = None, incl_mid: bool = False, *args: Any, **kwargs: Any) -> Any:
        """As in transformer_lens; where blocks have no MLP there is no middle, and incl_mid adds nothing."""
        incl_mid = incl_mid and self.model.cfg.d_mlp is not None
        return super().accumulated_resid(layer, incl_mid, *args, **kwargs)  # type: ignore[misc]

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Stack | Labelled:
        """The embedding and every mixer's and MLP's output below `layer` [component, batch, pos, d_model]; they add up to it.

        Labels are "embed", "0_mixer_out", "0_mlp_out", ...; mode "attn" leaves out the MLPs, "mlp" the mixers.
        """
        if mode not in ("all", "mlp", "attn"):
            raise ValueError(f"mode must be 'all', 'mlp' or 'attn', got {mode!r}")
        layer = self._layer(layer, mlp_input)
        names = [("embed", "hook_embed")] if incl_embeds else []
        for index in range(layer + int(mlp_input)):
            if mode != "mlp":
                names.append((f"{index}_mixer_out", f"blocks.{index}.hook_mixer_out"))
            if mode != "attn" and index < layer and self.model.cfg.d_mlp is not None:
                names.append((f"{index}_mlp_out", f"blocks.{index}.hook_mlp_out"))
        parts = [self._at(name, pos_slice) for _, name in names]
        stack = torch.stack(parts) if parts else self._nothing(pos_slice)
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input, pos_slice, has_batch_dim=self.has_batch_dim)
        return (stack, [label for label, _ in names]) if return_labels else stack

    def compute_head_results(self) -> None:
        """Keep z @ W_O of every head as blocks.{l}.mixer.hook_result (or attn.hook_result) [batch, pos, head, d_model]."""
        for layer, block in enumerate(self.model.blocks):
            name = f"blocks.{layer}.{'mixer' if block.recurrent else 'attn'}.hook_result"
            if name not in self.cache_dict:
                z = self["z", layer]
                self.cache_dict[name] = torch.einsum("...hd,hdm->...hm", z, block.W_O.detach().to(z))

    def stack_head_results(
        self,
        layer: int = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Any = None,
        apply_ln: bool = False,
    ) -> Stack | Labelled:
        """What every head below `layer` adds to the stream [layer * head, batch, pos, d_model]; labels "L0H0", ...

        A hybrid's layers may have different numbers of heads. The remainder is what the heads leave of the stream.
        """
        layer = self._layer(layer)
        parts, labels = [], []
        for index, block in enumerate(list(self.model.blocks)[:layer]):
            z = as_slice(pos_slice).apply(self["z", index], dim=-3)
            parts.append(torch.einsum("...hd,hdm->h...m", z, block.W_O.detach().to(z)))
            labels += [f"L{index}H{head}" for head in range(block.W_O.shape[0])]
        stack = torch.cat(parts) if parts else self._nothing(pos_slice)
        if incl_remainder:
            stack = torch.cat([stack, self._stream(layer, False, pos_slice)[None] - stack.sum(0)])
            labels.append("remainder")
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, pos_slice=pos_slice, has_batch_dim=self.has_batch_dim)
        return (stack, labels) if return_labels else stack

    def stack_neuron_results(
        self,
        layer: int = -1,
        pos_slice: Any = None,
        neuron_slice: Any = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Float[Tensor, "d_model *out"] | None = None,
        mlp_input: bool = False,
    ) -> Tensor | Labelled:
        """What every MLP neuron below `layer` adds to the stream [layer * neuron, batch, pos, d_model]; labels "L0N0", ...

        With project_output_onto the last axis is `out` instead (or absent), and no neuron's vector is ever written out.
        """
        if self.model.cfg.d_mlp is None:
            raise ValueError("this model's blocks are mixers alone: there are no neurons to stack")
        layer, numbers = self._layer(layer, mlp_input), torch.arange(self.model.cfg.d_mlp)
        kept = torch.atleast_1d(torch.as_tensor(as_slice(neuron_slice).apply(numbers, dim=0))).tolist()
        labels = [f"L{index}N{number}" for index in range(layer) for number in kept]
        finish = _Projection(self, layer, mlp_input, apply_ln, pos_slice, project_output_onto)
        parts = []
        for index in range(layer):
            post = self._at(f"blocks.{index}.mlp.hook_post", pos_slice)[..., kept]
            out = finish.first(self.model.blocks[index].mlp.W_out.detach()[kept].to(post))
            parts.append(torch.einsum("...n,nm->n...m", post, out))
        stack = torch.cat(parts) if parts else finish.first(self._nothing(pos_slice))
        if incl_remainder:
            stack = torch.cat([stack, finish.first(self._stream(layer, mlp_input, pos_slice))[None] - stack.sum(0)])
            labels.append("remainder")
        stack = finish.then(stack)
        return (stack, labels) if return_labels else stack

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Any = None,
        return_labels: bool = False,
        project_output_onto: Float[Tensor, "d_model *out"] | None = None,
    ) -> Tensor | Labelled:
        """Every head, every neuron (or MLP), the embedding and the biases of the mixers; together they are the stream."""
        layer = self._layer(layer, mlp_input)
        finish = _Projection(self, layer, mlp_input, apply_ln, pos_slice, project_output_onto)
        heads, labels = self.stack_head_results(layer + int(mlp_input), True, pos_slice=pos_slice)
        mlps, mlp_labels = self.decompose_resid(layer, mlp_input, "mlp", False, pos_slice, False, True)
        if expand_neurons and self.model.cfg.d_mlp is not None:
            options: dict[str, Any] = {"project_output_onto": project_output_onto, "mlp_input": mlp_input}
            options |= {"apply_ln": apply_ln, "return_labels": True}
            mlps, mlp_labels = self.stack_neuron_results(layer, pos_slice, **options)
        else:
            mlps = finish.then(finish.first(mlps))
        embed = self._at("hook_embed", pos_slice)[None]
        bias = self.model.accumulated_bias(layer, mlp_input).detach().to(embed).expand(embed.shape)
        rest = finish.then(finish.first(torch.cat([embed, bias])))
        stack = torch.cat([finish.then(finish.first(heads)), mlps, rest])
        return (stack, [*labels, *mlp_labels, "embed", "bias"]) if return_labels else stack

    def _at(self, name: str, pos_slice: Any) -> Tensor:
        return as_slice(pos_slice).apply(self[name], dim=-2)

    def _nothing(self, pos_slice: Any) -> Tensor:
        """A stack of no parts."""
        return self._at("blocks.0.hook_resid_pre", pos_slice)[None][:0]

    def _stream(self, layer: int, mlp_input: bool, pos_slice: Any) -> Tensor:
        """The stream that a layer (or its MLP, or ln_final) reads."""
        if mlp_input:
            return self._at(f"blocks.{layer}.hook_resid_mid", pos_slice)
        before = f"blocks.{layer - 1}.hook_resid_post" if layer else "blocks.0.hook_resid_pre"
        return self._at(before, pos_slice)


class _Projection:
    """A norm and a projection of a stack in two steps: `first` is linear and may act on weights, `then` ends it."""

    def __init__(self, cache: Any, layer: int, mlp_input: bool, apply_ln: bool, pos_slice: Any, onto: Tensor | None):
        self.cache, self.where, self.apply_ln = cache, (layer, mlp_input, pos_slice), apply_ln
        self.flat = onto is not None and onto.ndim == 1
        self.matrix = onto[:, None] if onto is not None and self.flat else onto
        if self.matrix is not None and apply_ln:
            self.matrix = cache._ln_projection(self.matrix, layer, mlp_input)

    def first(self, parts: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape out"]:
        """The projection, with the norm's weight and centring inside; the parts themselves where there is none."""
        return parts if self.matrix is None else parts @ self.matrix.to(parts)

    def then(self, stack: Float[Tensor, "component *batch_pos out"]) -> Tensor:
        """Over the norm's scale, and without an axis that the projection did not have."""
        layer, mlp_input, pos_slice = self.where
        if self.apply_ln and self.matrix is None:
            batched = self.cache.has_batch_dim
            stack = self.cache.apply_ln_to_stack(stack, layer, mlp_input, pos_slice, has_batch_dim=batched)
        elif self.apply_ln:
            stack = stack / as_slice(pos_slice).apply(
                self.cache[f"{self.cache._norm(layer, mlp_input)[1]}.hook_scale"], dim=-2
            )
        return stack[..., 0] if self.flat else stack
