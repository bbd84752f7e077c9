"""A projection that keeps every core busy with a few rows, which is what generation asks for.

Multiplying few rows by a large matrix is bound by how fast the matrix comes from memory. The BLAS that torch uses on a CPU
does that with a single thread; several products of a part of the outputs each go to several threads.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

# A smaller weight stays in a cache; with more rows a single product has work for every thread.
FEW_ROWS, LARGE_WEIGHT = 32, 1 << 20


def linear(
    x: Float[Tensor, "*rows d_in"], weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, "d_out"] | None = None
) -> Float[Tensor, "*rows d_out"]:
    """torch's linear, in one product per thread where that is faster: few rows, a large weight, a CPU."""
    rows = x.numel() // x.shape[-1]
    parts = math.gcd(torch.get_num_threads(), len(weight)) if 0 < rows <= FEW_ROWS else 1
    large = weight.numel() * weight.element_size() >= LARGE_WEIGHT
    if parts == 1 or not large or not weight.is_contiguous() or x.device.type != "cpu":
        return nn.functional.linear(x, weight, bias)
    some = x.reshape(1, rows, -1).expand(parts, -1, -1)
    out = torch.bmm(some, weight.view(parts, -1, x.shape[-1]).mT)
    out = out.transpose(0, 1).reshape(*x.shape[:-1], len(weight))
    return out if bias is None else out + bias


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """x weight^T + bias."""
        return linear(x, self.weight, self.bias)
