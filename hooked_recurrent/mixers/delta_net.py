"""DeltaNet (Yang, Wang, Zhang, Shen, Kim 2024, arXiv:2406.06484), as in flash-linear-attention.

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T          o_t = S_t^T q_t
    beta_t = sigmoid(W_b x_t), or twice that where negative eigenvalues are allowed (arXiv:2411.12537)

In the roles of factors.py: log_decay 0, nothing is forgotten but by the erase; erase -beta_t k_t; probe k_t; write key k_t;
write value beta_t v_t. q, k, v come out of a short causal convolution each; q and k are L2-normalised per head and q is
divided by sqrt(d_k). After the read: RMSNorm per head, gated where the model has an output gate, then W_O.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from hooked_recurrent.config import MixerConfig, require_positive
from hooked_recurrent.factors import Factors, state_dtype
from hooked_recurrent.hooks import RecurrentHookPoint
from hooked_recurrent.layers.conv import ShortConvs
from hooked_recurrent.layers.linear import Linear
from hooked_recurrent.layers.norm import GatedRMSNorm, RMSNorm, l2_normalize
from hooked_recurrent.mixers.base import Call, RecurrentMixer
from hooked_recurrent.state import LayerState, Shapes


@dataclass(frozen=True)
class DeltaNetConfig(MixerConfig):
    """Heads of a DeltaNet mixer (Yang et al. 2024, arXiv:2406.06484)."""

    n_heads: int
    """Heads; the state, the writes and every role factor have this many."""
    d_k: int
    """Width of the side of the state that the query contracts."""
    d_v: int
    """Width of the side of the state that leaves through W_O."""
    conv_size: int = 4
    """Taps of the short causal convolutions over q, k and v."""
    learned_beta: bool = True
    """Whether the write strength is projected from the input; if not, it is 1."""
    negative_eigenvalues: bool = False
    """Whether the write strength is doubled, so that an erase can turn what it removes into its negative."""
    output_gate: bool = False
    """Whether what is read is gated before W_O."""
    norm_eps: float = 1e-6
    """Epsilon of the RMSNorm before W_O."""

    rule: ClassVar[str] = "delta_net"

    def __post_init__(self) -> None:
        require_positive("DeltaNetConfig", n_heads=self.n_heads, d_k=self.d_k, d_v=self.d_v)
        require_positive("DeltaNetConfig", conv_size=self.conv_size, norm_eps=self.norm_eps)


class DeltaNet(RecurrentMixer):
    """The mixer of a DeltaNet layer.

    Upstream hooks, before those of `RecurrentMixer`:

        hook_q, hook_k   after the convolution, before the L2 norm    [batch, pos, head, d_k]
        hook_v           after the convolution                        [batch, pos, head, d_v]
        hook_beta        write strength in (0, 1), (0, 2) if doubled  [batch, pos, head]
    """

    Config = DeltaNetConfig
    cfg: DeltaNetConfig

    def __init__(self, cfg: DeltaNetConfig, d_model: int, layer: int):
        super().__init__(cfg, d_model, layer)
        keys, values = cfg.n_heads * cfg.d_k, cfg.n_heads * cfg.d_v
        self.query, self.key = Linear(d_model, keys, bias=False), Linear(d_model, keys, bias=False)
        self.value, self.out = Linear(d_model, values, bias=False), Linear(values, d_model, bias=False)
        self.beta = Linear(d_model, cfg.n_heads, bias=False) if cfg.learned_beta else None
        self.gate = Linear(d_model, values, bias=False) if cfg.output_gate else None
        self.convs = ShortConvs([keys, keys, values], cfg.conv_size)
        self.norm = GatedRMSNorm(cfg.d_v, cfg.norm_eps) if cfg.output_gate else RMSNorm(cfg.d_v, cfg.norm_eps, 0.0)
        self.hook_q, self.hook_k = RecurrentHookPoint(), RecurrentHookPoint()
        self.hook_v, self.hook_beta = RecurrentHookPoint(), RecurrentHookPoint()

    def remembers(self) -> Shapes:
        """The matrix memory and the last inputs of the convolutions."""
        return super().remembers() | {"conv_tail": self.convs.tail_shape}

    def project(
        self, x: Float[Tensor, "batch pos d_model"], state: LayerState, call: Call
    ) -> tuple[Factors, Tensor | None, list[LayerState]]:
        """x to the six roles; the gate, if there is one, goes along to `read_out`."""
        cfg = self.cfg
        (query, key, value), tails = self.convs([self.query(x), self.key(x), self.value(x)], state.conv_tail, call.stops)
        query, key = self.hook_q(self.heads(query, cfg.d_k)), self.hook_k(self.heads(key, cfg.d_k))
        value = self.hook_v(self.heads(value, cfg.d_v))
        zero = 0 * value[..., 0]  # a constant in the graph, so that the hooks on constants have gradients too
        beta = 1 + zero if self.beta is None else self.beta(x).sigmoid()
        beta = self.hook_beta(2 * beta if cfg.negative_eigenvalues else beta)
        factors = Factors(
            log_decay=zero.to(state_dtype(x.dtype)),
            write_key=l2_normalize(key),
            write_value=beta[..., None] * value,
            query=l2_normalize(query) * cfg.d_k**-0.5,
            erase_strength=-beta,
        )
        gate = None if self.gate is None else self.heads(self.gate(x), cfg.d_v)
        return factors, gate, [LayerState(conv_tail=tail) for tail in tails]

    def read_out(
        self, read: Float[Tensor, "batch pos head d_v"], beside: Float[Tensor, "batch pos head d_v"] | None
    ) -> Float[Tensor, "batch pos head d_v"]:
        """RMSNorm per head; `beside` is the gate before its SiLU."""
        return self.norm(read) if beside is None else self.norm(read, beside)
