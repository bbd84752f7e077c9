"""The kernels of the forward scan, interpreted, against the step reference in float64 on the same (rounded) inputs."""

import pytest
import torch

from hooked_recurrent.scan.kernels.scan import triton_scan
from hooked_recurrent.scan.step import step_scan
from tests.hooked_recurrent.models import random_factors, random_state

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
FORMS = [("none", None), ("none", 2), ("tied", None), ("decoupled", None), ("decoupled", 2)]


def error(out, reference):
    assert out.shape == reference.shape
    return ((out.double() - reference).norm() / reference.norm()).item()


def reference(factors, initial):
    return step_scan(factors.map(lambda tensor: tensor.double()), None if initial is None else initial.double())


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch):
    """Every kernel meets NaN wherever nobody has written."""
    fresh = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: fresh(*a, **k).fill_(float("nan")))


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize(("erase", "terms"), FORMS)
@pytest.mark.parametrize("vector_decay", [False, True])
def test_equals_the_step_reference(vector_decay, erase, terms, strong):
    sizes = {"length": 70 if not vector_decay else 37, "batch": 1, "heads": 2, "d_k": 16, "d_v": 32}
    factors = random_factors(
        **sizes, erase=erase, terms=terms, vector_decay=vector_decay, strong=strong, dtype=torch.float32
    )
    initial = random_state(factors)
    result = triton_scan(factors, initial)
    for out, expected in zip(result[:2], reference(factors, initial), strict=True):
        assert error(out, expected) < TOLERANCE[torch.float32]
