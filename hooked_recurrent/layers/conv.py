"""The short causal convolution in front of a mixer's q, k and v, which continues from the last inputs of an earlier call."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_recurrent.scan.dispatch import has_triton

# Bytes of outputs that are made at a time where no gradient is recorded: they stay in the cache through every tap.
BLOCK_BYTES = 1 << 20


class ShortConv(nn.Module):
    """Depthwise causal convolution of a few taps, then SiLU.

    weight [channel, tap], where the last tap sees the present; bias [channel] or None.
    """

    def __init__(self, channels: int, taps: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        nn.init.uniform_(self.weight, -(taps**-0.5), taps**-0.5)

    @property
    def taps(self) -> int:
        """How many positions one output sees."""
        return self.weight.shape[1]

    @property
    def tail_shape(self) -> tuple[int, int]:
        """Shape of a tail behind the batch axis."""
        return self.taps - 1, self.weight.shape[0]

    def forward(
        self,
        x: Float[Tensor, "batch pos channel"],
        tail: Float[Tensor, "batch_or_1 past channel"] | None,
        stops: Sequence[int] = (),
    ) -> tuple[Float[Tensor, "batch pos channel"], list[Float[Tensor, "batch past channel"]]]:
        """Convolve; `tail` holds the taps - 1 inputs before x (zeros at the start of a text); one row may serve all.

        Returns:
            silu(conv(x)), and what a later call needs as its `tail` after each of `stops` positions of x.
        """
        if tail is None:
            tail = x.new_zeros(1, self.taps - 1, x.shape[2])
        kept = torch.promote_types(x.dtype, tail.dtype)
        x, tail = x.to(kept), tail.to(kept).expand(len(x), -1, -1)
        tails = [self._tail_after(x, tail, stop) for stop in stops]
        record = torch.is_grad_enabled() and (self.weight.requires_grad or x.requires_grad or tail.requires_grad)
        if record:
            return nn.functional.silu(self._convolved(x, tail)), tails
        kind = torch.promote_types(x.dtype, self.weight.dtype)
        if x.is_cuda and kind != torch.float64 and x.shape[1] and has_triton():
            from hooked_recurrent.layers.conv_kernel import triton_short_conv

            return triton_short_conv(x, tail, self.weight, self.bias)[0], tails
        out = torch.empty_like(x, dtype=kind)
        block = max(1, BLOCK_BYTES // (len(x) * x.shape[2] * out.element_size()))
        for start in range(0, x.shape[1], block):
            stop = min(start + block, x.shape[1])
            part = self._convolved(x[:, start:stop], self._tail_after(x, tail, start) if start else tail)
            out[:, start:stop] = nn.functional.silu(part, inplace=True)
        return out, tails

    def _convolved(self, x: Tensor, tail: Tensor) -> Float[Tensor, "batch pos channel"]:
        """A sum of shifted copies: on the CPU it is faster than a grouped conv1d and needs no transposed copy."""
        padded = torch.cat([tail, x], dim=1)
        length = x.shape[1]
        out = padded[:, :length] * self.weight[:, 0]
        if self.bias is not None:
            out = out + self.bias
        for tap in range(1, self.taps):
            out.addcmul_(padded[:, tap : tap + length], self.weight[:, tap])  # its backward needs no earlier sum
        return out

    def _tail_after(self, x: Tensor, tail: Tensor, stop: int) -> Float[Tensor, "batch past channel"]:
        """The last taps - 1 inputs up to a position of x: a copy, so that a state keeps no whole text alive."""
        past = self.taps - 1
        if stop >= past:
            return x[:, stop - past : stop].clone()
        return torch.cat([tail[:, stop:], x[:, :stop]], dim=1)


class ShortConvs(nn.Module):
    """A ShortConv for each of several projections; in a state their tails lie side by side in one tensor."""

    def __init__(self, widths: Sequence[int], taps: int):
        super().__init__()
        self.widths = list(widths)
        self.parts = nn.ModuleList([ShortConv(width, taps) for width in widths])

    @property
    def tail_shape(self) -> tuple[int, int]:
        """Shape of a tail behind the batch axis."""
        return self.parts[0].tail_shape[0], sum(self.widths)

    def forward(
        self,
        parts: Sequence[Float[Tensor, "batch pos _"]],
        tail: Float[Tensor, "batch_or_1 past channel"] | None,
        stops: Sequence[int] = (),
    ) -> tuple[list[Float[Tensor, "batch pos _"]], list[Float[Tensor, "batch past channel"]]]:
        """As ShortConv, for every part by itself; the tails come joined."""
        before = [None] * len(self.widths) if tail is None else tail.split(self.widths, dim=-1)
        done = [conv(part, past, stops) for conv, part, past in zip(self.parts, parts, before, strict=True)]
        tails = [torch.cat(sides, dim=-1) for sides in zip(*(tails for _, tails in done), strict=True)]
        return [out for out, _ in done], tails
