"""RMSNorms: on the residual stream with transformer_lens's hooks, gated before W_O, and plain L2 for keys and queries."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

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
        """Normalise the last axis; the result has x's dtype."""
        wide = x.to(state_dtype(x.dtype))
        scale = self.hook_scale((wide.square().mean(-1, keepdim=True) + self.eps).sqrt())
        return self.hook_normalized((wide / scale * (self.offset + self.weight.to(wide.dtype))).to(x.dtype))


class GatedRMSNorm(nn.Module):
    """weight * x / rms(x) * silu(gate), per head, in float32 or wider (Gated DeltaNet, Mamba-2)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*batch d"], gate: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Normalise x over its last axis and gate it; the result has the gate's dtype."""
        wide = x.to(state_dtype(x.dtype))
        normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.to(wide.dtype) * normalized * nn.functional.silu(gate.to(wide.dtype))).to(gate.dtype)


def l2_normalize(x: Float[Tensor, "*batch d"], eps: float = 1e-6) -> Float[Tensor, "*batch d"]:
    """x / sqrt(|x|^2 + eps): eps sits inside the root, as in the Gated DeltaNet kernels."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)
