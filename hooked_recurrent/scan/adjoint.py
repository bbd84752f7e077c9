"""The recurrence run backward: how a loss depends on every write.

With g_t = dLoss / do_t, the gradient of the loss with respect to the write at t, which is that with respect to S_t, is

    Lambda_t  =  q_t g_t^T  +  diag(d_{t+1}) Lambda_{t+1}  +  b_{t+1} (a_{t+1}^T Lambda_{t+1})        Lambda_T = 0

the recurrence of factors.py from the last position to the first, with erase and probe swapped and every transition one
position earlier: (diag(d) + a b^T)^T = diag(d) + b a^T. What was written plays no part, so neither do edits of writes.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_recurrent.factors import Factors, Read
from hooked_recurrent.scan.dispatch import scan


def adjoint_factors(
    factors: Factors, read_grad: Read, query: Float[Tensor, "batch pos head d_k"] | None = None
) -> Factors:
    """Factors of the recurrence whose state after its step s is Lambda_t at t = pos - 1 - s.

    Args:
        factors: the recurrence; its writes are not looked at.
        read_grad: dLoss / do_t [batch, pos, head, d_v].
        query: what reads Lambda_t, in the order of the positions; the recurrence's own query by default.
    """
    whole = factors.decoupled()
    asked = whole.query if query is None else query
    erase, probe = (None if side is None else _turned(side) for side in (whole.probe, whole.erase))
    return Factors(
        log_decay=_turned(whole.log_decay),
        write_key=whole.query.flip(1),
        write_value=read_grad.flip(1),
        query=asked.flip(1),
        erase=erase,
        probe=probe,
    )


def write_gradients(
    factors: Factors, read_grad: Read, positions: list[int]
) -> dict[int, Float[Tensor, "batch head d_k d_v"]]:
    """Lambda_t at some positions. One is held at a time, and those between them are not made.

    Args:
        factors: the recurrence; its writes are not looked at.
        read_grad: dLoss / do_t [batch, pos, head, d_v], up to the last position that the loss depends on.
        positions: which are wanted, from 0.
    """
    adjoint = adjoint_factors(factors, read_grad)
    found: dict[int, Tensor] = {}
    matrix, start = None, 0
    for position in sorted(set(positions), reverse=True):
        stop = factors.length - position
        _, matrix = scan(adjoint.at(slice(start, stop)), matrix)
        found[position], start = matrix, stop
    return found


def write_effects(
    factors: Factors,
    read_grad: Read,
    key: Float[Tensor, "batch pos head d_k"],
    value: Float[Tensor, "batch pos head d_v"],
) -> Float[Tensor, "batch pos head"]:
    """key_t^T Lambda_t value_t at every position: the scan whose query is the key, with no matrix per position."""
    reads, _ = scan(adjoint_factors(factors, read_grad, query=key))
    return (reads.flip(1) * value).sum(-1)


def _turned(tensor: Tensor) -> Tensor:
    """From the last position to the first, one position earlier: nothing (no decay, no erase) stands behind the last."""
    return torch.cat([torch.zeros_like(tensor[:, :1]), tensor[:, 1:].flip(1)], dim=1)
