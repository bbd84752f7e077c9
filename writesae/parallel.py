"""Several processes that train together: who is who, and the few exchanges that training needs.

A `World` of one process does nothing at all, so everything above is written once. Processes are started by `torchrun`,
which sets RANK, WORLD_SIZE and LOCAL_RANK; `World.current()` joins them.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """The processes of one training run; every method is called by all of them, in the same order."""

    rank: int = 0
    """Number of this process."""
    size: int = 1
    """How many there are."""

    @classmethod
    def current(cls) -> "World":
        """The world that `torchrun` started this process in, joined when it has not been yet; else a world of one."""
        if not dist.is_available():
            return cls()
        if not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                return cls()
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            # Counts and flags are exchanged from the CPU even where the dictionaries are on GPUs.
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and speaks."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This process's share of n things in a row; the shares are contiguous, in order, and differ by one at most."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes along axis 0, in the order of their ranks; their lengths may differ."""
        if self.size == 1:
            return tensor
        lengths = [torch.zeros((), dtype=torch.int64, device=tensor.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor(len(tensor), device=tensor.device))
        longest = max(int(length) for length in lengths)
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Largest over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def broadcast(self, value: Any) -> Any:
        """The main process's value (plain containers and tensors), in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for everyone."""
        if self.size > 1:
            dist.barrier()
