"""Rule name -> mixer class. A new rule is one file, named here."""

from hooked_recurrent.mixers.base import RecurrentMixer
from hooked_recurrent.mixers.delta_net import DeltaNet
from hooked_recurrent.mixers.gated_delta_net import GatedDeltaNet
from hooked_recurrent.mixers.gated_linear_attention import GatedLinearAttention
from hooked_recurrent.mixers.kimi_delta_attention import KimiDeltaAttention
from hooked_recurrent.mixers.mamba2 import Mamba2
from hooked_recurrent.mixers.rwkv7 import RWKV7

MIXERS: dict[str, type[RecurrentMixer]] = {
    mixer.Config.rule: mixer
    for mixer in (GatedDeltaNet, Mamba2, RWKV7, DeltaNet, GatedLinearAttention, KimiDeltaAttention)
}
