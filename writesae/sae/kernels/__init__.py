"""The sparse sums over chosen atoms as Triton kernels, for GPUs: kernels read rows by their index, and no tensor of size
[batch, atoms, d] is made, forward or backward.

    squared_norm.py  |sum_i c_i v_i w_i^T|^2 of a sum over chosen atoms and a few terms of the sample's own (kernels: gram.py)
    bilinear.py      (p_i . key)(r_i . value) at chosen rows
    decode.py        sum_i a_i v_i w_i^T as matrices, and sum_i a_i A_i of a dense dictionary
    reference.py     the same in plain torch, of the same signatures: what the kernels are tested against

Whether kernels run is asked of `use_triton` and nowhere else. Importing this package imports no Triton, which exists on Linux
alone: the functions, which are this package's attributes too, are imported when they are first asked for.
"""

import importlib
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from hooked_recurrent.scan.dispatch import has_triton

WIDEST = 1024
"""Of keys and values: a gradient's kernel keeps whole rows of both in registers."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HOMES = {
    "squared_norm_at": "squared_norm",
    "inner_with_sum_at": "squared_norm",
    "bilinear_at": "bilinear",
    "decode_at": "decode",
    "decode_dense_at": "decode",
    "inner_of_matrices_at": "decode",
}


def __getattr__(name: str) -> Callable[..., Tensor]:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def use_triton(tensor: Tensor, *others: Tensor, widest: int | None = WIDEST) -> bool:
    """Whether kernels are to be used for these factors [.., d]: on a GPU, unless there is a reason against it, given once.

    Never on a CPU, where plain torch is faster than an interpreter. `widest` is None for `bilinear_at` and `decode_dense_at`,
    which serve any width.
    """
    if not tensor.is_cuda:
        return False
    reason = refusal(tensor, *others, widest=widest)
    if reason is not None:
        _warn_once(reason)
    return reason is None


def refusal(*factors: Tensor, widest: int | None = WIDEST) -> str | None:
    """Why the kernels can't take factors [.., d] on a GPU; None if they can."""
    if not has_triton():
        return "they need the package triton, which is not installed"
    for factor in factors:
        if factor.dtype not in DTYPES:
            return f"they compute in float32 and cannot serve {factor.dtype}"
        if widest is not None and factor.shape[-1] > widest:
            return f"they serve widths up to {widest}, got {factor.shape[-1]}"
    return None


@cache
def _warn_once(reason: str) -> None:
    """One warning per reason and process."""
    warnings.warn(f"plain torch runs in place of the Triton kernels of WriteSAE: {reason}", stacklevel=4)
