"""The public scan on Triton kernels: like the other backends, and able to take packed sequences and snapshots."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent.factors import Factors, Read
from hooked_recurrent.scan.kernels.forward import scan_chunks
from hooked_recurrent.scan.kernels.layout import Sequences, chunk_size


class ScanResult(NamedTuple):
    """What a scan leaves, in float32."""

    read: Read
    """[batch, pos, head, d_v]."""
    state: Float[Tensor, "sequences head d_k d_v"] | None
    """The state of every sequence after its last position; None unless wanted."""
    snapshots: list[Float[Tensor, "sequences head d_k d_v"]]
    """The states after the counts of positions asked for."""


def triton_scan(
    factors: Factors,
    initial_state: Float[Tensor, "sequences_or_1 head d_k d_v"] | None = None,
    *,
    cu_lengths: Int[Tensor, "sequences_plus_1"] | None = None,
    snapshots: Sequence[int] = (),
    want_state: bool = True,
) -> ScanResult:
    """Scan in chunks with kernels; equal to `step_scan` up to the rounding of float32.

    Args:
        factors: the six roles in float32, bfloat16 or float16, tied or decoupled, with one or several writes per position.
        initial_state: S_0, zero by default; a single one serves every sequence.
        cu_lengths: where packed sequences stop, from 0: sequence i has the positions cu_lengths[i] .. cu_lengths[i + 1] - 1
            of the only batch row. None for one sequence per row.
        snapshots: after how many positions states are wanted too; not with cu_lengths.
        want_state: whether the final state is needed.
    """
    if cu_lengths is not None and (snapshots or len(factors.query) != 1):
        raise ValueError("packed sequences stand in one batch row, and no snapshots are taken of them")
    if any(not 0 <= at <= factors.length for at in snapshots):
        raise ValueError(f"snapshots count positions from 0 to {factors.length}, got {list(snapshots)}")
    batch, length = factors.query.shape[:2]
    device, size = factors.query.device, chunk_size(factors)
    if cu_lengths is None:
        sequences = Sequences.of_batch(batch, length, size, device)
    else:
        sequences = Sequences.packed(cu_lengths, size, device)
    return ScanResult(*scan_chunks(factors, sequences, initial_state, snapshots=snapshots, want_state=want_state))
