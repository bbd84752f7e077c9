"""What every test shares: no network, one thread per worker, and a hypothesis profile that does not watch the clock."""

import importlib
import os
import sys

# Set before torch, transformers and matplotlib read them; a test that tried the network would hang a closed machine.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# Triton decides as it is imported whether kernels are compiled for a GPU or interpreted on the CPU; the tests interpret them.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import HealthCheck, settings

# Where flash-linear-attention is installed, transformers binds its Triton kernels as these modules are imported, even on a
# machine that has no GPU to run them. The tests compare with transformers' own code, so it must not find the package.
sys.modules["fla"] = None  # type: ignore[assignment]
for family in ("qwen3_5", "qwen3_next", "kimi_linear", "mamba2"):
    importlib.import_module(f"transformers.models.{family}.modeling_{family}")
del sys.modules["fla"]

# Timing varies with what else the machine does, so only the number of examples bounds a property test. The same
# examples every run: a red suite is then the change's fault, never the draw's.
settings.register_profile(
    "house", deadline=None, max_examples=20, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("house")


@pytest.fixture(autouse=True, scope="session")
def _one_thread_per_worker():
    """Keep each xdist worker on one core, and undo nothing: the process ends with the session."""
    import torch

    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)
    yield


@pytest.fixture(autouse=True)
def _same_seed_for_every_test():
    """Seed torch's global generator, so that a test gives the same numbers alone, in order and in parallel."""
    import torch

    torch.manual_seed(0)
