"""transformers' Qwen3.5 and Mamba-2 in plain torch, as they run without a GPU.

Where flash-linear-attention is installed, transformers binds its Triton kernels as these modules are imported, on any machine.
So they are imported here with that package out of sight, and everything else takes them from here. The package can be imported
afterwards: its own references in plain torch take part in the benchmarks.
"""

import importlib
import sys
import warnings
from types import ModuleType

from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="Triton is not supported on current platform")


def _imported(family: str) -> ModuleType:
    """The modelling module of a family, imported without flash-linear-attention."""
    name = f"transformers.models.{family}.modeling_{family}"
    if name in sys.modules:
        raise ImportError(
            f"{name} was imported before benchmarks/support/plain.py, so it may have bound Triton kernels"
        )
    there = "fla" in sys.modules
    kept = sys.modules.get("fla")
    sys.modules["fla"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(name)
    finally:
        if there:
            sys.modules["fla"] = kept  # type: ignore[assignment]
        else:
            del sys.modules["fla"]


qwen3_5, mamba2 = _imported("qwen3_5"), _imported("mamba2")
Qwen3_5TextConfig, Qwen3_5ForCausalLM = qwen3_5.Qwen3_5TextConfig, qwen3_5.Qwen3_5ForCausalLM
Mamba2Config, Mamba2ForCausalLM = mamba2.Mamba2Config, mamba2.Mamba2ForCausalLM
