"""Which scan runs: chosen here and nowhere else, from the length, the hooks and what the caller asks for."""

from jaxtyping import Float
from torch import Tensor

from hooked_recurrent.factors import Before, Factors, Read, State
from hooked_recurrent.scan.chunked import chunked_scan
from hooked_recurrent.scan.step import StateHook, step_scan

BACKENDS = ("auto", "step", "chunked")


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
        backend: "auto", "step" or "chunked".
        want_state: whether the final state is needed; without it None may come in its place, and work is saved.

    Raises:
        ValueError: for an unknown backend, or one that cannot serve `writes` or `on_state`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown scan backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    touches_matrices = writes is not None or on_state is not None
    if backend == "chunked" and touches_matrices:
        raise ValueError("the chunked scan holds no per-token matrices: use backend 'auto' or 'step' with matrix hooks")
    # A step writes a state per row: worth it only where that state is wanted.
    single = factors.length == 1 and want_state
    if backend == "step" or touches_matrices or (backend == "auto" and single):
        return step_scan(factors, initial_state, writes=writes, on_state=on_state)
    return chunked_scan(factors, initial_state, want_state=want_state)
