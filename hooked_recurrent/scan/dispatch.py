"""Which scan runs: chosen here and nowhere else, from device, dtype, length, hooks and what the caller asks for.

    step       the definition; holds every state, so functions of writes and states need it
    chunked    plain torch in chunks, any device and dtype; a single position takes the decode step instead
    triton     kernels on a GPU, float32 or narrower; a single position without gradient takes the fused step

"auto" takes Triton on a GPU wherever its kernels can do what is asked, else the chunked scan; a warning says once why they
can't.
"""

import importlib
import importlib.util
import warnings
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_recurrent.config import BACKENDS
from hooked_recurrent.factors import Before, Factors, Read, State
from hooked_recurrent.scan.chunked import chunked_scan
from hooked_recurrent.scan.decode import decode_step
from hooked_recurrent.scan.step import StateHook, step_scan


def scan(
    factors: Factors,
    initial_state: Before | None = None,
    *,
    writes: Float[Tensor, "batch pos head d_k d_v"] | None = None,
    on_state: StateHook | None = None,
    backend: str = "auto",
    want_state: bool = True,
) -> tuple[Read, State | None]:
    """Run the recurrence with the fastest backend that can do what is asked.

    Args:
        factors: the six roles over [batch, pos, head, ...].
        initial_state: S_0 [batch, head, d_k, d_v], zero by default.
        writes: matrices written instead of k v^T; needs the step loop.
        on_state: a function of every S_t; needs the step loop.
        backend: "auto", "step", "chunked" or "triton".
        want_state: whether the final state is needed; without it None may come in its place, and work is saved.

    Raises:
        ValueError: for an unknown backend, or one that cannot do what is asked, with the reason.
    """
    matrices = writes is not None or on_state is not None
    chosen = choose(factors, initial_state, matrices=matrices, backend=backend)
    if chosen == "step":
        return step_scan(factors, initial_state, writes=writes, on_state=on_state)
    # One position writes a state per row: worth a step of its own only where that state is wanted.
    single = factors.length == 1 and want_state
    if chosen == "triton":
        return _on_triton(factors, initial_state, single, want_state)
    if single and backend == "auto":
        return decode_step(factors, initial_state)
    return chunked_scan(factors, initial_state, want_state=want_state)


def choose(factors: Factors, initial_state: Before | None, *, matrices: bool, backend: str) -> str:
    """The backend that runs: "step", "chunked" or "triton".

    Args:
        factors, initial_state: what is scanned.
        matrices: whether a function of writes or states takes part.
        backend: what was asked for.

    Raises:
        ValueError: for an unknown backend, or one that was asked for by name and cannot do this, with the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown scan backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend in ("chunked", "triton") and matrices:
        held = f"the {backend} scan holds no per-token matrices"
        raise ValueError(f"{held}: use backend 'auto' or 'step' with matrix hooks")
    if backend == "step" or matrices:
        return "step"
    if backend == "triton":
        reason = triton_refusal(factors, initial_state)
        if reason is not None:
            raise ValueError(reason)
        return "triton"
    if backend == "auto" and on_gpu(factors) and factors.length:
        reason = triton_refusal(factors, initial_state)
        if reason is None:
            return "triton"
        _warn_once(reason)
    return "chunked"


def on_gpu(factors: Factors) -> bool:
    """Whether there is anything for Triton to run on."""
    return factors.query.is_cuda


@cache
def has_triton() -> bool:
    """Whether the package is installed, which is the case on Linux alone."""
    return importlib.util.find_spec("triton") is not None


def triton_refusal(factors: Factors, initial_state: Before | None) -> str | None:
    """Why the Triton kernels can't scan this; None if they can."""
    if not has_triton():
        return "the Triton scan needs the package triton, which is not installed"
    try:
        _kernels("scan").check(factors, initial_state, None, ())
    except ValueError as error:
        return str(error)
    return None


def _on_triton(
    factors: Factors, initial_state: Before | None, single: bool, want_state: bool
) -> tuple[Read, State | None]:
    """The fused step for a single position without a gradient, else the chunk kernels."""
    inputs = [tensor for tensor in (*vars(factors).values(), initial_state) if tensor is not None]
    if single and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)):
        state = factors.zero_state() if initial_state is None else initial_state
        return _kernels("step").triton_step(factors, state)
    result = _kernels("scan").triton_scan(factors, initial_state, want_state=want_state)
    return result.read, result.state


def _kernels(name: str) -> Any:
    """A module of the kernels, imported when it is first needed: Triton exists on Linux alone."""
    return importlib.import_module(f"hooked_recurrent.scan.kernels.{name}")


@cache
def _warn_once(reason: str) -> None:
    """One warning per reason and process."""
    warnings.warn(f"the chunked scan runs in place of Triton's kernels: {reason}", stacklevel=4)
