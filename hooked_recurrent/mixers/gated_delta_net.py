"""Gated DeltaNet (Yang, Kautz, Hatamizadeh 2024, arXiv:2412.06464), as in Qwen3-Next and Qwen3.5.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T          o_t = S_t^T q_t
    alpha_t = exp(g_t),  g_t = -exp(A_log) softplus(W_a x_t + dt_bias) <= 0,  beta_t = sigmoid(W_b x_t)

In the roles of factors.py: log_decay g_t; erase -alpha_t beta_t k_t; probe k_t; write key k_t; write value beta_t v_t.
q, k, v come out of a short causal convolution; q and k are L2-normalised per head and q is divided by sqrt(d_k).
After the read: gated RMSNorm per head, then W_O.
"""

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
from hooked_recurrent.layers.norm import GatedRMSNorm, l2_normalize
from hooked_recurrent.layers.step_size import initial_step_bias
from hooked_recurrent.mixers.base import Call, RecurrentMixer
from hooked_recurrent.state import LayerState, Shapes


@dataclass(frozen=True)
class GatedDeltaNetConfig(MixerConfig):
    """Heads of a Gated DeltaNet mixer (Yang et al. 2024, arXiv:2412.06464; as in Qwen3-Next and Qwen3.5)."""

    n_heads: int
    """Value heads; the state, the writes and every role factor have this many heads."""
    n_key_heads: int
    """Key and query heads before expansion; must divide n_heads (grouped value attention)."""
    d_k: int
    """Width of the side of the state that the query contracts."""
    d_v: int
    """Width of the side of the state that leaves through W_O."""
    conv_size: int = 4
    """Taps of the short causal convolution over q, k and v."""
    norm_eps: float = 1e-6
    """Epsilon of the gated RMSNorm before W_O."""

    rule: ClassVar[str] = "gated_delta_net"

    def __post_init__(self) -> None:
        require_positive("GatedDeltaNetConfig", n_heads=self.n_heads, n_key_heads=self.n_key_heads, d_k=self.d_k)
        require_positive("GatedDeltaNetConfig", d_v=self.d_v, conv_size=self.conv_size, norm_eps=self.norm_eps)
        if self.n_heads % self.n_key_heads:
            raise ValueError(f"n_key_heads must divide n_heads, got {self.n_key_heads} and {self.n_heads}")


class GatedDeltaNet(RecurrentMixer):
    """The mixer of a Gated DeltaNet layer.

    Upstream hooks, before those of `RecurrentMixer` (heads already expanded to value heads):

        hook_q, hook_k   after the convolution, before the L2 norm   [batch, pos, head, d_k]
        hook_v           after the convolution                       [batch, pos, head, d_v]
        hook_beta        write strength in (0, 1)                    [batch, pos, head]
    """

    Config = GatedDeltaNetConfig
    cfg: GatedDeltaNetConfig

    def __init__(self, cfg: GatedDeltaNetConfig, d_model: int, layer: int):
        super().__init__(cfg, d_model, layer)
        self.key_width, value_width = cfg.n_key_heads * cfg.d_k, cfg.n_heads * cfg.d_v
        self.qkv = Linear(d_model, 2 * self.key_width + value_width, bias=False)
        self.gate = Linear(d_model, value_width, bias=False)
        self.beta = Linear(d_model, cfg.n_heads, bias=False)
        self.dt = Linear(d_model, cfg.n_heads, bias=False)
        self.conv = ShortConv(2 * self.key_width + value_width, cfg.conv_size)
        self.norm = GatedRMSNorm(cfg.d_v, cfg.norm_eps)
        self.out = Linear(value_width, d_model, bias=False)
        self.dt_bias = nn.Parameter(initial_step_bias(cfg.n_heads))
        self.A_log = nn.Parameter(torch.empty(cfg.n_heads).uniform_(1.0, 16.0).log())
        self.hook_q, self.hook_k = RecurrentHookPoint(), RecurrentHookPoint()
        self.hook_v, self.hook_beta = RecurrentHookPoint(), RecurrentHookPoint()

    def remembers(self) -> Shapes:
        """The matrix memory and the last inputs of the convolution."""
        return super().remembers() | {"conv_tail": self.conv.tail_shape}

    def project(
        self, x: Float[Tensor, "batch pos d_model"], state: LayerState, call: Call
    ) -> tuple[Factors, Tensor, list[LayerState]]:
        """x to the six roles; the gate goes along to `read_out`."""
        cfg = self.cfg
        mixed, tails = self.conv(self.qkv(x), state.conv_tail, call.stops)
        query, key, value = mixed.split([self.key_width, self.key_width, cfg.n_heads * cfg.d_v], dim=-1)
        expand = cfg.n_heads // cfg.n_key_heads
        query, key = (self.per_value_head(self.heads(side, cfg.d_k), expand) for side in (query, key))
        query, key, value = self.hook_q(query), self.hook_k(key), self.hook_v(self.heads(value, cfg.d_v))
        beta = self.hook_beta(self.beta(x).sigmoid())
        wide = state_dtype(x.dtype)
        step_size = nn.functional.softplus(self.dt(x).to(wide) + self.dt_bias.to(wide))
        log_decay = -self.A_log.to(wide).exp() * step_size
        factors = Factors(
            log_decay=log_decay,
            write_key=l2_normalize(key),
            write_value=beta[..., None] * value,
            query=l2_normalize(query) * cfg.d_k**-0.5,
            erase_strength=-log_decay.exp() * beta,
        )
        return factors, self.heads(self.gate(x), cfg.d_v), [LayerState(conv_tail=tail) for tail in tails]

    def read_out(
        self, read: Float[Tensor, "batch pos head d_v"], beside: Float[Tensor, "batch pos head d_v"]
    ) -> Float[Tensor, "batch pos head d_v"]:
        """Gated RMSNorm per head; `beside` is the gate before its SiLU."""
        return self.norm(read, beside)
