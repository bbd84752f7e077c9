"""Rule name -> mixer class. A new rule adds its line here and in config.MIXER_CONFIGS."""

from collections.abc import Callable

from hooked_recurrent.config import GatedDeltaNetConfig, Mamba2Config
from hooked_recurrent.mixers.base import RecurrentMixer
from hooked_recurrent.mixers.gated_delta_net import GatedDeltaNet
from hooked_recurrent.mixers.mamba2 import Mamba2

MIXERS: dict[str, Callable[..., RecurrentMixer]] = {
    GatedDeltaNetConfig.rule: GatedDeltaNet,
    Mamba2Config.rule: Mamba2,
}
