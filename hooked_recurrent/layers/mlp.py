"""The SwiGLU MLP of Qwen-style blocks, with transformer_lens's hook names."""

from jaxtyping import Float
from torch import Tensor, nn

from hooked_recurrent.hooks import RecurrentHookPoint


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x).

    Hooks: hook_pre (gate x), hook_pre_linear (up x), hook_post (their product), all [batch, pos, d_mlp].
    """

    def __init__(self, d_model: int, d_mlp: int):
        super().__init__()
        self.gate = nn.Linear(d_model, d_mlp, bias=False)
        self.up = nn.Linear(d_model, d_mlp, bias=False)
        self.down = nn.Linear(d_mlp, d_model, bias=False)
        self.hook_pre, self.hook_pre_linear = RecurrentHookPoint(), RecurrentHookPoint()
        self.hook_post = RecurrentHookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The MLP's contribution to the residual stream."""
        pre, pre_linear = self.hook_pre(self.gate(x)), self.hook_pre_linear(self.up(x))
        return self.down(self.hook_post(nn.functional.silu(pre) * pre_linear))
