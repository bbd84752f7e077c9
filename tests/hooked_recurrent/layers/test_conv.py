"""The short convolution against torch's grouped Conv1d, whole and in pieces."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hooked_recurrent.layers.conv import ShortConv, ShortConvs
from tests.hooked_recurrent.models import distance


def reference(conv, x):
    """silu of a depthwise Conv1d padded on the left, in [batch, channel, pos]."""
    channels, taps = conv.weight.shape
    theirs = nn.Conv1d(
        channels, channels, taps, groups=channels, padding=taps - 1, bias=conv.bias is not None, dtype=x.dtype
    )
    theirs.weight.data = conv.weight.data[:, None]
    if conv.bias is not None:
        theirs.bias.data = conv.bias.data
    return nn.functional.silu(theirs(x.mT)[..., : x.shape[1]]).mT


@pytest.mark.parametrize("taps", [1, 2, 4, 7])
@pytest.mark.parametrize("length", [1, 3, 20])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_conv1d(taps, length, bias):
    conv = ShortConv(6, taps, bias).double()
    if bias:
        assert conv.bias.eq(0).all()
        nn.init.normal_(conv.bias)
    assert conv.taps == taps
    x = torch.randn(2, length, 6, dtype=torch.float64)
    out, tails = conv(x, None)
    assert distance(out, reference(conv, x)) <= 1e-12 and tails == []


@given(st.integers(1, 5), st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_pieces_go_on_from_their_tails(taps, sizes):
    conv = ShortConv(3, taps).double()
    x = torch.randn(2, sum(sizes), 3, dtype=torch.float64)
    pieces, tail = [], None
    for piece in x.split(sizes, dim=1):
        out, (tail,) = conv(piece, tail, (piece.shape[1],))
        pieces.append(out)
    assert distance(torch.cat(pieces, dim=1), reference(conv, x)) <= 1e-12


def test_starts_as_conv1d_does():
    """Uniform between -1/sqrt(taps) and +1/sqrt(taps), torch's own start for a depthwise convolution."""
    weight = ShortConv(2000, 4).weight
    assert weight.abs().max() <= 0.5 and abs(weight.std().item() - 0.5 / 3**0.5) < 0.01


def test_gradients():
    conv = ShortConv(2, 3).double()
    x = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    tail = torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, tail, weight: conv(x, tail)[0], (x, tail, conv.weight))


def test_tails_after_several_stops():
    conv = ShortConv(3, 4)
    x = torch.randn(2, 9, 3)
    for stop, tail in zip((0, 2, 9), conv(x, None, (0, 2, 9))[1], strict=True):
        assert torch.equal(tail, torch.cat([torch.zeros(2, 3, 3), x], dim=1)[:, stop : stop + 3])
        assert tail.untyped_storage().nbytes() == 2 * 3 * 3 * 4  # a state must not keep a whole text alive


def test_several_convolutions_are_one_each_with_their_tails_side_by_side():
    convs = ShortConvs([3, 2, 4], 4).double()
    parts = [torch.randn(2, 9, width, dtype=torch.float64) for width in (3, 2, 4)]
    outs, (first, tail) = convs(parts, None, (0, 6))
    for conv, part, out in zip(convs.parts, parts, outs, strict=True):
        assert distance(out, reference(conv, part)) <= 1e-12
    assert convs.tail_shape == tuple(tail.shape[1:]) == (3, 9) and first.eq(0).all()
    assert torch.equal(tail, torch.cat([part[:, 3:6] for part in parts], dim=-1))
    rest, _ = convs([part[:, 6:] for part in parts], tail)
    for out, whole in zip(rest, outs, strict=True):
        assert distance(out, whole[:, 6:]) <= 1e-12


@pytest.mark.parametrize("with_tail", [False, True])
def test_blocks_change_no_number(with_tail, monkeypatch):
    """Without a gradient to record a long input goes block by block; here three positions at a time."""
    monkeypatch.setattr("hooked_recurrent.layers.conv.BLOCK_BYTES", 3 * 2 * 5 * 8)
    conv = ShortConv(5, 4, bias=True).double()
    x = torch.randn(2, 20, 5, dtype=torch.float64)
    tail = torch.randn(1, 3, 5, dtype=torch.float64) if with_tail else None
    expected, stops = conv(x, tail, (1, 7))
    with torch.no_grad():
        found, also = conv(x, tail, (1, 7))
    assert distance(found, expected) <= 1e-14
    assert all(torch.equal(a, b) for a, b in zip(stops, also, strict=True))
