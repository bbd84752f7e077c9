"""Gated Linear Attention (Yang, Wang, Shen, Panda, Kim 2023, arXiv:2312.06635), as in flash-linear-attention.

    S_t = diag(d_t) S_{t-1} + k_t v_t^T          o_t = S_t^T q_t
    log d_t = log sigmoid(W_2 W_1 x_t + b) / divisor <= 0, one number per key channel

In the roles of factors.py: log_decay log d_t; no erase; write key k_t; write value v_t; query q_t / sqrt(d_k). Neither keys nor
queries are normalised. Groups of heads may share key, value and decay. q, k, v are plain projections, or come out of a
short causal convolution each. After the read: RMSNorm per head, gated where the model has an output gate, then W_O.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from hooked_recurrent.config import MixerConfig, require_positive
from hooked_recurrent.factors import Factors, state_dtype
from hooked_recurrent.hooks import RecurrentHookPoint
from hooked_recurrent.layers.conv import ShortConvs
from hooked_recurrent.layers.linear import Linear
from hooked_recurrent.layers.norm import GatedRMSNorm, RMSNorm
from hooked_recurrent.mixers.base import Call, RecurrentMixer
from hooked_recurrent.state import LayerState, Shapes


@dataclass(frozen=True)
class GatedLinearAttentionConfig(MixerConfig):
    """Heads of a Gated Linear Attention mixer (Yang et al. 2023, arXiv:2312.06635)."""

    n_heads: int
    """Query heads; the state, the writes and every role factor have this many."""
    n_key_value_heads: int
    """Heads of key, value and decay before expansion; must divide n_heads."""
    d_k: int
    """Width of the side of the state that the query contracts."""
    d_v: int
    """Width of the side of the state that leaves through W_O."""
    decay_rank: int = 16
    """Rank of the projection to the decay."""
    decay_divisor: float = 16.0
    """What log sigmoid is divided by: the larger, the longer memories start out."""
    min_log_decay: float | None = None
    """Faster decays than this one (log space, at most 0) are held at it; None for no limit."""
    conv_size: int | None = None
    """Taps of the short causal convolutions over q, k and v; None where there are none."""
    output_gate: bool = True
    """Whether what is read is gated before W_O."""
    norm_eps: float = 1e-6
    """Epsilon of the RMSNorm before W_O."""

    rule: ClassVar[str] = "gated_linear_attention"

    def __post_init__(self) -> None:
        name = "GatedLinearAttentionConfig"
        require_positive(name, n_heads=self.n_heads, n_key_value_heads=self.n_key_value_heads, d_k=self.d_k)
        require_positive(name, d_v=self.d_v, decay_rank=self.decay_rank, decay_divisor=self.decay_divisor)
        require_positive(name, norm_eps=self.norm_eps, conv_size=1 if self.conv_size is None else self.conv_size)
        if self.n_heads % self.n_key_value_heads:
            raise ValueError(f"n_key_value_heads must divide n_heads, got {self.n_key_value_heads} and {self.n_heads}")
        if self.min_log_decay is not None and self.min_log_decay > 0:
            raise ValueError(f"min_log_decay must be at most 0 (a decay of 1), got {self.min_log_decay}")


class GatedLinearAttention(RecurrentMixer):
    """The mixer of a Gated Linear Attention layer.

    Upstream hooks, before those of `RecurrentMixer` (heads already expanded to query heads):

        hook_q, hook_k   after the convolution, if there is one   [batch, pos, head, d_k]
        hook_v           after the convolution, if there is one   [batch, pos, head, d_v]
    """

    Config = GatedLinearAttentionConfig
    erases = False
    cfg: GatedLinearAttentionConfig

    def __init__(self, cfg: GatedLinearAttentionConfig, d_model: int, layer: int):
        super().__init__(cfg, d_model, layer)
        queries, z_width = cfg.n_heads * cfg.d_k, cfg.n_heads * cfg.d_v
        keys, values = cfg.n_key_value_heads * cfg.d_k, cfg.n_key_value_heads * cfg.d_v
        self.query, self.key = Linear(d_model, queries, bias=False), Linear(d_model, keys, bias=False)
        self.value, self.out = Linear(d_model, values, bias=False), Linear(z_width, d_model, bias=False)
        self.decay = nn.Sequential(Linear(d_model, cfg.decay_rank, bias=False), Linear(cfg.decay_rank, keys))
        self.gate = Linear(d_model, z_width, bias=False) if cfg.output_gate else None
        self.convs = None if cfg.conv_size is None else ShortConvs([queries, keys, values], cfg.conv_size)
        self.norm = GatedRMSNorm(cfg.d_v, cfg.norm_eps) if cfg.output_gate else RMSNorm(cfg.d_v, cfg.norm_eps, 0.0)
        self.hook_q, self.hook_k, self.hook_v = RecurrentHookPoint(), RecurrentHookPoint(), RecurrentHookPoint()

    def remembers(self) -> Shapes:
        """The matrix memory and, where there are convolutions, their last inputs."""
        return super().remembers() | ({} if self.convs is None else {"conv_tail": self.convs.tail_shape})

    def project(
        self, x: Float[Tensor, "batch pos d_model"], state: LayerState, call: Call
    ) -> tuple[Factors, Tensor | None, list[LayerState]]:
        """x to the roles; the gate, if there is one, goes along to `read_out`."""
        cfg, around = self.cfg, [LayerState() for _ in call.stops]
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.convs is not None:
            (query, key, value), tails = self.convs([query, key, value], state.conv_tail, call.stops)
            around = [LayerState(conv_tail=tail) for tail in tails]
        log_decay = nn.functional.logsigmoid(self.decay(x).to(state_dtype(x.dtype))) / cfg.decay_divisor
        if cfg.min_log_decay is not None:
            log_decay = log_decay.clamp(min=cfg.min_log_decay)
        query, key = self.hook_q(self.heads(query, cfg.d_k)), self.hook_k(self._expand(key, cfg.d_k))
        factors = Factors(
            log_decay=self._expand(log_decay, cfg.d_k),
            write_key=key,
            write_value=self.hook_v(self._expand(value, cfg.d_v)),
            query=query * cfg.d_k**-0.5,
        )
        return factors, None if self.gate is None else self.heads(self.gate(x), cfg.d_v), around

    def _expand(self, x: Float[Tensor, "batch pos channel"], width: int) -> Float[Tensor, "batch pos head width"]:
        """Key/value heads, each repeated for the query heads of its group."""
        return self.heads(x, width).repeat_interleave(self.cfg.n_heads // self.cfg.n_key_value_heads, dim=2)

    def read_out(
        self, read: Float[Tensor, "batch pos head d_v"], beside: Float[Tensor, "batch pos head d_v"] | None
    ) -> Float[Tensor, "batch pos head d_v"]:
        """RMSNorm per head; `beside` is the gate before its SiLU."""
        return self.norm(read) if beside is None else self.norm(read, beside)
