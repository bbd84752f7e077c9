"""What the launchers share: chunks of sequences, the tensors that kernels are given, and a launch as a value.

Scratch has one block of rows per chunk and head. Chunks are numbered through all sequences, so that the chunks of packed
sequences and those of a rectangular batch are the same to every kernel: a table says where each chunk's positions stand.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent.factors import Factors
from hooked_recurrent.scan.kernels.device import launching_on

Rows = tuple[Tensor, int, int, int]
"""A tensor with the strides of its batch row, position and head: what kernels call `rows`. Its last axis is contiguous."""


@dataclass(frozen=True)
class Sequences:
    """The chunks of every sequence, one sequence after the other."""

    size: int
    """Positions per chunk; a sequence's last chunk may hold fewer."""
    count: int
    """Sequences."""
    chunks: Int[Tensor, "chunk three"]
    """Of every chunk: its batch row, its first position there, how many positions it has."""
    first_chunk: Int[Tensor, "sequences_plus_1"]
    """The number of every sequence's first chunk, and at the end the number of chunks."""

    @classmethod
    def of_batch(cls, batch: int, length: int, size: int, device: torch.device) -> "Sequences":
        """Sequences of one length, one in every batch row."""
        each = -(-length // size)
        place = {"dtype": torch.int32, "device": device}
        rows = torch.arange(batch, **place).repeat_interleave(each)
        starts = (torch.arange(each, **place) * size).repeat(batch)
        counts = (length - starts).clamp(max=size)
        return cls(size, batch, torch.stack([rows, starts, counts], dim=1), torch.arange(batch + 1, **place) * each)

    @classmethod
    def packed(cls, cu_lengths: Int[Tensor, "sequences_plus_1"], size: int, device: torch.device) -> "Sequences":
        """Sequences one after the other in a single row, the i-th at cu_lengths[i] .. cu_lengths[i + 1] - 1.

        How many chunks there are decides the size of scratch, so the lengths are read on the host.
        """
        stops = cu_lengths.tolist()
        chunks, first_chunk = [], [0]
        for start, stop in zip(stops, stops[1:], strict=False):
            chunks += [(0, at, min(size, stop - at)) for at in range(start, stop, size)]
            first_chunk.append(len(chunks))
        place = {"dtype": torch.int32, "device": device}
        table = torch.tensor(chunks, **place).reshape(-1, 3)
        return cls(size, len(stops) - 1, table, torch.tensor(first_chunk, **place))


def rows_of(tensor: Tensor | None) -> Rows | None:
    """[batch, pos, head, ...] as kernels take it; copied only where its last axis is not contiguous."""
    if tensor is None:
        return None
    if tensor.ndim > 3 and tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    return tensor, tensor.stride(0), tensor.stride(1), tensor.stride(2)


def terms_of(tensor: Tensor) -> tuple[Tensor, int, int, int, int]:
    """[batch, pos, head, d] or [batch, pos, head, term, d] as kernels take it, with the stride of its terms at the end."""
    rows = rows_of(tensor)
    assert rows is not None
    return *rows, (rows[0].stride(3) if tensor.ndim == 5 else 0)


def states_of(state: Float[Tensor, "sequences_or_1 head d_k d_v"] | None) -> Rows | None:
    """A state as rows whose positions are its key channels; a single one serves every sequence with a stride of 0."""
    if state is None:
        return None
    if state.stride(-1) != 1:
        state = state.contiguous()
    return state, (state.stride(0) if len(state) > 1 else 0), state.stride(2), state.stride(1)


def scratch(*shape: int, like: Tensor, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """Uninitialised memory beside a tensor: the one place where kernels get memory that nobody has written."""
    return torch.empty(*shape, dtype=dtype, device=like.device)


def block_of(width: int, most: int = 256) -> int:
    """The smallest power of two that covers a width, no smaller than a matrix product takes and no larger than `most`."""
    return min(max(16, 1 << (width - 1).bit_length()), most)


def backend() -> str:
    """ "hip" where torch was built for AMD GPUs, else "cuda"; the interpreter takes what either does."""
    if _recordings:
        return _recordings[-1].backend
    return "hip" if torch.version.hip else "cuda"


@dataclass(frozen=True)
class Precision:
    """How float32 tiles are multiplied, as Triton's `input_precision`."""

    exact: str
    """As float32 would: of the triangular inverse always, and of everything where the inputs are float32."""
    fast: str
    """Of all other products."""

    @classmethod
    def of(cls, dtype: torch.dtype) -> "Precision":
        """For inputs of a dtype. TF32 keeps as many bits of mantissa as float16 and more than bfloat16."""
        exact = "tf32x3" if backend() == "cuda" else "ieee"
        return cls(exact, exact if dtype == torch.float32 else "tf32")

    @property
    def block(self) -> int:
        """How many channels a tile may have: where a product is three in TF32, both halves of its operands take registers."""
        return 32 if self.fast == "tf32x3" else 64


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as a value: to be run, or to be compiled where no GPU is."""

    kernel: Any
    """The function under @triton.jit."""
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    """A value for every parameter of the kernel."""
    num_warps: int = 4
    num_stages: int = 1

    def run(self) -> None:
        """Start the kernel, unless there is nothing to do or launches are recorded."""
        if _recordings:
            _recordings[-1].launches.append(self)
        elif all(self.grid):
            options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
            with launching_on(next(value for value in self.arguments.values() if isinstance(value, Tensor))):
                self.kernel[self.grid](**self.arguments, **options)


@dataclass(frozen=True)
class Recording:
    """Launches that were asked for on a GPU of some backend, none of which ran."""

    backend: str
    launches: list[Launch] = field(default_factory=list)


_recordings: list[Recording] = []


@contextmanager
def recorded(backend: str) -> Iterator[list[Launch]]:
    """While it lasts kernels are listed instead of run, so that those of a GPU can be compiled where there is none.

    Tensors may be on the meta device, and nothing that a kernel would have written may be looked at.
    """
    _recordings.append(Recording(backend))
    try:
        yield _recordings[-1].launches
    finally:
        _recordings.pop()


def chunk_size(factors: Factors) -> int:
    """Positions per chunk: 16 with a decay per channel, which makes Gram matrices column by column, else 64 or 32."""
    return 16 if factors.vector_decay else (64 if factors.d_k <= 128 else 32)
