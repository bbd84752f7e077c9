"""A few chunks of the recurrence, made ready for the state that comes in: stacks, and the decay between them.

Names and formulas are those of chunked.py. How the decay gets between row t and column j depends on its kind:

    OneNumber    one per head               exp(c_t - c_j) is put on the product of rows and columns
    Bounded      one per channel, mild      exp(c_t) is put on the rows and exp(-c_j) on the columns
    Strong       one per channel, any       exp(-c_j) would overflow: exp(c_t - c_j) stands between them channel by channel

A difference c_t - c_j with j <= t is never positive, so its exponential is always safe. Each kind also carries gradients
back from what it made to the plain rows and columns.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_recurrent.factors import Factors

# exp overflows float32 above 88; a decay per channel that stays inside this bound over a chunk may be taken apart.
SAFE_EXPONENT = 60.0

Rows = Float[Tensor, "chunk batch_head row_block pos d_k"]
"""Queries, and probes where there are any: a block of one row per position for each."""
Columns = Float[Tensor, "chunk batch_head column_block pos d_k"]
"""Erases where there are any and not tied to the write, and write keys."""
Gram = Float[Tensor, "chunk batch_head row column"]
"""Every row with every column of its chunk, blocks one after the other: [[P R], [M N]]."""


class Decay(ABC):
    """What a kind of decay makes of rows and columns; the stacks are written over where that saves a copy."""

    row_decay: Float[Tensor, "chunk batch_head row one"] | None = None
    """From the chunk's start to each row, for what it finds; None where the rows hold it."""
    column_decay: Float[Tensor, "chunk batch_head column one"] | None = None
    """From each column to the chunk's end, for what is carried on; None where the columns hold it."""
    whole: Float[Tensor, "chunk batch_head channel one"]
    """D(C<-0), per key channel or one number."""
    whole_last = False
    """Whether `whole` acts after the columns were added to the state, because they are decayed to the chunk's start instead."""

    def __init__(
        self, rows: Rows, columns: Columns, log_decay: Tensor, inclusive: Tensor, seen: Bool[Tensor, "block pos pos"]
    ):
        """`inclusive` is c [chunk, batch_head, pos, (d_k)], `seen` which columns a row sees."""
        self.row_blocks, self.column_blocks, self.size = rows.shape[2], columns.shape[2], rows.shape[3]
        self.log_decay, self.inclusive, self.unseen = log_decay, inclusive, ~seen
        self.rows, self.columns = rows.flatten(2, 3), columns.flatten(2, 3)
        self.gram = self.between(rows, columns)

    def upto(self) -> Float[Tensor, "chunk batch_head row_block pos *d_k"]:
        """c of every row: queries read after the step of their own position, probes before it."""
        return torch.stack([self.inclusive, self.inclusive - self.log_decay][: self.row_blocks], dim=2)

    @abstractmethod
    def between(self, rows: Rows, columns: Columns) -> Gram:
        """The product of rows and columns with the decay between them, zero where a row does not see a column."""

    @abstractmethod
    def back(self, gram: Gram, rows: Tensor, columns: Tensor) -> tuple[Rows, Columns]:
        """Gradients of `gram`, `rows` and `columns` to gradients of the plain rows and columns."""

    def blocks(self, gram: Gram) -> Float[Tensor, "chunk batch_head row_block pos column_block pos"]:
        """With an axis for the blocks of rows, and one for those of columns."""
        return gram.unflatten(3, (self.column_blocks, self.size)).unflatten(2, (self.row_blocks, self.size))

    def unblocked(self, gram: Tensor) -> Gram:
        """Without these axes."""
        return gram.flatten(4, 5).flatten(2, 3)


class OneNumber(Decay):
    """One decay per head."""

    def between(self, rows: Rows, columns: Columns) -> Gram:
        """The decay is put on the product."""
        last, upto = self.inclusive[:, :, -1:], self.upto()
        self.row_decay = upto.exp().flatten(2, 3)[..., None]
        self.column_decay = (last - self.inclusive).exp().repeat(1, 1, self.column_blocks)[..., None]
        self.whole = last[..., None].exp()
        decay = upto[..., None] - self.inclusive[:, :, None, None]
        self.decay = decay.masked_fill_(self.unseen, -torch.inf).exp_()[..., None, :]
        return self.unblocked(self.blocks(self.rows @ self.columns.mT).mul_(self.decay))

    def back(self, gram: Gram, rows: Tensor, columns: Tensor) -> tuple[Rows, Columns]:
        """Through the product."""
        gram = self.unblocked(self.blocks(gram) * self.decay)
        rows, columns = rows + gram @ self.columns, columns + gram.mT @ self.rows
        return rows.unflatten(2, (-1, self.size)), columns.unflatten(2, (-1, self.size))


class Bounded(Decay):
    """A decay per channel that does not overflow when it is taken apart, at the chunk's start.

    At its middle, the decays of later positions would enter the rounding of earlier ones, which no edit of a later position
    may change.
    """

    whole_last = True

    def between(self, rows: Rows, columns: Columns) -> Gram:
        """The decay is put on rows and columns."""
        self.since = torch.empty_like(rows)
        torch.exp(self.inclusive, out=self.since[:, :, 0])
        if self.row_blocks == 2:  # exp(c_{t-1}) is that of the position before, and 1 at the chunk's start
            self.since[:, :, 1, 0] = 1.0
            self.since[:, :, 1, 1:] = self.since[:, :, 0, :-1]
        self.growth = self.since[:, :, :1].reciprocal()
        rows.mul_(self.since)
        columns.mul_(self.growth)
        self.whole = self.inclusive[:, :, -1, :, None].exp()
        return self._seen(self.rows @ self.columns.mT)

    def back(self, gram: Gram, rows: Tensor, columns: Tensor) -> tuple[Rows, Columns]:
        """Through the product, then through the decay of either side."""
        gram = self._seen(gram)
        rows, columns = rows + gram @ self.columns, columns + gram.mT @ self.rows
        return rows.unflatten(2, (-1, self.size)) * self.since, columns.unflatten(2, (-1, self.size)) * self.growth

    def _seen(self, gram: Gram) -> Gram:
        return self.unblocked(self.blocks(gram).masked_fill_(self.unseen[:, :, None], 0.0))


