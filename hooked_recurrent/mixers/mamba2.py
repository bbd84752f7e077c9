"""Mamba-2 (Dao, Gu 2024, arXiv:2405.21060, section 6), as in transformers and state-spaces/mamba.

    S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T          o_t = S_t^T C_t + D x_t
    dt_t = clamp(softplus(W_dt u_t + dt_bias)),  A = -exp(A_log) < 0, one number per head

In the roles of factors.py: log_decay dt_t A; no erase; write key B_t; write value dt_t x_t; query C_t. Per head the write is
a plain outer product: the state space is diagonal in its decay, not in what it writes.
x, B, C come out of a short causal convolution; every group of heads shares one B and C. After the read: the skip D x, a gate,
RMSNorm over each group of heads, then W_O.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_recurrent.config import MixerConfig, require_positive
from hooked_recurrent.factors import Factors, state_dtype
from hooked_recurrent.hooks import RecurrentHookPoint
from hooked_recurrent.layers.conv import ShortConv
from hooked_recurrent.layers.linear import Linear
from hooked_recurrent.layers.norm import GatedRMSNorm
from hooked_recurrent.layers.step_size import initial_step_bias
from hooked_recurrent.mixers.base import Call, RecurrentMixer
from hooked_recurrent.state import LayerState, Shapes


@dataclass(frozen=True)
class Mamba2Config(MixerConfig):
    """Heads of a Mamba-2 mixer (Dao and Gu 2024, arXiv:2405.21060)."""

    n_heads: int
    """Heads of x; the state, the writes and every role factor have this many heads."""
    n_groups: int
    """Groups of heads that share B and C (and are normalised together); must divide n_heads."""
    d_k: int
    """Width of B and C, the paper's state size N: the side of the state that the query contracts."""
    d_v: int
    """Width of x per head, the paper's head dimension P: the side of the state that leaves through W_O."""
    conv_size: int = 4
    """Taps of the short causal convolution over x, B and C."""
    conv_bias: bool = True
    """Whether that convolution has a bias."""
    bias: bool = False
    """Whether the projections into and out of the mixer have biases."""
    dt_limit: tuple[float, float] = (0.0, math.inf)
    """The step size dt is clamped to this range."""
    norm_eps: float = 1e-5
    """Epsilon of the gated RMSNorm before W_O."""
    norm_before_gate: bool = False
    """Whether that norm comes before the gate; in every released Mamba-2 model it comes after."""

    rule: ClassVar[str] = "mamba2"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dt_limit", tuple(self.dt_limit))
        require_positive("Mamba2Config", n_heads=self.n_heads, n_groups=self.n_groups, d_k=self.d_k, d_v=self.d_v)
        require_positive("Mamba2Config", conv_size=self.conv_size, norm_eps=self.norm_eps)
        if self.n_heads % self.n_groups:
            raise ValueError(f"n_groups must divide n_heads, got {self.n_groups} and {self.n_heads}")
        if len(self.dt_limit) != 2 or not 0 <= self.dt_limit[0] < self.dt_limit[1]:
            raise ValueError(f"dt_limit must be (low, high) with 0 <= low < high, got {self.dt_limit}")


Beside = tuple[Tensor, Tensor]
"""What goes past the memory: x for the skip, and the gate."""


class Mamba2(RecurrentMixer):
    """The mixer of a Mamba-2 layer.

    Upstream hooks, before those of `RecurrentMixer` (B and C already expanded from groups to heads):

        hook_q, hook_k   C and B, after the convolution              [batch, pos, head, d_k]
        hook_v           x, after the convolution                    [batch, pos, head, d_v]
        hook_dt          step size, clamped, >= 0: decay and write   [batch, pos, head]

    After hook_read, before hook_z:

        hook_skip        D x, which is added to the read             [batch, pos, head, d_v]
        hook_gate        the gate before its SiLU                    [batch, pos, head, d_v]
    """

    Config = Mamba2Config
    erases = False
    cfg: Mamba2Config

    def __init__(self, cfg: Mamba2Config, d_model: int, layer: int):
        super().__init__(cfg, d_model, layer)
        self.key_width, self.value_width = cfg.n_groups * cfg.d_k, cfg.n_heads * cfg.d_v
        mixed_width = self.value_width + 2 * self.key_width
        self.vkq = Linear(d_model, mixed_width, bias=cfg.bias)  # x, B, C, in the papers' order
        self.gate = Linear(d_model, self.value_width, bias=cfg.bias)
        self.dt = Linear(d_model, cfg.n_heads, bias=cfg.bias)
        self.conv = ShortConv(mixed_width, cfg.conv_size, bias=cfg.conv_bias)
        self.norm = GatedRMSNorm(
            self.value_width, cfg.norm_eps, groups=cfg.n_groups, gate_first=not cfg.norm_before_gate
        )
        self.out = Linear(self.value_width, d_model, bias=cfg.bias)
        self.dt_bias = nn.Parameter(initial_step_bias(cfg.n_heads))
        self.A_log = nn.Parameter(torch.empty(cfg.n_heads).uniform_(1.0, 16.0).log())
        self.D = nn.Parameter(torch.ones(cfg.n_heads))
        self.hook_q, self.hook_k = RecurrentHookPoint(), RecurrentHookPoint()
        self.hook_v, self.hook_dt = RecurrentHookPoint(), RecurrentHookPoint()
        self.hook_skip, self.hook_gate = RecurrentHookPoint(), RecurrentHookPoint()

    def remembers(self) -> Shapes:
        """The matrix memory and the last inputs of the convolution."""
        return super().remembers() | {"conv_tail": self.conv.tail_shape}

    def project(
        self, x: Float[Tensor, "batch pos d_model"], state: LayerState, call: Call
    ) -> tuple[Factors, Beside, list[LayerState]]:
        """The normalised residual to the six roles; x after the convolution and the gate go along to `read_out`."""
        cfg = self.cfg
        mixed, tails = self.conv(self.vkq(x), state.conv_tail, call.stops)
        value, key, query = mixed.split([self.value_width, self.key_width, self.key_width], dim=-1)
        per_group = cfg.n_heads // cfg.n_groups
        query, key = (self.per_value_head(self.heads(side, cfg.d_k), per_group) for side in (query, key))
        query, key = self.hook_q(query), self.hook_k(key)
        value = self.hook_v(value.unflatten(-1, (-1, cfg.d_v)))
        wide = state_dtype(x.dtype)
        step_size = nn.functional.softplus(self.dt(x).to(wide) + self.dt_bias.to(wide)).clamp(*cfg.dt_limit)
        step_size = self.hook_dt(step_size)
        factors = Factors(
            log_decay=-self.A_log.to(wide).exp() * step_size,
            write_key=key,
            write_value=step_size[..., None] * value,
            query=query,
        )
        return factors, (value, self.gate(x).unflatten(-1, (-1, cfg.d_v))), [LayerState(conv_tail=tail) for tail in tails]

    def read_out(
        self, read: Float[Tensor, "batch pos head d_v"], beside: Beside
    ) -> Float[Tensor, "batch pos head d_v"]:
        """Add the skip, gate, and normalise each group of heads."""
        value, gate = beside
        skip = self.hook_skip(self.D.to(read.dtype)[:, None] * value.to(read.dtype))
        gate = self.hook_gate(gate)
        return self.norm((read + skip).flatten(2), gate.flatten(2)).unflatten(-1, read.shape[2:])
