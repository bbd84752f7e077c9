"""Mamba-2 (Dao, Gu 2024, arXiv:2405.21060, section 6), as in transformers and state-spaces/mamba.

    S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T          o_t = S_t^T C_t + D x_t
    dt_t = clamp(softplus(W_dt u_t + dt_bias)),  A = -exp(A_log) < 0, one number per head

In the roles of factors.py: log_decay dt_t A; no erase; write key B_t; write value dt_t x_t; query C_t. Per head the write is
a plain outer product: the state space is diagonal in its decay, not in what it writes.
x, B, C come out of a short causal convolution; every group of heads shares one B and C. After the read: the skip D x, a gate,
RMSNorm over each group of heads, then W_O.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_recurrent.config import Mamba2Config
from hooked_recurrent.factors import Factors, state_dtype
from hooked_recurrent.hooks import RecurrentHookPoint
from hooked_recurrent.layers.conv import ShortConv
from hooked_recurrent.layers.norm import GatedRMSNorm
from hooked_recurrent.layers.step_size import initial_step_bias
from hooked_recurrent.mixers.base import RecurrentMixer
from hooked_recurrent.state import LayerState

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

    erases = False
    cfg: Mamba2Config

    def __init__(self, cfg: Mamba2Config, d_model: int, layer: int):
        super().__init__(cfg, layer)
        self.key_width, self.value_width = cfg.n_groups * cfg.d_k, cfg.n_heads * cfg.d_v
        mixed_width = self.value_width + 2 * self.key_width
        self.vkq = nn.Linear(d_model, mixed_width, bias=cfg.bias)  # x, B, C, in the papers' order
        self.gate = nn.Linear(d_model, self.value_width, bias=cfg.bias)
        self.dt = nn.Linear(d_model, cfg.n_heads, bias=cfg.bias)
        self.conv = ShortConv(mixed_width, cfg.conv_size, bias=cfg.conv_bias)
        self.norm = GatedRMSNorm(
            self.value_width, cfg.norm_eps, groups=cfg.n_groups, gate_first=not cfg.norm_before_gate
        )
        self.out = nn.Linear(self.value_width, d_model, bias=cfg.bias)
        self.dt_bias = nn.Parameter(initial_step_bias(cfg.n_heads))
        self.A_log = nn.Parameter(torch.empty(cfg.n_heads).uniform_(1.0, 16.0).log())
        self.D = nn.Parameter(torch.ones(cfg.n_heads))
        self.hook_q, self.hook_k = RecurrentHookPoint(), RecurrentHookPoint()
        self.hook_v, self.hook_dt = RecurrentHookPoint(), RecurrentHookPoint()
        self.hook_skip, self.hook_gate = RecurrentHookPoint(), RecurrentHookPoint()

    def project(
        self, x: Float[Tensor, "batch pos d_model"], state: LayerState, stops: tuple[int, ...]
    ) -> tuple[Factors, Beside, list[LayerState]]:
        """The normalised residual to the six roles; x after the convolution and the gate go along to `read_out`."""
        cfg = self.cfg
        mixed, padded = self.conv(self.vkq(x), state.conv_tail)
        value, key, query = mixed.split([self.value_width, self.key_width, self.key_width], dim=-1)
        per_group = cfg.n_heads // cfg.n_groups
        query, key = (side.unflatten(-1, (-1, cfg.d_k)).repeat_interleave(per_group, dim=2) for side in (query, key))
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
        tails = [LayerState(conv_tail=tail) for tail in self.conv.tails(padded, stops)]
        return factors, (value, self.gate(x).unflatten(-1, (-1, cfg.d_v))), tails

    def read_out(
        self, read: Float[Tensor, "batch pos head d_v"], beside: Beside
    ) -> Float[Tensor, "batch pos head d_v"]:
        """Add the skip, gate, and normalise each group of heads."""
        value, gate = beside
        skip = self.hook_skip(self.D.to(read.dtype)[:, None] * value.to(read.dtype))
        gate = self.hook_gate(gate)
        return self.norm((read + skip).flatten(2), gate.flatten(2)).unflatten(-1, read.shape[2:])
