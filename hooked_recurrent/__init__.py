"""Open the matrix memory of recurrent language models: see every write into it, and change it."""

from hooked_recurrent.cache import RecurrentCache
from hooked_recurrent.config import AttentionConfig, MixerConfig, ModelConfig
from hooked_recurrent.edits import ActivationEdit, Edits, StateEdit, WriteEdit, load_edits, save_edits
from hooked_recurrent.factors import Factors
from hooked_recurrent.hooks import reads_only
from hooked_recurrent.mixers.delta_net import DeltaNetConfig
from hooked_recurrent.mixers.gated_delta_net import GatedDeltaNetConfig
from hooked_recurrent.mixers.gated_linear_attention import GatedLinearAttentionConfig
from hooked_recurrent.mixers.kimi_delta_attention import KimiDeltaAttentionConfig
from hooked_recurrent.mixers.mamba2 import Mamba2Config
from hooked_recurrent.mixers.rwkv7 import RWKV7Config
from hooked_recurrent.model import HookedRecurrentModel
from hooked_recurrent.state import LayerState, RecurrentState

__version__ = "0.1.0"
__all__ = [
    "ActivationEdit",
    "AttentionConfig",
    "DeltaNetConfig",
    "Edits",
    "Factors",
    "GatedDeltaNetConfig",
    "GatedLinearAttentionConfig",
    "HookedRecurrentModel",
    "KimiDeltaAttentionConfig",
    "LayerState",
    "Mamba2Config",
    "MixerConfig",
    "ModelConfig",
    "RWKV7Config",
    "RecurrentCache",
    "RecurrentState",
    "StateEdit",
    "WriteEdit",
    "load_edits",
    "reads_only",
    "save_edits",
]
