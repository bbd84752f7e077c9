"""The order in which samples are met: a function of the seed and the number of the batch, and of nothing else.

Epoch e puts the passages into a random order and cuts them into blocks, as many as it takes for a block to fit the buffer;
within block b the (passage, position) rows are put into a random order, and batches are consecutive rows. So neighbouring
tokens are apart, a bounded buffer is enough, any batch can be found again by its number, and a run that is resumed needs to
remember nothing but how many batches it has seen. What does not fill a last batch of a block is left out in that epoch.

Nothing else counts: not what else is read at these tokens, nor how much of it is kept in memory. So a dictionary that is
trained beside others meets the very batches that it would meet alone.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


def generator_of(*numbers: int) -> torch.Generator:
    """A generator that follows from these numbers, and differs for any others."""
    state = int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state >> 1)


@dataclass(frozen=True)
class Place:
    """Where a batch is."""

    epoch: int
    """How often the passages have been gone through."""
    block: int
    """Which block of that epoch."""
    batch: int
    """Which batch of that block."""


@dataclass(frozen=True)
class Order:
    """The order of `n_passages` passages with `per_passage` samples each."""

    n_passages: int
    """Passages in all."""
    per_passage: int
    """Samples of a passage."""
    batch_size: int
    """Samples of a batch."""
    buffer_samples: int
    """Most samples of a block (a block holds a batch and a passage at least)."""
    seed: int
    """Of every order."""

    @property
    def n_blocks(self) -> int:
        """Blocks of an epoch; their sizes differ by one passage at most."""
        wanted = -(-self.n_passages * self.per_passage // max(self.buffer_samples, 1))
        least = -(-self.batch_size // self.per_passage)
        return max(1, min(wanted, self.n_passages // least))

    def block_size(self, block: int) -> int:
        """Passages of a block."""
        return self.n_passages * (block + 1) // self.n_blocks - self.n_passages * block // self.n_blocks

    def batches_in(self, block: int) -> int:
        """Batches of a block; where there is too little for one, it is as large as what there is."""
        return max(1, self.block_size(block) * self.per_passage // self.batch_size)

    def place(self, number: int) -> Place:
        """Where batch `number` is; raises `IndexError` below zero."""
        if number < 0:
            raise IndexError(f"batches are counted from 0, got {number}")
        sizes = [self.batches_in(block) for block in range(self.n_blocks)]
        epoch, rest = divmod(number, sum(sizes))
        block = 0
        while rest >= sizes[block]:
            rest -= sizes[block]
            block += 1
        return Place(epoch, block, rest)

    def passages(self, epoch: int, block: int) -> Int[Tensor, " passage"]:
        """Numbers of the passages of a block. A single block keeps them in order, so that it is the same in every epoch."""
        if self.n_blocks == 1:
            return torch.arange(self.n_passages)
        order = _permutation(self.n_passages, self.seed, epoch)
        return order[self.n_passages * block // self.n_blocks : self.n_passages * (block + 1) // self.n_blocks]

    def rows(self, place: Place) -> Int[Tensor, " sample"]:
        """Rows of a batch among the rows of its block, which are ordered by (passage, position)."""
        order = _permutation(self.block_size(place.block) * self.per_passage, self.seed, place.epoch, place.block)
        return order[place.batch * self.batch_size : (place.batch + 1) * self.batch_size]

    def passage_rows(self, place: Place, count: int) -> Int[Tensor, " passage"]:
        """Places, within the block, of `count` whole passages for a batch (all of the block, where it has fewer).

        The passages of a block are gone round in a random order, a new one for every round: once an epoch or less where a
        batch holds them whole, several times where a passage is longer than a batch.
        """
        size = self.block_size(place.block)
        count = min(count, size)
        round, turn = divmod(place.batch, size // count)
        order = _permutation(size, self.seed, place.epoch, place.block, round)
        return order[turn * count : (turn + 1) * count]


@lru_cache(maxsize=8)
def _permutation(n: int, *numbers: int) -> Int[Tensor, " n"]:
    return torch.randperm(n, generator=generator_of(*numbers))
