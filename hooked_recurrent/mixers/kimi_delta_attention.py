"""Kimi Delta Attention (Kimi Team 2025, arXiv:2510.26692), as in flash-linear-attention and transformers' Kimi Linear.

    S_t = (I - beta_t k_t k_t^T) diag(d_t) S_{t-1} + beta_t k_t v_t^T          o_t = S_t^T q_t
    log d_t = -exp(A_log) softplus(W_2 W_1 x_t + dt_bias) <= 0, one number per key channel; or, bounded from below,
              lower_bound sigmoid(exp(A_log) (W_2 W_1 x_t + dt_bias))
    beta_t = sigmoid(W_b x_t), or twice that where negative eigenvalues are allowed (arXiv:2411.12537)

In the roles of factors.py: log_decay log d_t; erase -beta_t k_t; probe d_t * k_t, because this rule asks the state that has
already decayed and k_t^T diag(d_t) S = (d_t * k_t)^T S; write key k_t; write value beta_t v_t.
q, k, v come out of a short causal convolution each; q and k are L2-normalised per head and q is divided by sqrt(d_k).
After the read: RMSNorm per head times the sigmoid of a low-rank gate, then W_O.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_recurrent.config import MixerConfig, require_positive
from hooked_recurrent.factors import Factors, state_dtype
from hooked_recurrent.hooks import RecurrentHookPoint
from hooked_recurrent.layers.conv import ShortConvs
from hooked_recurrent.layers.linear import Linear
from hooked_recurrent.layers.norm import GatedRMSNorm, l2_normalize
from hooked_recurrent.layers.step_size import initial_step_bias
from hooked_recurrent.mixers.base import Call, RecurrentMixer
from hooked_recurrent.state import LayerState, Shapes


@dataclass(frozen=True)
class KimiDeltaAttentionConfig(MixerConfig):
    """Heads of a Kimi Delta Attention mixer (Kimi Team 2025, arXiv:2510.26692)."""

    n_heads: int
    """Value heads; the state, the writes and every role factor have this many."""
    n_key_heads: int
    """Key and query heads before expansion; must divide n_heads (grouped value attention)."""
    d_k: int
    """Width of the side of the state that the query contracts."""
    d_v: int
    """Width of the side of the state that leaves through W_O, and rank of the projections to decay and gate."""
    conv_size: int = 4
    """Taps of the short causal convolutions over q, k and v."""
    lower_bound: float | None = None
    """The fastest decay (log space, below 0), which sigmoids approach; None for softplus decays without a bound."""
    negative_eigenvalues: bool = False
    """Whether the write strength is doubled, so that an erase can turn what it removes into its negative."""
    gate_bias: bool = True
    """Whether the projection to the output gate has a bias."""
    norm_eps: float = 1e-6
    """Epsilon of the gated RMSNorm before W_O."""

    rule: ClassVar[str] = "kimi_delta_attention"

    def __post_init__(self) -> None:
        name = "KimiDeltaAttentionConfig"
        require_positive(name, n_heads=self.n_heads, n_key_heads=self.n_key_heads, d_k=self.d_k, d_v=self.d_v)
        require_positive(name, conv_size=self.conv_size, norm_eps=self.norm_eps)
        if self.n_heads % self.n_key_heads:
            raise ValueError(f"n_key_heads must divide n_heads, got {self.n_key_heads} and {self.n_heads}")
        if self.lower_bound is not None and not self.lower_bound < 0:
            raise ValueError(f"lower_bound must be below 0 (a decay of 1), got {self.lower_bound}")


class KimiDeltaAttention(RecurrentMixer):
    """The mixer of a Kimi Delta Attention layer.

    Upstream hooks, before those of `RecurrentMixer` (heads already expanded to value heads):

        hook_q, hook_k   after the convolution, before the L2 norm    [batch, pos, head, d_k]
        hook_v           after the convolution                        [batch, pos, head, d_v]
        hook_beta        write strength in (0, 1), (0, 2) if doubled  [batch, pos, head]
    """

    Config = KimiDeltaAttentionConfig
    cfg: KimiDeltaAttentionConfig

    def __init__(self, cfg: KimiDeltaAttentionConfig, d_model: int, layer: int):
        super().__init__(cfg, d_model, layer)
        keys, values, channels = cfg.n_key_heads * cfg.d_k, cfg.n_heads * cfg.d_v, cfg.n_heads * cfg.d_k
        self.query, self.key = Linear(d_model, keys, bias=False), Linear(d_model, keys, bias=False)
        self.value, self.out = Linear(d_model, values, bias=False), Linear(values, d_model, bias=False)
        self.convs = ShortConvs([keys, keys, values], cfg.conv_size)
        self.beta = Linear(d_model, cfg.n_heads, bias=False)
        down, gate_up = Linear(d_model, cfg.d_v, bias=False), Linear(cfg.d_v, values, bias=cfg.gate_bias)
        self.gate = nn.Sequential(down, gate_up)
        down, decay_up = Linear(d_model, cfg.d_v, bias=False), Linear(cfg.d_v, channels, bias=False)
        self.decay = nn.Sequential(down, decay_up)
        self.dt_bias = nn.Parameter(initial_step_bias(channels))
        rate = torch.empty(cfg.n_heads).uniform_(1.0, 16.0) if cfg.lower_bound is None else torch.ones(cfg.n_heads)
        self.A_log = nn.Parameter(rate.log())
        self.norm = GatedRMSNorm(cfg.d_v, cfg.norm_eps, activation=torch.sigmoid)
        self.hook_q, self.hook_k = RecurrentHookPoint(), RecurrentHookPoint()
        self.hook_v, self.hook_beta = RecurrentHookPoint(), RecurrentHookPoint()

    def remembers(self) -> Shapes:
        """The matrix memory and the last inputs of the convolutions."""
        return super().remembers() | {"conv_tail": self.convs.tail_shape}

    def project(
        self, x: Float[Tensor, "batch pos d_model"], state: LayerState, call: Call
    ) -> tuple[Factors, Tensor, list[LayerState]]:
        """x to the six roles; the gate goes along to `read_out`."""
        cfg, expand = self.cfg, self.cfg.n_heads // self.cfg.n_key_heads
        (query, key, value), tails = self.convs([self.query(x), self.key(x), self.value(x)], state.conv_tail, call.stops)
        query, key = (self.heads(side, cfg.d_k).repeat_interleave(expand, dim=2) for side in (query, key))
        query, key, value = self.hook_q(query), self.hook_k(key), self.hook_v(self.heads(value, cfg.d_v))
        beta = self.beta(x).sigmoid()
        beta = self.hook_beta(2 * beta if cfg.negative_eigenvalues else beta)[..., None]
        log_decay, key = self._log_decay(x), l2_normalize(key)
        factors = Factors(
            log_decay=log_decay,
            write_key=key,
            write_value=beta * value,
            query=l2_normalize(query) * cfg.d_k**-0.5,
            erase=-beta * key,
            probe=log_decay.exp() * key,
        )
        return factors, self.heads(self.gate(x), cfg.d_v), [LayerState(conv_tail=tail) for tail in tails]

    def _log_decay(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos head d_k"]:
        """log d_t, float32 or wider."""
        wide = state_dtype(x.dtype)
        step = self.heads(self.decay(x).to(wide) + self.dt_bias.to(wide), self.cfg.d_k)
        rate = self.A_log.to(wide).exp()[:, None]
        if self.cfg.lower_bound is None:
            return -rate * nn.functional.softplus(step)
        return self.cfg.lower_bound * (rate * step).sigmoid()

    def read_out(
        self, read: Float[Tensor, "batch pos head d_v"], beside: Float[Tensor, "batch pos head d_v"]
    ) -> Float[Tensor, "batch pos head d_v"]:
        """Gated RMSNorm per head; `beside` is the gate before its sigmoid."""
        return self.norm(read, beside)
