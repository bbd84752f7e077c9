"""A projection in one product per thread is torch's linear, gradients included."""

import pytest
import torch

from hooked_recurrent.layers import linear as module
from hooked_recurrent.layers.linear import Linear, linear
from tests.hooked_recurrent.models import distance


@pytest.fixture
def split(monkeypatch):
    """Four threads, and no weight too small; how many products were asked for."""
    monkeypatch.setattr(module.torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(module, "LARGE_WEIGHT", 0)
    counts, bmm = [], torch.bmm
    monkeypatch.setattr(module.torch, "bmm", lambda a, b: (counts.append(len(b)), bmm(a, b))[1])
    return counts


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("d_out", "parts"), [(12, 4), (6, 2), (7, 1)])
@pytest.mark.parametrize("rows", [(5,), (1, 1, 5), (2, 3, 5), (4, 8, 5)])
def test_equals_torch(split, rows, d_out, parts, bias):
    layer = Linear(5, d_out, bias=bias).double()
    x = torch.randn(*rows, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    made = layer(x)
    assert split == ([parts] if parts > 1 else [])
    assert made.shape == expected.shape and distance(made, expected) <= 1e-14
    slopes = [torch.autograd.grad(out.sin().sum(), [x, layer.weight], retain_graph=True) for out in (made, expected)]
    assert all(distance(a, b) <= 1e-13 for a, b in zip(*slopes, strict=True))


def test_many_rows_small_weights_and_other_layouts_go_in_one_product(split, monkeypatch):
    weight = torch.randn(12, 5, dtype=torch.float64)
    linear(torch.randn(33, 5, dtype=torch.float64), weight)
    linear(torch.randn(0, 5, dtype=torch.float64), weight)
    linear(torch.randn(1, 5, dtype=torch.float64), weight.T.contiguous().T)
    monkeypatch.setattr(module, "LARGE_WEIGHT", 12 * 5 * 8 + 1)
    linear(torch.randn(1, 5, dtype=torch.float64), weight)
    assert split == []
