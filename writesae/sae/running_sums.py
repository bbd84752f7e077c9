"""Decayed running sums along a passage: scores of all states from scores of their changes.

Under one decay per head, S_t = d_t S_{t-1} + sum_m k_m u_m^T, so for every row (l, r)

    z_t  =  l^T S_t r  =  sum_{j <= t} D(t<-j) x_j        x_j = sum_m (l . k_jm)(r . u_jm)        D(t<-j) = d_{j+1} ... d_t

(design.md, section 5). The projections are two matrix products over the whole passage; the sum runs in chunks, one product
with the triangular matrix of decays per chunk, whose first change is given what is carried over from the chunk before.

Its gradient is the sum run backward, h_j = sum_{t >= j} D(t<-j) g_t, and then

    dl  =  sum_j h_j sum_m (r . u_jm) k_jm              dr  =  sum_j h_j sum_m (l . k_jm) u_jm

two more products. A decoder's or encoder's whole cost is these four products of [pos, row, d], plus 2 chunk / d of one.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

# Positions per chunk: on the CPU a chunk of 2,048 rows then stays in the cache; a GPU wants few, large products.
CHUNK, CHUNK_ON_GPU = 32, 128
# Entries of [passage, pos, term, row] that a backward pass makes at once.
AT_ONCE = 1 << 22


class Decays:
    """D(t<-j) inside every chunk of some passages."""

    def __init__(self, log_decay: Float[Tensor, "passage pos"], dtype: torch.dtype, chunk: int | None = None):
        """`log_decay` may be -inf; the decays come out in `dtype`."""
        self.size = chunk or (CHUNK_ON_GPU if log_decay.is_cuda else CHUNK)
        self.length = log_decay.shape[1]
        self.step = log_decay.exp().to(dtype)[..., None]
        whole = self.length - self.length % self.size
        parts = [self._inside(log_decay[:, :whole].unflatten(1, (-1, self.size))).to(dtype).unbind(1)] if whole else []
        if whole < self.length:
            parts.append((self._inside(log_decay[:, whole:]).to(dtype),))
        self.matrices = [matrix for part in parts for matrix in part]

    @staticmethod
    def _inside(log_decay: Float[Tensor, "*place pos"]) -> Float[Tensor, "*place pos pos"]:
        """exp of the sums of log_decay over j < m <= t. Each is summed by itself: -inf would spoil differences of sums."""
        size = log_decay.shape[-1]
        steps = log_decay[..., :, None].expand(*log_decay.shape, size)
        upper = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).triu()
        return steps.masked_fill(upper, 0.0).cumsum(-2).exp().tril()

    def chunks(self) -> Iterator[tuple[int, int, Float[Tensor, "passage pos_in_chunk pos_in_chunk"]]]:
        """(start, stop, D) of every chunk, in order; reversible through `list`."""
        for number, matrix in enumerate(self.matrices):
            start = number * self.size
            yield start, min(start + self.size, self.length), matrix


def running_sums(
    decays: Decays, changes: Callable[[int, int], Float[Tensor, "passage pos row"]]
) -> Iterator[tuple[int, int, Float[Tensor, "passage pos row"]]]:
    """(start, stop, z_start..z_{stop-1}) of every chunk; `changes(start, stop)` gives x, new tensors that are written over."""
    carried = None
    for start, stop, matrix in decays.chunks():
        x = changes(start, stop)
        if carried is not None:
            x[:, 0] += decays.step[:, start] * carried
        z = matrix @ x
        carried = z[:, -1]
        yield start, stop, z


def sum_back_(
    decays: Decays, gradient: Float[Tensor, "passage pos row"], start: int, carried: Tensor | None
) -> Float[Tensor, "passage row"]:
    """h in place of g, for the chunks from `start` on that `gradient` spans; returns what the position before is to add.

    `carried` is what the call for the positions behind these returned.
    """
    end = start + gradient.shape[1]
    for begin, stop, matrix in reversed([chunk for chunk in decays.chunks() if start <= chunk[0] < end]):
        part = gradient[:, begin - start : stop - start]
        if carried is not None:
            part[:, -1] += carried
        part.copy_(matrix.mT @ part)
        carried = decays.step[:, begin] * part[:, 0]
    assert carried is not None
    return carried


class _SumsAt(torch.autograd.Function):
    """Scores of states at chosen rows, with the backward that the module's docstring derives."""

    @staticmethod
    def forward(ctx, left, right, scores, key, value, by_key, by_value, indices, decays):
        ctx.save_for_backward(key, value, by_key, by_value, indices)
        ctx.decays = decays
        return scores.gather(1, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        key, value, by_key, by_value, indices = ctx.saved_tensors
        decays: Decays = ctx.decays
        (passages, length, terms, rows), chosen = by_key.shape, indices.shape[1]
        indices, grad = indices.view(passages, -1, chosen), grad.view(passages, -1, chosen)
        skip = length - indices.shape[1]
        grads: list[Tensor | None] = [None] * 9
        sides = [(0, by_value, key), (1, by_key, value)]
        sides = [side for side in sides if ctx.needs_input_grad[side[0]]]
        for number, _, vectors in sides:
            grads[number] = vectors.new_zeros(rows, vectors.shape[-1])
        block = max(1, AT_ONCE // max(1, passages * terms * rows * decays.size)) * decays.size
        carried = None
        for start in reversed(range(0, length, block)):
            stop, first = min(start + block, length), max(start, skip)
            summed = by_key.new_zeros(passages, stop - start, rows)
            if first < stop:
                there = slice(first - skip, stop - skip)
                summed[:, first - start :].scatter_add_(2, indices[:, there], grad[:, there])
            carried = sum_back_(decays, summed, start, carried)
            for number, other, vectors in sides:
                weights = summed[:, :, None] * other[:, start:stop]
                grads[number].addmm_(weights.flatten(0, 2).T, vectors[:, start:stop].flatten(0, 2))
        return tuple(grads)


def sums_at(
    left: Float[Tensor, "row d_k"],
    right: Float[Tensor, "row d_v"],
    scores: Float[Tensor, "sample row"],
    key: Float[Tensor, "passage pos term d_k"],
    value: Float[Tensor, "passage pos term d_v"],
    by_key: Float[Tensor, "passage pos term row"],
    by_value: Float[Tensor, "passage pos term row"],
    indices: Int[Tensor, "sample chosen"],
    decays: Decays,
) -> Float[Tensor, "sample chosen"]:
    """z at chosen rows, differentiable once in `left` and `right`. Samples are the last positions of every passage.

    Nothing of size [pos, d_k, d_v] or [pos, chosen, d] is made; besides what is given, some buffers of [pos, row].

    Args:
        left, right: the rows, whose scores and projections are given so that nothing is computed twice.
        scores: z of all rows.
        key, value: the net writes of every position.
        by_key, by_value: their projections on `left` and `right`.
        indices: the chosen rows of every sample.
        decays: of the same passages, in the same dtype.
    """
    return _SumsAt.apply(left, right, scores, key, value, by_key, by_value, indices, decays)
