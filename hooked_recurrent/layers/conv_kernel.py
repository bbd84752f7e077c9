"""`ShortConv` as one kernel, for inference: the convolution, SiLU, and the tail that the next call needs.

A program computes a block of positions and channels. A position before the first is looked up in the tail, so nothing is joined
in memory; the programs of the first positions also write the new tail.
"""

from collections.abc import Iterator
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from hooked_recurrent.scan.kernels.device import launching_on, rows_contiguous
from hooked_recurrent.scan.kernels.variants import DTYPES, Case, Variant, register, variants_of

PUBLISHED_TAPS = 4
"""What the models of today have; other numbers compile as they come."""


@triton.jit
@no_type_check  # the tests' type checks would wrap it, and Triton reads the bare function
def _inputs(x, x_row, tail, tail_row, start, places, channels, length, width, PAST: tl.constexpr):
    """Inputs at start + places as float32: from the tail below zero, zero there without one, and zero from `length` on."""
    positions = start + places
    inside = (positions < length)[:, None] & (channels < width)[None, :]
    here = x + start * x_row + places[:, None] * x_row + channels[None, :]
    found = tl.load(here, mask=inside & (positions >= 0)[:, None], other=0.0).to(tl.float32)
    if tail is not None:
        there = tail + (positions + PAST)[:, None] * tail_row + channels[None, :]
        found += tl.load(there, mask=inside & (positions < 0)[:, None], other=0.0).to(tl.float32)
    return found


@triton.jit
@no_type_check
def short_conv_kernel(
    x, x_batch, x_row,
    tail, tail_batch, tail_row,
    weight, weight_row, bias,
    out, new_tail, length, width,
    TAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """One program per row, block of positions and block of channels; what is read is followed by its strides."""
    PAST: tl.constexpr = TAPS - 1
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1).to(tl.int64) * BLOCK_T
    channels = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    places = tl.arange(0, BLOCK_T)
    x += row * x_batch
    if tail is not None:
        tail += row * tail_batch
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    if bias is not None:
        total += tl.load(bias + channels, mask=channels < width, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(TAPS):
        taken = tl.load(weight + channels * weight_row + tap, mask=channels < width, other=0.0).to(tl.float32)
        total += taken[None, :] * _inputs(
            x, x_row, tail, tail_row, start, places + (tap - PAST), channels, length, width, PAST
        )
    inside = (start + places < length)[:, None] & (channels < width)[None, :]
    to = out + (row * length + start) * width + places[:, None] * width + channels[None, :]
    tl.store(to, total * tl.sigmoid(total), mask=inside)
    if PAST > 0:  # known as it compiles
        if start == 0:
            rows = tl.arange(0, BLOCK_TAIL)
            last = _inputs(x, x_row, tail, tail_row, start + length - PAST, rows, channels, length, width, PAST)
            behind = new_tail + (row * PAST + rows)[:, None] * width + channels[None, :]
            tl.store(behind, last, mask=(rows < PAST)[:, None] & (channels < width)[None, :])


def _arguments(
    x: Tensor, tail: Tensor | None, weight: Tensor, bias: Tensor | None, out: Tensor, new_tail: Tensor
) -> dict[str, Any]:
    """Every argument of the kernel. Blocks: one position with many channels when decoding, else a tile of both."""
    length, width = x.shape[1:]
    return {
        "x": x,
        "x_batch": x.stride(0),
        "x_row": x.stride(1),
        "tail": tail,
        "tail_batch": 0 if tail is None or len(tail) == 1 else tail.stride(0),
        "tail_row": 0 if tail is None else tail.stride(1),
        "weight": weight,
        "weight_row": weight.stride(0),
        "bias": bias,
        "out": out,
        "new_tail": new_tail,
        "length": length,
        "width": width,
        "TAPS": weight.shape[1],
        "BLOCK_T": 1 if length == 1 else 16,
        "BLOCK_C": 256 if length == 1 else 128,
        "BLOCK_TAIL": triton.next_power_of_2(max(1, weight.shape[1] - 1)),
    }


@torch.library.custom_op("hooked_recurrent::short_conv", mutates_args=())
def _short_conv(x: Tensor, tail: Tensor | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The outputs and the new tail."""
    out, new_tail = _short_conv_shapes(x, tail, weight, bias)
    x, weight = rows_contiguous(x), rows_contiguous(weight)
    tail = None if tail is None else rows_contiguous(tail)
    arguments = _arguments(x, tail, weight, None if bias is None else bias.contiguous(), out, new_tail)
    blocks = (triton.cdiv(x.shape[1], arguments["BLOCK_T"]), triton.cdiv(x.shape[2], arguments["BLOCK_C"]))
    with launching_on(x):
        short_conv_kernel[(len(x), *blocks)](**arguments, num_warps=4)
    return out, new_tail


@_short_conv.register_fake
def _short_conv_shapes(x, tail, weight, bias):
    kept = x.dtype if tail is None else torch.promote_types(x.dtype, tail.dtype)
    out = x.new_empty(x.shape, dtype=torch.promote_types(kept, weight.dtype))
    return out, x.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2], dtype=kept)


def triton_short_conv(
    x: Float[Tensor, "batch pos channel"],
    tail: Float[Tensor, "batch_or_1 past channel"] | None,
    weight: Float[Tensor, "channel tap"],
    bias: Float[Tensor, "channel"] | None = None,
) -> tuple[Float[Tensor, "batch pos channel"], Float[Tensor, "batch past channel"]]:
    """What `ShortConv` computes, without gradients: silu(conv(x)), and the tail after the last position of x.

    Args:
        x: inputs, at least one position, float32 or narrower.
        tail: the taps - 1 inputs before x, zeros when None; one row may serve all.
        weight: the last tap sees the present.
        bias: one number per channel.

    Raises:
        ValueError: for no positions, a wider dtype, or a tail or weight that does not fit.
    """
    past = (weight.shape[1] - 1, x.shape[2])
    if not x.shape[1]:
        raise ValueError("the convolution needs at least one position")
    if torch.float64 in (x.dtype, weight.dtype):
        raise ValueError("the convolution kernel computes in float32: use ShortConv for float64")
    if weight.shape[0] != x.shape[2]:
        raise ValueError(f"weight has {weight.shape[0]} channels, x has {x.shape[2]}")
    if tail is not None and (tuple(tail.shape[1:]) != past or len(tail) not in (1, len(x))):
        raise ValueError(f"expected a tail {(len(x), *past)} or one row of it, got {tuple(tail.shape)}")
    return _short_conv(x, tail, weight, bias)


@register
def variants(case: Case) -> Iterator[Variant]:
    """A decode step and a longer stretch, with and without what may be absent; rules and widths make no difference."""
    channels, dtype = 2048, DTYPES[case.dtype]
    weight = torch.empty(channels, PUBLISHED_TAPS, dtype=dtype, device="meta")
    for length, label in ((1, "one position"), (100, "a stretch")):
        x = torch.empty(2, length, channels, dtype=dtype, device="meta")
        for tail, bias in ((x.new_empty(2, PUBLISHED_TAPS - 1, channels), weight[:, 0].contiguous()), (None, None)):
            out, new_tail = _short_conv_shapes(x, tail, weight, bias)
            arguments = _arguments(x, tail, weight, bias, out, new_tail)
            name = f"short convolution, {label}" + ("" if tail is None else ", tail and bias")
            yield from variants_of(name, short_conv_kernel, arguments, case, num_warps=4)
