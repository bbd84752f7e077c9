"""The MLPs of the blocks, with transformer_lens's hook names. Every kind is called alike; RWKV's also remembers a position."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_recurrent.config import ModelConfig
from hooked_recurrent.hooks import RecurrentHookPoint
from hooked_recurrent.layers.linear import Linear
from hooked_recurrent.layers.token_shift import shift_tails, token_shift
from hooked_recurrent.state import Shapes

Tail = Float[Tensor, "batch_or_1 one d_model"] | None
"""The last position that the MLP of an earlier call saw; None for a kind that looks at no other position."""


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x).

    Hooks: hook_pre (gate x), hook_pre_linear (up x), hook_post (their product), all [batch, pos, d_mlp].
    """

    def __init__(self, d_model: int, d_mlp: int):
        super().__init__()
        self.gate = Linear(d_model, d_mlp, bias=False)
        self.up = Linear(d_model, d_mlp, bias=False)
        self.down = Linear(d_mlp, d_model, bias=False)
        self.hook_pre, self.hook_pre_linear = RecurrentHookPoint(), RecurrentHookPoint()
        self.hook_post = RecurrentHookPoint()

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """What each neuron adds to the residual stream."""
        return self.down.weight.T

    def remembers(self) -> Shapes:
        """Nothing."""
        return {}

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], tail: Tail, stops: tuple[int, ...]
    ) -> tuple[Float[Tensor, "batch pos d_model"], list[Tail]]:
        """The MLP's contribution to the residual stream; it keeps no tail."""
        pre, pre_linear = self.hook_pre(self.gate(x)), self.hook_pre_linear(self.up(x))
        gated = nn.functional.silu(pre)
        post = gated * pre_linear if torch.is_grad_enabled() else gated.mul_(pre_linear)
        return self.down(self.hook_post(post)), [None] * len(stops)


class ChannelMix(nn.Module):
    """RWKV-7's MLP: down(relu(up x')^2) with x' = x + mix * (position before - x). See Peng et al. 2025, arXiv:2503.14456.

    Hooks: hook_pre (up x'), hook_post (after relu and square), both [batch, pos, d_mlp].
    """

    def __init__(self, d_model: int, d_mlp: int):
        super().__init__()
        self.mix = nn.Parameter(torch.linspace(1, 0, d_model))
        self.up = Linear(d_model, d_mlp, bias=False)
        self.down = Linear(d_mlp, d_model, bias=False)
        self.hook_pre, self.hook_post = RecurrentHookPoint(), RecurrentHookPoint()

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """What each neuron adds to the residual stream."""
        return self.down.weight.T

    def remembers(self) -> Shapes:
        """The last position."""
        return {"mlp_tail": (1, len(self.mix))}

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], tail: Tail, stops: tuple[int, ...]
    ) -> tuple[Float[Tensor, "batch pos d_model"], list[Tail]]:
        """The MLP's contribution to the residual stream, and per stop the position before what comes next."""
        pre = self.hook_pre(self.up(torch.addcmul(x, token_shift(x, tail), self.mix)))
        return self.down(self.hook_post(pre.relu().square())), list(shift_tails(x, tail, stops))


def make_mlp(cfg: ModelConfig) -> SwiGLU | ChannelMix | None:
    """The MLP of a block, of the kind that the model's config names; None where it has none."""
    if cfg.d_mlp is None:
        return None
    return (ChannelMix if cfg.mlp == "channel_mix" else SwiGLU)(cfg.d_model, cfg.d_mlp)
