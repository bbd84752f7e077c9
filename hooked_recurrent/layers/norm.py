"""Norms: on the residual stream with transformer_lens's hooks, gated before W_O, and plain L2 for keys and queries."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_recurrent.config import ModelConfig
from hooked_recurrent.factors import state_dtype
from hooked_recurrent.hooks import RecurrentHookPoint


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight), computed in float32 or wider.

    Qwen3.5's norms are zero-centred: `offset` is 1 and the stored weight starts at 0.

    Hooks: hook_scale [..., 1] (the rms), hook_normalized [..., d] (after the scale and the weight).
    """

    def __init__(self, width: int, eps: float, offset: float = 1.0):
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))
        self.hook_scale, self.hook_normalized = RecurrentHookPoint(), RecurrentHookPoint()

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Normalise the last axis; the result has the weight's dtype, whatever the residual stream is kept in."""
        wide = x.to(state_dtype(x.dtype))
        scale = self.hook_scale((wide.square().mean(-1, keepdim=True) + self.eps).sqrt())
        return self.hook_normalized((wide / scale * (self.offset + self.weight.to(wide.dtype))).to(self.weight.dtype))


class LayerNorm(nn.Module):
    """(x - mean) / std(x) * weight + bias, computed in float32 or wider.

    Hooks: hook_scale [..., 1] (the standard deviation), hook_normalized [..., d] (after the scale, the weight and the bias).
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.hook_scale, self.hook_normalized = RecurrentHookPoint(), RecurrentHookPoint()

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Normalise the last axis; the result has the weight's dtype."""
        if self.weight.dtype == x.dtype == state_dtype(x.dtype) and not self.hook_scale.in_use:
            return self.hook_normalized(nn.functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps))
        wide = x.to(state_dtype(x.dtype))
        centred = wide - wide.mean(-1, keepdim=True)
        scale = self.hook_scale((centred.square().mean(-1, keepdim=True) + self.eps).sqrt())
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return self.hook_normalized((centred / scale * weight + bias).to(self.weight.dtype))


def make_norm(cfg: ModelConfig) -> nn.Module:
    """A norm for the residual stream, of the kind that the model's config names."""
    if cfg.norm == "layer":
        return LayerNorm(cfg.d_model, cfg.norm_eps)
    return RMSNorm(cfg.d_model, cfg.norm_eps, cfg.norm_offset)


class GatedRMSNorm(nn.Module):
    """weight * x / rms(x) * silu(gate), or weight * y / rms(y) with y = x * silu(gate), in float32 or wider.

    Gated DeltaNet normalises every head by itself and then gates; Mamba-2 gates first and normalises each group of heads;
    Kimi Delta Attention has a sigmoid in the place of the SiLU.
    """

    def __init__(
        self,
        width: int,
        eps: float,
        *,
        groups: int = 1,
        gate_first: bool = False,
        activation: Callable[[Tensor], Tensor] = nn.functional.silu,
    ):
        """`groups` equal parts of the last axis, which is `width` wide, each have their own rms."""
        super().__init__()
        self.eps, self.groups, self.gate_first, self.activation = eps, groups, gate_first, activation
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*batch d"], gate: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Normalise x over the groups of its last axis and gate it; the result has the gate's dtype."""
        wide = x.to(state_dtype(x.dtype))
        open_gate = self.activation(gate.to(wide.dtype))
        parts = (wide * open_gate if self.gate_first else wide).unflatten(-1, (self.groups, -1))
        normalized = (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + self.eps)).flatten(-2)
        scaled = self.weight.to(wide.dtype) * normalized
        return (scaled if self.gate_first else scaled * open_gate).to(gate.dtype)


def l2_normalize(x: Float[Tensor, "*batch d"], eps: float = 1e-6) -> Float[Tensor, "*batch d"]:
    """x / sqrt(|x|^2 + eps): eps sits inside the root, as in the Gated DeltaNet kernels."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)
