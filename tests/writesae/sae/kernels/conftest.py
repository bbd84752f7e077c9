"""Memory that nobody has written is NaN for every kernel's test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """A kernel that reads what nobody wrote, or leaves a gap in its output, gives NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
