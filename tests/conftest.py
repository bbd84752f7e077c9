"""What every test shares: no network, one thread per worker, and a hypothesis profile that does not watch the clock."""

import importlib
import os
import sys
from contextlib import contextmanager

# Set before torch, transformers and matplotlib read them; a test that tried the network would hang a closed machine.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# Triton decides as it is imported whether kernels are compiled for a GPU or interpreted on the CPU; the tests interpret them.
os.environ.setdefault("TRITON_INTERPRET", "1")

import jaxtyping
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


@pytest.fixture(autouse=True)
def _shapes_on_one_rule(request):
    """Under the mark `shapes_on_one_rule`: the shape checks are on for RWKV-7, which has every role, and off for other rules.

    Values are compared for all of them. On a tiny model the checks take longer than all that they check, and what differs
    between rules is checked, with every shape, in the tests of the mixers, of the scan and of the model.
    """
    if request.node.get_closest_marker("shapes_on_one_rule") is None or not hasattr(request.node, "callspec"):
        yield
        return
    from tests.hooked_recurrent.models import STACKS

    given = request.node.callspec.params.values()
    stacks = [
        STACKS.get(value, ()) if isinstance(value, str) else value for value in given if isinstance(value, str | tuple)
    ]
    rules = {rule for stack in stacks for rule in stack if isinstance(rule, str)} & {*STACKS}
    with _shape_checks(not rules or "rwkv7" in rules):
        yield


@pytest.fixture
def as_users_run():
    """Switch the shape checks of the test run off: bad input then meets the library's own errors, as it does for users."""
    with _shape_checks(False):
        yield


@contextmanager
def _shape_checks(wanted: bool):
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", before or not wanted)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
