"""The short causal convolution in front of a mixer's q, k and v, which continues from the last inputs of an earlier call."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


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
        self, x: Float[Tensor, "batch pos channel"], tail: Float[Tensor, "batch_or_1 past channel"] | None
    ) -> tuple[Float[Tensor, "batch pos channel"], Float[Tensor, "batch padded channel"]]:
        """Convolve; `tail` holds the taps - 1 inputs before x (zeros at the start of a text); one row may serve all.

        Returns:
            silu(conv(x)), and the inputs with the tail in front, for `tails`.
        """
        past = self.taps - 1
        if tail is None:
            tail = x.new_zeros(x.shape[0], past, x.shape[2])
        padded = torch.cat([tail.expand(len(x), -1, -1), x], dim=1)
        length = x.shape[1]
        # A sum of shifted copies: on the CPU it is faster than a grouped conv1d and needs no transposed copy.
        out = padded[:, :length] * self.weight[:, 0]
        if self.bias is not None:
            out = out + self.bias
        for tap in range(1, self.taps):
            out.addcmul_(padded[:, tap : tap + length], self.weight[:, tap])  # its backward needs no earlier sum
        return nn.functional.silu(out, inplace=not torch.is_grad_enabled()), padded

    def tails(
        self, padded: Float[Tensor, "batch padded channel"], stops: tuple[int, ...]
    ) -> list[Float[Tensor, "batch past channel"]]:
        """What a later call needs as its `tail`, after each of these numbers of positions."""
        return [padded[:, stop : stop + self.taps - 1].clone() for stop in stops]


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
        self, parts: Sequence[Float[Tensor, "batch pos _"]], tail: Float[Tensor, "batch_or_1 past channel"] | None
    ) -> tuple[list[Float[Tensor, "batch pos _"]], Float[Tensor, "batch padded channel"]]:
        """As ShortConv, for every part by itself; the inputs with the tail in front come joined, for `tails`."""
        before = [None] * len(self.widths) if tail is None else tail.split(self.widths, dim=-1)
        done = [conv(part, past) for conv, part, past in zip(self.parts, parts, before, strict=True)]
        return [out for out, _ in done], torch.cat([padded for _, padded in done], dim=-1)

    def tails(
        self, padded: Float[Tensor, "batch padded channel"], stops: tuple[int, ...]
    ) -> list[Float[Tensor, "batch past channel"]]:
        """As ShortConv."""
        return self.parts[0].tails(padded, stops)
