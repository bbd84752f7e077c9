"""Where step sizes start: rules of the Mamba line decay by exp(-exp(A_log) dt) with dt = softplus(projection + bias)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

# Log-uniform, as in Mamba-2 and Gated DeltaNet: the decays of the heads then span the time scales of a text.
DT_RANGE = (0.001, 0.1)


def initial_step_bias(n_heads: int) -> Float[Tensor, "head"]:
    """Biases whose softplus is log-uniform in DT_RANGE."""
    dt = torch.exp(torch.empty(n_heads).uniform_(*(math.log(bound) for bound in DT_RANGE)))
    return dt + torch.log(-torch.expm1(-dt))