class Strong(Decay):
    """Any decay per channel, at the cost of an exponential for every pair of positions and channel."""

    def between(self, rows: Rows, columns: Columns) -> Gram:
        """The decay stands between rows and columns, channel by channel."""
        last = self.inclusive[:, :, -1:]
        self.plain_rows, self.plain_columns = rows, columns
        upto, to_end = self.upto(), (last - self.inclusive).exp()
        self.since, self.to_end = upto.exp(), to_end[:, :, None]
        self.rows, self.columns = (rows * self.since).flatten(2, 3), (columns * self.to_end).flatten(2, 3)
        self.whole = last[:, :, 0, :, None].exp()
        decay = upto[:, :, :, :, None] - self.inclusive[:, :, None, None]
        self.decay = decay.masked_fill_(self.unseen[..., None], -torch.inf).exp_()
        return self.unblocked(torch.einsum("nhbtd,nhcjd,nhbtjd->nhbtcj", rows, columns, self.decay))

    def back(self, gram: Gram, rows: Tensor, columns: Tensor) -> tuple[Rows, Columns]:
        """Channel by channel."""
        parts = self.blocks(gram)
        to_rows = torch.einsum("nhbtcj,nhcjd,nhbtjd->nhbtd", parts, self.plain_columns, self.decay)
        to_columns = torch.einsum("nhbtcj,nhbtd,nhbtjd->nhcjd", parts, self.plain_rows, self.decay)
        rows, columns = rows.unflatten(2, (-1, self.size)), columns.unflatten(2, (-1, self.size))
        return rows * self.since + to_rows, columns * self.to_end + to_columns


class Slab:
    """What a few chunks do to the state that comes in. The first axis counts them; batch and heads are one axis."""

    def __init__(self, factors: Factors, size: int):
        """Prepare everything that needs no state.

        Args:
            factors: the six roles in the state's dtype, over a whole number of chunks.
            size: positions per chunk.
        """
        keys, values = (
            side.unbind(3) if side.ndim == 5 else (side,) for side in (factors.write_key, factors.write_value)
        )
        self.size, self.tied = size, factors.erase_strength is not None
        erase, probe = factors.erase, factors.probe
        if factors.erase_strength is not None:  # the strength goes with the probe, and the key stands for the erase
            probe = factors.erase_strength[..., None] * factors.write_key
        rows = stack([factors.query] if probe is None else [factors.query, probe], size)
        columns = stack([*keys] if erase is None else [erase, *keys], size)
        self.values = stack([*values], size).flatten(2, 3)
        """F, one term after the other."""
        self.decay = made(rows, columns, stack([factors.log_decay], size)[:, :, 0])
        gram = self.decay.gram
        self.asked: Float[Tensor, "chunk batch_head pos column"] = gram[:, :, :size]
        """[P R]."""
        self.solver: Float[Tensor, "chunk batch_head pos pos"] | None = None
        """(I - M)^{-1}; None where nothing is erased."""
        self.given: Float[Tensor, "chunk batch_head pos d_v"] | None = None
        """N F, or F itself where the erase is tied to the write; None where nothing is erased."""
        if probe is not None:
            self.solver = inverse(gram[:, :, size:, :size])
            self.given = self.values if self.tied else gram[:, :, size:, size:] @ self.values

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return self.asked.shape[0]


def made(rows: Rows, columns: Columns, log_decay: Float[Tensor, "chunk batch_head pos *d_k"]) -> Decay:
    """The kind of decay that these numbers allow."""
    inclusive = log_decay.cumsum(dim=2)
    blocks, size = rows.shape[2], rows.shape[3]
    seen = torch.ones(size, size, dtype=torch.bool, device=rows.device).tril()
    kind: type[Decay] = OneNumber
    if log_decay.ndim == 4:
        kind = Bounded if bool(inclusive[:, :, -1].min() > -SAFE_EXPONENT) else Strong
    return kind(rows, columns, log_decay, inclusive, torch.stack([seen, seen.tril(-1)][:blocks]))


def stack(
    parts: list[Float[Tensor, "batch pos head *d"]], size: int
) -> Float[Tensor, "chunk batch_head part pos_in_chunk *d"]:
    """Several sequences cut into chunks, one block after the other: copied once, here."""
    cut = [part.unflatten(1, (-1, size)).movedim((1, 3), (0, 2)) for part in parts]
    return torch.stack(cut, dim=3).flatten(1, 2)


def unstack(
    stacked: Float[Tensor, "chunk batch_head part pos_in_chunk *d"], batch: int
) -> list[Float[Tensor, "batch pos head *d"]]:
    """The way back."""
    whole = stacked.unflatten(1, (batch, -1))
    return [part.movedim((0, 2), (1, 3)).flatten(1, 2) for part in whole.unbind(3)]


def inverse(strictly_lower: Float[Tensor, "*chunks pos pos"]) -> Float[Tensor, "*chunks pos pos"]:
    """(I - strictly_lower)^{-1}, unit lower triangular, by forward substitution."""
    identity = torch.eye(strictly_lower.shape[-1], dtype=strictly_lower.dtype, device=strictly_lower.device)
    return torch.linalg.solve_triangular(-strictly_lower, identity, upper=False, unitriangular=True)
