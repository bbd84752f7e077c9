"""Muon in float32: momentum, then the nearest orthogonal matrix (Jordan et al. 2024).

The update of a weight matrix W [out, in] is U V^T of the singular value decomposition of its momentum: every direction
moves equally far. The singular values are pushed towards 1 by a few steps of the odd polynomial
`3.4445 x - 4.7750 x^3 + 2.0315 x^5`, which needs only matrix products (a Newton-Schulz iteration).

Why not `torch.optim.Muon`: it computes those products in bfloat16, which processors without bfloat16 units emulate
slowly.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Float[Tensor, "matrix rows cols"], steps: int = 5) -> Float[Tensor, "matrix rows cols"]:
    """Move all singular values of each matrix near 1 (0.7 to 1.2 after five steps), keeping the singular vectors."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    first, third, fifth = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = first * x + (third * gram + fifth * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for matrices [out, in]; the rate is scaled by sqrt(max(1, out / in)).

    Args:
        params: two-dimensional parameters; anything else raises `ValueError`.
        lr: learning rate.
        momentum: decay of the running mean of gradients.
        weight_decay: decoupled, multiplied by the learning rate.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon trains matrices, got a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient; matrices of one shape are orthogonalised together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                directions = torch.stack([self.direction(p, group["momentum"]) for p in parameters])
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, orthogonalize(directions), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)

    def direction(self, parameter: nn.Parameter, momentum: float) -> Float[Tensor, "rows cols"]:
        """The Nesterov direction: the gradient blended with its updated running mean."""
        state = self.state[parameter]
        mean = state.setdefault("gradient_mean", torch.zeros_like(parameter))
        mean.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(mean, momentum)
