"""The convolution kernel, interpreted, against ShortConv in float64 on the same (rounded) inputs."""

import pytest
import torch
from torch import nn

from hooked_recurrent.layers import conv_kernel
from hooked_recurrent.layers.conv import ShortConv, ShortConvs
from hooked_recurrent.layers.conv_kernel import triton_short_conv

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """A kernel that reads what nobody wrote, or leaves a gap in its output, gives NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def make(channels, taps, bias, dtype):
    """A ShortConv in float64 whose parameters `dtype` can hold, and those parameters."""
    conv = ShortConv(channels, taps, bias).double()
    if bias:
        nn.init.normal_(conv.bias)
    for parameter in conv.parameters():
        parameter.data = parameter.data.to(dtype).double().requires_grad_(False)
        parameter.requires_grad_(False)
    return conv, conv.weight.to(dtype), None if conv.bias is None else conv.bias.to(dtype)


def check(conv, weight, bias, x, tail):
    out, new_tail = triton_short_conv(x, tail, weight, bias)
    expected, padded = conv(x.double(), None if tail is None else tail.double())
    (expected_tail,) = conv.tails(padded, (x.shape[1],))
    assert out.dtype == new_tail.dtype == x.dtype
    assert error(out, expected) < BOUNDS[x.dtype]
    assert torch.equal(new_tail.double(), expected_tail)  # a tail is copied, nothing may be rounded


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 4, 16, 37])
@pytest.mark.parametrize("taps", [2, 4, 7])
@pytest.mark.parametrize("with_tail", [False, True])
def test_equals_short_conv(with_tail, taps, length, dtype):
    """Also stretches shorter than the tail, of which an old part then stays in the new one."""
    conv, weight, bias = make(140, taps, with_tail, dtype)
    x = torch.randn(2, length, 140).to(dtype)
    check(conv, weight, bias, x, torch.randn(2, taps - 1, 140).to(dtype) if with_tail else None)


@pytest.mark.parametrize("channels", [1, 3, 128, 300])
@pytest.mark.parametrize("length", [1, 18])
def test_any_number_of_channels(channels, length):
    conv, weight, bias = make(channels, 4, True, torch.float32)
    check(conv, weight, bias, torch.randn(3, length, channels), torch.randn(3, 3, channels))


def test_a_single_tap_has_no_tail():
    conv, weight, bias = make(10, 1, True, torch.float32)
    x = torch.randn(2, 5, 10)
    check_without_tail, new_tail = triton_short_conv(x, None, weight, bias)
    assert new_tail.shape == (2, 0, 10)
    assert error(check_without_tail, conv(x.double(), None)[0]) < 1e-4
    assert error(triton_short_conv(x, torch.zeros(2, 0, 10), weight, bias)[0], conv(x.double(), None)[0]) < 1e-4


def test_one_tail_for_every_row():
    conv, weight, bias = make(20, 4, False, torch.float32)
    check(conv, weight, bias, torch.randn(3, 2, 20), torch.randn(1, 3, 20))


def test_any_strides():
    """A slice of a joined projection and of joined tails, as ShortConvs hands them out; then a strided last axis."""
    conv, weight, bias = make(20, 4, True, torch.float32)
    joined, tails = torch.randn(2, 7, 60), torch.randn(2, 3, 60)
    check(conv, weight, bias, joined[..., 20:40], tails[..., 20:40])
    check(conv, weight, bias, torch.randn(2, 20, 7).mT, torch.randn(2, 20, 3).mT)
    check(conv, weight.mT.contiguous().mT, bias, joined[:, ::2, :20], tails[::1, :, 40:])
    check(conv, weight, torch.stack([bias, bias], dim=1)[:, 0], joined[..., :20], None)


def test_pieces_go_on_from_their_tails():
    convs = ShortConvs([12, 8], 4)
    parts = [torch.randn(2, 9, 12), torch.randn(2, 9, 8)]
    for part, conv in zip(parts, convs.parts, strict=True):
        whole, last = triton_short_conv(part, None, conv.weight.detach(), None)
        pieces, tail = [], None
        for piece in part.split([1, 1, 2, 5], dim=1):
            out, tail = triton_short_conv(piece, tail, conv.weight.detach(), None)
            pieces.append(out)
        assert error(torch.cat(pieces, dim=1), whole.double()) < 1e-6
        assert torch.equal(tail, last)


def test_dtypes_widen_as_in_torch():
    """A float32 tail or weight beside bfloat16 inputs: the kernel answers in the dtype of ShortConv."""
    x, weight = torch.randn(1, 2, 8).bfloat16(), torch.randn(8, 4)
    for tail, taps in ((torch.randn(1, 3, 8), weight.bfloat16()), (torch.randn(1, 3, 8).bfloat16(), weight)):
        conv = ShortConv(8, 4)
        conv.weight = nn.Parameter(taps, requires_grad=False)
        expected, padded = conv(x, tail)
        out, new_tail = triton_short_conv(x, tail, taps)
        assert out.dtype == expected.dtype and new_tail.dtype == padded.dtype
        assert error(out, expected.double()) < 1e-2
        assert torch.equal(new_tail, padded[:, -3:])


def test_what_is_refused():
    x, weight = torch.randn(2, 3, 8), torch.randn(8, 4)
    with pytest.raises(ValueError, match="at least one position"):
        triton_short_conv(x[:, :0], None, weight)
    with pytest.raises(ValueError, match="computes in float32"):
        triton_short_conv(x.double(), None, weight)
    with pytest.raises(ValueError, match=r"expected a tail \(2, 3, 8\) or one row of it, got \(2, 2, 8\)"):
        triton_short_conv(x, torch.zeros(2, 2, 8), weight)
    out, _ = triton_short_conv(x.requires_grad_(), None, weight)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        out.sum().backward()


@pytest.mark.parametrize("with_tail", [False, True])
def test_the_operator_is_what_it_says(with_tail):
    x, weight = torch.randn(2, 3, 8), torch.randn(8, 4)
    given = (x, torch.randn(2, 3, 8), weight, torch.randn(8)) if with_tail else (x, None, weight, None)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.hooked_recurrent.short_conv.default, given, test_utils=checks)
    assert conv_kernel.PUBLISHED_TAPS == 4
