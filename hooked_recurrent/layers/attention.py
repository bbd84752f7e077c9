"""The softmax layers of Qwen-style hybrids: q/k norm, partial rotary embedding, grouped heads, a sigmoid output gate.

Hooks of `blocks.{l}.attn`, transformer_lens's names, in firing order:

    hook_q                  before the q norm and the rotation            [batch, pos, head, d_head]
    hook_k, hook_v          k before its norm and the rotation            [batch, pos, kv_head, d_head]
    hook_gate               the output gate before its sigmoid            [batch, pos, head, d_head]
    hook_rot_q, hook_rot_k  after norm and rotation                       as hook_q, hook_k
    hook_attn_scores        log space, masked with -inf; on demand        [batch, head, query_pos, key_pos]
    hook_pattern            softmax of the scores; on demand              [batch, head, query_pos, key_pos]
    hook_z                  gated, just before W_O                        [batch, pos, head, d_head]

key_pos counts every position since the state began, query_pos those of the present call.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_recurrent.config import AttentionConfig
from hooked_recurrent.factors import state_dtype
from hooked_recurrent.hooks import RecurrentHookPoint
from hooked_recurrent.layers.linear import Linear
from hooked_recurrent.layers.norm import RMSNorm
from hooked_recurrent.state import LayerState, Shapes

# Up to as many new positions per row attend to a past that rows share without a copy of it for each; more are faster with one.
FEW = 16


class GatedAttention(nn.Module):
    """Output-gated softmax attention with a key/value cache in its LayerState."""

    def __init__(self, cfg: AttentionConfig, d_model: int):
        super().__init__()
        self.cfg = cfg
        self.q = Linear(d_model, cfg.n_heads * cfg.d_head, bias=cfg.bias)
        self.gate = Linear(d_model, cfg.n_heads * cfg.d_head, bias=cfg.bias)
        self.k = Linear(d_model, cfg.n_key_value_heads * cfg.d_head, bias=cfg.bias)
        self.v = Linear(d_model, cfg.n_key_value_heads * cfg.d_head, bias=cfg.bias)
        self.out = Linear(cfg.n_heads * cfg.d_head, d_model, bias=cfg.bias)
        self.q_norm, self.k_norm = RMSNorm(cfg.d_head, cfg.norm_eps), RMSNorm(cfg.d_head, cfg.norm_eps)
        self.hook_q, self.hook_k, self.hook_v = RecurrentHookPoint(), RecurrentHookPoint(), RecurrentHookPoint()
        self.hook_gate = RecurrentHookPoint()
        self.hook_rot_q, self.hook_rot_k = RecurrentHookPoint(), RecurrentHookPoint()
        self.hook_attn_scores, self.hook_pattern = RecurrentHookPoint(), RecurrentHookPoint()
        self.hook_z = RecurrentHookPoint()

    def remembers(self) -> Shapes:
        """The keys and values of all positions so far."""
        heads = (None, self.cfg.n_key_value_heads, self.cfg.d_head)
        return {"keys": heads, "values": heads}

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """The output projection per head."""
        return self.out.weight.T.unflatten(0, (self.cfg.n_heads, self.cfg.d_head))

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        state: LayerState,
        positions: Int[Tensor, "pos"],
        stops: tuple[int, ...],
    ) -> tuple[Float[Tensor, "batch pos d_model"], list[LayerState]]:
        """Attend over the cached and the new positions; also the cache after each of `stops` new positions."""
        cfg = self.cfg
        query, key, value = (side.unflatten(-1, (-1, cfg.d_head)) for side in (self.q(x), self.k(x), self.v(x)))
        query, key, value = self.hook_q(query), self.hook_k(key), self.hook_v(value)
        gate = self.hook_gate(self.gate(x).unflatten(-1, (-1, cfg.d_head)))
        angles = rotary_angles(positions.to(x.device), cfg.rotary_dims, cfg.rope_theta)
        query = self.hook_rot_q(rotate(self.q_norm(query), angles))
        key = self.hook_rot_k(rotate(self.k_norm(key), angles))
        past, attended = 0, None
        if state.keys is not None and state.values is not None:
            if len(state.keys) < len(key) and key.shape[1] <= FEW and not (stops or self._shows_pattern):
                attended = attend_to_shared(query, key, value, state.keys[0], state.values[0])
            else:
                past, rows = state.keys.shape[1], (len(key), -1, -1, -1)
                key = torch.cat([state.keys.expand(rows), key], dim=1)
                value = torch.cat([state.values.expand(rows), value], dim=1)
        if attended is None:
            attended = self._attend(query, key, value, past)
        z = self.hook_z(attended * gate.sigmoid())
        states = [LayerState(keys=key[:, : past + stop], values=value[:, : past + stop]) for stop in stops]
        return self.out(z.flatten(2)), states

    @property
    def _shows_pattern(self) -> bool:
        return self.hook_attn_scores.in_use or self.hook_pattern.in_use

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, past: int) -> Tensor:
        """softmax(q k / sqrt(d)) v; the pattern is only written out when someone asks for it."""
        group = self.cfg.n_heads // self.cfg.n_key_value_heads
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        length, total = query.shape[2], key.shape[2]
        visible = torch.ones(length, total, dtype=torch.bool, device=query.device).tril(past)
        if not self._shows_pattern:
            mask = None if length == 1 else visible
            attended = nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, enable_gqa=group > 1
            )
            return attended.transpose(1, 2)
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        scores = self.hook_attn_scores((query @ key.mT * self.cfg.d_head**-0.5).masked_fill(~visible, -torch.inf))
        return (self.hook_pattern(scores.softmax(-1)) @ value).transpose(1, 2)


def attend_to_shared(
    query: Float[Tensor, "batch pos head d_head"],
    key: Float[Tensor, "batch pos kv_head d_head"],
    value: Float[Tensor, "batch pos kv_head d_head"],
    past_key: Float[Tensor, "past kv_head d_head"],
    past_value: Float[Tensor, "past kv_head d_head"],
) -> Float[Tensor, "batch pos head d_head"]:
    """Causal attention to the new positions of each row and to one past that all rows share, which is not copied."""
    grouped = query.unflatten(2, (key.shape[2], -1)) * query.shape[-1] ** -0.5
    to_past = torch.einsum("btkgd,pkd->bkgtp", grouped, past_key)
    to_new = torch.einsum("btkgd,bskd->bkgts", grouped, key)
    later = torch.ones(to_new.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
    scores = torch.cat([to_past, to_new.masked_fill(later, -torch.inf)], dim=-1)
    pattern = scores.softmax(-1, dtype=state_dtype(scores.dtype)).to(value.dtype)
    on_past, on_new = pattern.split([len(past_key), key.shape[1]], dim=-1)
    read = torch.einsum("bkgtp,pkd->btkgd", on_past, past_value) + torch.einsum("bkgts,bskd->btkgd", on_new, value)
    return read.flatten(2, 3)


@dataclass(frozen=True)
class Angles:
    """Cosines and sines of the rotary embedding, [pos, 1, rotary_dims], in float32 or wider."""

    cos: Tensor
    sin: Tensor


def rotary_angles(positions: Int[Tensor, "pos"], rotary_dims: int, theta: float) -> Angles:
    """Angles position * theta^(-2 i / rotary_dims), each frequency serving dimension i and i + rotary_dims / 2."""
    exponents = torch.arange(0, rotary_dims, 2, dtype=torch.float32, device=positions.device) / max(rotary_dims, 1)
    angles = positions.to(torch.float32)[:, None] / theta**exponents
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return Angles(angles.cos(), angles.sin())


def rotate(x: Float[Tensor, "batch pos head d_head"], angles: Angles) -> Float[Tensor, "batch pos head d_head"]:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864) of the leading dimensions; the rest pass through."""
    turned, passed = x.split([angles.cos.shape[-1], x.shape[-1] - angles.cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    quarter = torch.cat([-second, first], dim=-1)
    return torch.cat([turned * angles.cos.to(x.dtype) + quarter * angles.sin.to(x.dtype), passed], dim=-1)
