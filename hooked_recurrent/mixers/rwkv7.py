"""RWKV-7 "Goose" (Peng et al. 2025, arXiv:2503.14456, section 4), as in RWKV-LM's x070 and flash-linear-attention.

    S_t = diag(w_t) S_{t-1} - (kappa_t * iclr_t) (kappa_t^T S_{t-1}) + k_t v_t^T          o_t = S_t^T r_t
    log w_t = -exp(-1/2) sigmoid(decay(x)),  kappa_t = (key * removal) / |key * removal|,  k_t = key * (1 + (iclr_t - 1) * a)
    v_t = value + (value of layer 0 - value) * nu_t

In the roles of factors.py: log_decay log w_t, one number per key channel; erase -kappa_t * iclr_t; probe kappa_t; write key k_t
(the replacement key); write value v_t; query r_t (the receptance). Papers and checkpoints keep the transposed state.
Every projection reads its own mix of a position and the one before it. After the read: normalisation of every head, the
bonus (r_t . (k_t * u)) v_t that looks at the present token past the memory, a gate, then W_O.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_recurrent.config import MixerConfig, require_positive
from hooked_recurrent.factors import Factors, state_dtype
from hooked_recurrent.hooks import RecurrentHookPoint
from hooked_recurrent.layers.linear import Linear, linear
from hooked_recurrent.layers.token_shift import shift_tails, token_shift
from hooked_recurrent.mixers.base import Call, RecurrentMixer
from hooked_recurrent.state import LayerState, Shapes

Beside = tuple[Tensor, Tensor, Tensor, Tensor]
"""What goes past the memory: receptance, replacement key and value for the bonus, and the gate."""

FASTEST_LOG_DECAY = -math.exp(-0.5)


@dataclass(frozen=True)
class RWKV7Config(MixerConfig):
    """Heads of an RWKV-7 mixer (its "time mix") and the ranks of its low-rank projections."""

    n_heads: int
    """Heads; the state, the writes and every role factor have this many."""
    d_k: int
    """Width of every head: the side of the state that the receptance contracts."""
    d_v: int
    """Width of every head on the value side; the architecture has d_v = d_k."""
    decay_rank: int
    """Rank of the projection to the decay."""
    iclr_rank: int
    """Rank of the projection to the in-context learning rate."""
    value_rank: int
    """Rank of the projection that mixes in the values of layer 0."""
    gate_rank: int
    """Rank of the projection to the output gate."""
    norm_eps: float = 64e-5
    """Epsilon of the normalisation of every head after the read."""

    rule: ClassVar[str] = "rwkv7"

    def __post_init__(self) -> None:
        require_positive("RWKV7Config", n_heads=self.n_heads, d_k=self.d_k, d_v=self.d_v, norm_eps=self.norm_eps)
        require_positive("RWKV7Config", decay_rank=self.decay_rank, iclr_rank=self.iclr_rank)
        require_positive("RWKV7Config", value_rank=self.value_rank, gate_rank=self.gate_rank)


class LowRank(nn.Module):
    """bias + up(activation(down x)), the small projections that RWKV-7 makes its gates with."""

    def __init__(
        self,
        d_model: int,
        rank: int,
        width: int,
        activation: Callable[[Tensor], Tensor] | None = None,
        bias: Tensor | None = None,
    ):
        super().__init__()
        self.down, self.up = Linear(d_model, rank, bias=False), Linear(rank, width, bias=False)
        self.activation, self.bias = activation, None if bias is None else nn.Parameter(bias)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos channel"]:
        """Project."""
        low = self.down(x)
        return linear(low if self.activation is None else self.activation(low), self.up.weight, self.bias)


class RWKV7(RecurrentMixer):
    """The mixer of an RWKV-7 layer.

    Upstream hooks, before those of `RecurrentMixer`:

        hook_q, hook_k          receptance and key, before anything is done to them   [batch, pos, head, d_k]
        hook_v                  value, after layer 0's is mixed in                    [batch, pos, head, d_v]
        hook_value_gate         nu, how much of layer 0's; absent in layer 0          [batch, pos, head, d_v]
        hook_iclr               in-context learning rate in (0, 1)                    [batch, pos, head, d_k]
        hook_removal_key        kappa, of length 1: erase and probe                   [batch, pos, head, d_k]
        hook_replacement_key    what the write and the bonus take as key              [batch, pos, head, d_k]

    After hook_read, before hook_z:

        hook_bonus              what is added to the normalised read                  [batch, pos, head, d_v]
        hook_gate               the factor on their sum                               [batch, pos, head, d_v]
    """

    Config = RWKV7Config
    cfg: RWKV7Config

    def __init__(self, cfg: RWKV7Config, d_model: int, layer: int):
        super().__init__(cfg, d_model, layer)
        keys, values = cfg.n_heads * cfg.d_k, cfg.n_heads * cfg.d_v
        ramp, around = torch.linspace(0, 1, keys), torch.linspace(-1, 1, cfg.d_k).repeat(cfg.n_heads)
        for name in ("mix_r", "mix_w", "mix_k", "mix_v", "mix_a", "mix_g"):
            setattr(self, name, nn.Parameter(1 - torch.linspace(0, 1, d_model).sqrt()))
        self.query, self.key = Linear(d_model, keys, bias=False), Linear(d_model, keys, bias=False)
        self.value, self.out = Linear(d_model, values, bias=False), Linear(values, d_model, bias=False)
        # Slow and fast channels in every head, and slower and faster heads, as in RWKV-LM's initialisation.
        slow_to_fast = -5.5 + 6 * ramp.square() + 2.5 * around * around.abs()
        self.decay = LowRank(d_model, cfg.decay_rank, keys, torch.tanh, slow_to_fast)
        self.iclr = LowRank(d_model, cfg.iclr_rank, keys, bias=torch.full((keys,), -0.19))
        if layer > 0:
            self.value_gate = LowRank(d_model, cfg.value_rank, values, bias=torch.full((values,), 0.73))
            self.hook_value_gate = RecurrentHookPoint()
        self.gate = LowRank(d_model, cfg.gate_rank, values, torch.sigmoid)
        self.removal, self.replacement = nn.Parameter(torch.full((keys,), 0.71)), nn.Parameter(torch.ones(keys))
        self.bonus = nn.Parameter(torch.full((cfg.n_heads, cfg.d_k), -0.04))
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(values)), nn.Parameter(torch.zeros(values))
        self.hook_q, self.hook_k, self.hook_v = RecurrentHookPoint(), RecurrentHookPoint(), RecurrentHookPoint()
        self.hook_iclr, self.hook_removal_key = RecurrentHookPoint(), RecurrentHookPoint()
        self.hook_replacement_key = RecurrentHookPoint()
        self.hook_bonus, self.hook_gate = RecurrentHookPoint(), RecurrentHookPoint()

    def remembers(self) -> Shapes:
        """The matrix memory and the last position."""
        return super().remembers() | {"shift_tail": (1, self.d_model)}

    def project(
        self, x: Float[Tensor, "batch pos d_model"], state: LayerState, call: Call
    ) -> tuple[Factors, Beside, list[LayerState]]:
        """x to the six roles; receptance, replacement key, value and gate go along to `read_out`."""
        cfg, shift = self.cfg, token_shift(x, state.shift_tail)
        mixes = torch.stack([self.mix_r, self.mix_w, self.mix_k, self.mix_v, self.mix_a, self.mix_g])
        x_r, x_w, x_k, x_v, x_a, x_g = torch.addcmul(x, shift, mixes[:, None, None]).unbind()
        query = self.hook_q(self.heads(self.query(x_r), cfg.d_k))
        key = self.hook_k(self.heads(self.key(x_k), cfg.d_k))
        value = self._value(x_v, call)
        iclr = self.hook_iclr(self.heads(self.iclr(x_a).sigmoid(), cfg.d_k))
        removal = nn.functional.normalize(key * self.removal.view(-1, cfg.d_k), dim=-1)
        removal = self.hook_removal_key(removal)
        replacement = self.hook_replacement_key(key * (1 + (iclr - 1) * self.replacement.view(-1, cfg.d_k)))
        decay = self.heads(self.decay(x_w), cfg.d_k).to(state_dtype(x.dtype))
        factors = Factors(
            log_decay=FASTEST_LOG_DECAY * decay.sigmoid(),
            write_key=replacement,
            write_value=value,
            query=query,
            erase=-removal * iclr,
            probe=removal,
        )
        tails = [LayerState(shift_tail=tail) for tail in shift_tails(x, state.shift_tail, call.stops)]
        return factors, (query, replacement, value, self.heads(self.gate(x_g), cfg.d_v)), tails

    def _value(self, x: Float[Tensor, "batch pos d_model"], call: Call) -> Float[Tensor, "batch pos head d_v"]:
        """The value with that of the model's first layer mixed in; the first layer leaves its own for the others."""
        value = self.heads(self.value(x), self.cfg.d_v)
        if self.layer == 0:
            call.shared["first_value"] = value = self.hook_v(value)
            return value
        if "first_value" not in call.shared:
            raise ValueError(f"layer {self.layer} mixes in layer 0's values: give what a plain pass left as `shared`")
        mixed_in = self.hook_value_gate(self.heads(self.value_gate(x).sigmoid(), self.cfg.d_v))
        return self.hook_v(value + (call.shared["first_value"] - value) * mixed_in)

    def read_out(
        self, read: Float[Tensor, "batch pos head d_v"], beside: Beside
    ) -> Float[Tensor, "batch pos head d_v"]:
        """Normalise every head, add the bonus and gate."""
        query, key, value, gate = beside
        dtype, rows = read.dtype, read.flatten(0, 1).flatten(1)
        weight, bias = self.norm_weight.to(dtype), self.norm_bias.to(dtype)
        normed = nn.functional.group_norm(rows, self.cfg.n_heads, weight, bias, self.cfg.norm_eps).view_as(read)
        bonus = self.hook_bonus((query * key * self.bonus).sum(-1, keepdim=True) * value)
        return (normed.to(gate.dtype) + bonus) * self.hook_gate(gate)
