"""Tile helpers, each in a kernel of its own, against torch."""

import pytest
import torch
import triton
import triton.language as tl

from hooked_recurrent.scan.kernels.tiles import (
    decays_between,
    grams_per_channel,
    inverse,
    load_square,
    over_chunk,
    since_start,
    store_square,
    until_end,
)


@triton.jit
def inverse_kernel(matrix, out, C: tl.constexpr):
    store_square(out, inverse(load_square(matrix, C), "ieee"), C)


@triton.jit
def between_kernel(log_decay, out, stride, count, exclusive: tl.constexpr, C: tl.constexpr):
    store_square(out, decays_between(log_decay, stride, tl.arange(0, C), count, exclusive), C)


@triton.jit
def rows_kernel(log_decay, start, before, end, over, count, width, C: tl.constexpr):
    places, columns = tl.arange(0, C), tl.arange(0, 16)
    at = places[:, None] * 16 + columns[None, :]
    tl.store(start + at, since_start(log_decay, width, places, count, columns, width, False))
    tl.store(before + at, since_start(log_decay, width, places, count, columns, width, True))
    tl.store(end + at, until_end(log_decay, width, places, count, columns, width))
    tl.store(over + columns, over_chunk(log_decay, width, places, count, columns, width))


@triton.jit
def channels_kernel(left, asks, right, log_decay, on_left, on_asks, count, d_k, C: tl.constexpr, BK: tl.constexpr):
    first, second = grams_per_channel(left, d_k, asks, d_k, right, d_k, log_decay, d_k, count, d_k, C, BK)
    store_square(on_left, first, C)
    store_square(on_asks, second, C)


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("similar", [False, True])
def test_inverse_of_a_triangular_matrix(size, similar):
    """Keys that repeat fill the triangle with numbers near -1: powers of such a matrix reach 1e17, its inverse stays small."""
    matrix = (-0.99 if similar else 0.3) * torch.rand(size, size).pow(0.01 if similar else 1).tril(-1)
    out = torch.full_like(matrix, torch.nan)
    inverse_kernel[(1,)](matrix, out, C=size)
    expected = torch.linalg.inv(torch.eye(size, dtype=torch.float64) - matrix.double())
    assert (out - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("count", [11, 16])
def test_scalar_decays_between_places(count, exclusive):
    log_decay = -torch.rand(16, 2)  # the second column is somebody else's
    out = torch.full((16, 16), torch.nan)
    between_kernel[(1,)](log_decay, out, 2, count, exclusive=exclusive, C=16)
    own = log_decay[:, 0].double().where(torch.arange(16) < count, torch.zeros(16, dtype=torch.float64))
    total = own.cumsum(0)
    upto = total - own if exclusive else total
    expected = (upto[:, None] - total[None, :]).exp().tril(-1 if exclusive else 0)
    assert torch.allclose(out.double(), expected, atol=1e-6)


@pytest.mark.parametrize("count", [5, 16])
def test_decays_of_rows(count):
    width = 13
    log_decay = -torch.rand(16, width)
    start, before, end, over = (torch.full(shape, torch.nan) for shape in [(16, 16)] * 3 + [(16,)])
    rows_kernel[(1,)](log_decay, start, before, end, over, count, width, C=16)
    total = log_decay[:count].double().cumsum(0)
    assert torch.allclose(start[:count, :width].double(), total.exp(), atol=1e-6)
    assert torch.allclose(before[:count, :width].double(), (total - log_decay[:count]).exp(), atol=1e-6)
    assert torch.allclose(end[:count, :width].double(), (total[-1] - total).exp(), atol=1e-6)
    assert torch.allclose(over[:width].double(), total[-1].exp(), atol=1e-6)


def test_grams_with_a_decay_per_channel():
    count, d_k = 13, 20
    left, asks, right = torch.randn(3, 16, d_k).unbind()
    log_decay = -torch.rand(16, d_k)
    log_decay[4] = -500.0
    on_left, on_asks = torch.full((2, 16, 16), torch.nan).unbind()
    channels_kernel[(1,)](left, asks, right, log_decay, on_left, on_asks, count, d_k, C=16, BK=16)
    for t in range(16):
        for j in range(16):
            inside = max(t, j) < count
            over = log_decay[j + 1 : t + 1].double().sum(0).exp()
            asked = (asks[t] * over * right[j]).sum() if inside and j <= t else torch.zeros(())
            over = log_decay[j + 1 : t].double().sum(0).exp()
            found = (left[t] * over * right[j]).sum() if inside and j < t else torch.zeros(())
            assert on_asks[t, j].item() == pytest.approx(asked.item(), abs=1e-5)
            assert on_left[t, j].item() == pytest.approx(found.item(), abs=1e-5)
