"""RWKV's token shift: every position sees the one before it, also across the border between two calls."""

import torch
from jaxtyping import Float
from torch import Tensor


def token_shift(
    x: Float[Tensor, "batch pos d_model"], tail: Float[Tensor, "batch_or_1 one d_model"] | None
) -> Float[Tensor, "batch pos d_model"]:
    """What has to be added to x to get the position before it; `tail` is that of the first (zeros at the start of a text).

    One row of it may serve all of x.
    """
    if tail is None:
        tail = torch.zeros_like(x[:, :1])
    if x.shape[1] == 1:
        return tail.to(x.dtype) - x
    return torch.cat([tail.to(x.dtype).expand(len(x), -1, -1), x[:, :-1]], dim=1) - x


def shift_tails(
    x: Float[Tensor, "batch pos d_model"],
    tail: Float[Tensor, "batch_or_1 one d_model"] | None,
    stops: tuple[int, ...],
) -> list[Float[Tensor, "batch one d_model"]]:
    """What a later call needs as its `tail`, after each of these numbers of positions."""
    start = torch.zeros_like(x[:, :1]) if tail is None else tail.expand(len(x), -1, -1)
    return [x[:, stop - 1 : stop].clone() if stop else start for stop in stops]
