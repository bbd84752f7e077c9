"""Where kernels can run: on a GPU, or on the CPU when Triton interprets them."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from triton import knobs

WIDEST = 256
"""Of keys and values: as many numbers of a row as kernels keep at once."""
INTERPRETED = knobs.runtime.interpret
"""Whether TRITON_INTERPRET was set when the kernels were imported; nothing later changes what they are."""


def runs_on(device: torch.device) -> bool:
    """Whether kernels can read tensors of this device."""
    return device.type == "cuda" or (INTERPRETED and device.type == "cpu")


def launching_on(tensor: Tensor) -> AbstractContextManager:
    """Makes the tensor's GPU the current one, where a launch goes.

    Raises:
        RuntimeError: when kernels cannot run on the tensor's device.
    """
    if not runs_on(tensor.device):
        raise RuntimeError(
            f"Triton kernels run on a GPU, not on {tensor.device}; with TRITON_INTERPRET=1 in the environment before triton is "
            "imported they are interpreted on the CPU"
        )
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, copied only when its last axis is strided: kernels take every other stride as an argument."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
