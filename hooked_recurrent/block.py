"""One residual block: norm, mixer (recurrent or softmax), norm, MLP; the block does not know which rule it holds.

Where the model has no MLPs (Mamba-2), the block is its first half: no ln2, no mlp, no hook_resid_mid, no hook_mlp_out.
"""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor, nn

from hooked_recurrent.config import ATTENTION, ModelConfig
from hooked_recurrent.factors import picked
from hooked_recurrent.hooks import RecurrentHookPoint, in_use
from hooked_recurrent.layers.attention import GatedAttention
from hooked_recurrent.layers.mlp import make_mlp
from hooked_recurrent.layers.norm import make_norm
from hooked_recurrent.mixers.base import Call
from hooked_recurrent.mixers.registry import MIXERS
from hooked_recurrent.state import LayerState, Shapes


class Block(nn.Module):
    """resid_pre -> + mixer(ln1) -> resid_mid -> + mlp(ln2) -> resid_post. A softmax layer's mixer is called attn."""

    hook_out_is_single_residual_stream = True
    """transformer_lens 4 reads logits only from models whose blocks say so."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        kind = cfg.layer_types[layer]
        self.ln1 = make_norm(cfg)
        self.ln2 = None if cfg.d_mlp is None else make_norm(cfg)
        if kind == ATTENTION:
            assert cfg.attention is not None  # ModelConfig checked it
            self.attn = GatedAttention(cfg.attention, cfg.d_model)
        else:
            self.mixer = MIXERS[kind](cfg.mixer, cfg.d_model, layer)
        self.mlp = make_mlp(cfg)
        self.hook_resid_pre, self.hook_mixer_out = RecurrentHookPoint(), RecurrentHookPoint()
        if self.mlp is not None:
            self.hook_resid_mid, self.hook_mlp_out = RecurrentHookPoint(), RecurrentHookPoint()
        self.hook_resid_post = RecurrentHookPoint()

    @property
    def recurrent(self) -> bool:
        """Whether this block has a matrix memory."""
        return hasattr(self, "mixer")

    @property
    def can_fan_out(self) -> bool:
        """Whether the mixer may read once for many rows: no function is attached that would miss their own activations."""
        return self.recurrent and not in_use(self)

    @property
    def can_pick(self) -> bool:
        """Whether what follows the read may run at some positions alone: none looks at another, and no function at any."""
        return not (in_use(self) or (self.mlp is not None and self.mlp.remembers()))

    def remembers(self) -> Shapes:
        """What the state of this layer holds."""
        mixer = self.mixer if self.recurrent else self.attn
        return mixer.remembers() | ({} if self.mlp is None else self.mlp.remembers())

    @property
    def W_O(self) -> Float[Tensor, "head d_v d_model"]:
        """The output projection of the block's mixer, per head."""
        return self.mixer.W_O if self.recurrent else self.attn.W_O

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], state: LayerState, call: Call
    ) -> tuple[Float[Tensor, "rows some d_model"], list[LayerState]]:
        """One block over the positions of a call, and its state after each of `call.stops`; see `Call.rows` and `Call.at`."""
        resid = self.hook_resid_pre(resid)
        normalized = self.ln1(resid)
        if self.recurrent:
            mixed, states = self.mixer(normalized, state, call)
        else:
            mixed, states = self.attn(normalized, state, call.clock.positions, call.stops)
            mixed = mixed if call.at is None else picked(mixed, call.at)
        resid = resid if call.at is None else picked(resid, call.at)
        resid = resid + self.hook_mixer_out(mixed)
        if self.mlp is not None and self.ln2 is not None:
            resid = self.hook_resid_mid(resid)
            added, tails = self.mlp(self.ln2(resid), state.mlp_tail, call.stops)
            states = [replace(entry, mlp_tail=tail) for entry, tail in zip(states, tails, strict=True)]
            resid = resid + self.hook_mlp_out(added)
        return self.hook_resid_post(resid), states
