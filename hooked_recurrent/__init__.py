"""Open the matrix memory of recurrent language models: see every write into it, and change it."""

from hooked_recurrent.cache import RecurrentCache
from hooked_recurrent.config import AttentionConfig, GatedDeltaNetConfig, Mamba2Config, MixerConfig, ModelConfig
from hooked_recurrent.edits import WriteEdit
from hooked_recurrent.factors import Factors
from hooked_recurrent.hooks import reads_only
from hooked_recurrent.model import HookedRecurrentModel
from hooked_recurrent.state import LayerState, RecurrentState

__version__ = "0.1.0"
__all__ = [
    "AttentionConfig",
    "Factors",
    "GatedDeltaNetConfig",
    "HookedRecurrentModel",
    "LayerState",
    "Mamba2Config",
    "MixerConfig",
    "ModelConfig",
    "RecurrentCache",
    "RecurrentState",
    "WriteEdit",
    "reads_only",
]
