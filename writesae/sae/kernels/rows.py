"""Sums over chosen rows of a table: what every kernel of this package is made of, and the two sums that need no more.

A pair is a sample b and one of its chosen rows i = indices[b, j]; its number is b * terms + j. Sorted by row, with ties in
order of the pair, the pairs of one row stand together and one program adds them up: gradients of rows are the same bits in
every run, which atomic additions would not give.

`no_type_check` keeps the tests' checks of annotations out of kernels, which are read as source and never run as Python.
"""

from collections.abc import Iterator
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_recurrent.scan.kernels.device import runs_on
from hooked_recurrent.scan.kernels.layout import Launch, Precision, block_of, recorded, scratch
from hooked_recurrent.scan.kernels.variants import DTYPES as NAMED_DTYPES
from hooked_recurrent.scan.kernels.variants import Case, Variant, register, variants_of
from writesae.sae.kernels import refusal

TERMS = (8, 32, 64)
"""Numbers of chosen rows that are compiled where no GPU is."""


@triton.jit
@no_type_check
def load_rows(table, rows, inside, columns, width):
    """Rows of a table [row, width], as float32; zero for rows that are not inside and beyond the width."""
    mask = inside[:, None] & (columns < width)[None, :]
    return tl.load(table + rows[:, None] * width + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def load_vector(first, columns, width):
    """A row of a tensor, as float32, zero beyond its width."""
    return tl.load(first + columns, mask=columns < width, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def inner_kernel(table, vectors, indices, out, terms, width, BT: tl.constexpr, BD: tl.constexpr):
    """table[indices[b, j]] . vectors[b] [sample, term]. One program per sample and block of terms."""
    sample = tl.program_id(0).to(tl.int64)
    mine = tl.program_id(1) * BT + tl.arange(0, BT)
    inside = mine < terms
    rows = tl.load(indices + sample * terms + mine, mask=inside, other=0)
    products = tl.zeros([BT, BD], tl.float32)
    for begin in range(0, width, BD):
        columns = begin + tl.arange(0, BD)
        vector = load_vector(vectors + sample * width, columns, width)
        products += load_rows(table, rows, inside, columns, width) * vector[None, :]
    tl.store(out + sample * terms + mine, tl.sum(products, axis=1), mask=inside)


@triton.jit
@no_type_check
def bag_kernel(source, weights, indices, order, offsets, out, terms, width, BP: tl.constexpr, BD: tl.constexpr):
    """Weighted sums of rows of `source` [bag, width]. One program per bag and block of columns.

    With `offsets` the bags are rows of a table, each with the pairs order[offsets[i] : offsets[i + 1]] that chose it, and a
    pair adds its sample's row. Without, the bags are samples, and a pair adds the row that it chose.
    """
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    if offsets is not None:
        first, last = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    else:
        first, last = bag * terms, (bag + 1) * terms
    total = tl.zeros([BP, BD], tl.float32)
    for begin in range(first, last, BP):
        places = begin + tl.arange(0, BP)
        inside = places < last
        if offsets is not None:
            pairs = tl.load(order + places, mask=inside, other=0)
            rows = pairs // terms
        else:
            pairs = places
            rows = tl.load(indices + pairs, mask=inside, other=0)
        weight = tl.load(weights + pairs, mask=inside, other=0.0).to(tl.float32)
        total += weight[:, None] * load_rows(source, rows, inside, columns, width)
    tl.store(out + bag * width + columns, tl.sum(total, axis=0), mask=columns < width)


def sorted_pairs(
    indices: Int[Tensor, "batch term"], n_rows: int, active: Bool[Tensor, "batch term"]
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " bound"]]:
    """The numbers of the pairs sorted by row, and where each row's pairs begin, with the end of the last row's.

    Pairs that are not active stand at the end and in no row: padding of short codes would make one row's program wait for all
    others. Unlike `factored.pairs_by_row` this asks the GPU for nothing, so that the host runs ahead.
    """
    rows, order = indices.where(active, n_rows).reshape(-1).sort(stable=True)
    return order, torch.searchsorted(rows, torch.arange(n_rows + 1, dtype=rows.dtype, device=rows.device))


def inner_of_rows(
    table: Float[Tensor, "row d"], vectors: Float[Tensor, "batch d"], indices: Int[Tensor, "batch term"]
) -> Float[Tensor, "batch term"]:
    """table[indices[b, j]] . vectors[b], in float32. The tensors are contiguous."""
    batch, terms = indices.shape
    out = scratch(batch, terms, like=table)
    block, width = block_of(terms, 32), table.shape[1]
    arguments = dict(table=table, vectors=vectors, indices=indices, out=out, terms=terms, width=width)
    arguments |= dict(BT=block, BD=block_of(width, 64))
    Launch(inner_kernel, (batch, triton.cdiv(terms, block)), arguments).run()
    return out


def sum_of_rows(
    weights: Float[Tensor, "batch term"], table: Float[Tensor, "row d"], indices: Int[Tensor, "batch term"]
) -> Float[Tensor, "batch d"]:
    """sum_j weights[b, j] table[indices[b, j]], in float32. The tensors are contiguous."""
    return _sum_bags(weights, table, indices.shape[0], indices=indices)


def sum_by_row(
    weights: Float[Tensor, "batch term"],
    vectors: Float[Tensor, "batch d"],
    order: Int[Tensor, " pair"],
    offsets: Int[Tensor, " bound"],
) -> Float[Tensor, "row d"]:
    """Row i: the sum of weights[b, j] vectors[b] over the pairs that chose it, in float32. The tensors are contiguous."""
    return _sum_bags(weights, vectors, offsets.shape[0] - 1, order=order, offsets=offsets)


def _sum_bags(
    weights: Tensor,
    source: Tensor,
    bags: int,
    *,
    indices: Tensor | None = None,
    order: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    width = source.shape[1]
    out = scratch(bags, width, like=source)
    block = block_of(width, 64)
    arguments = dict(source=source, weights=weights, indices=indices, order=order, offsets=offsets, out=out)
    arguments |= dict(terms=weights.shape[1], width=width, BP=32, BD=block)
    Launch(bag_kernel, (bags, triton.cdiv(width, block)), arguments).run()
    return out


def check(indices: Tensor, *pairs: tuple[Tensor, Tensor], widest: int | None = None) -> None:
    """Refuse what kernels would read wrongly: each pair is a table [row, d] and a tensor [.., d] of the same width.

    Raises:
        ValueError: for widths, numbers of rows, devices or dtypes that kernels cannot take together, with what they are.
    """
    tables = [table for table, _ in pairs]
    if len({len(table) for table in tables}) > 1:
        raise ValueError(
            f"both tables need a row for every atom, got {' and '.join(str(len(one)) for one in tables)} rows"
        )
    for table, other in pairs:
        if table.shape[-1] != other.shape[-1]:
            raise ValueError(
                f"the table has rows of width {table.shape[-1]}, what it meets has width {other.shape[-1]}"
            )
    every = [tensor for pair in pairs for tensor in pair]
    reason = refusal(*every, widest=widest)
    if reason is not None:
        raise ValueError(f"the kernels cannot run: {reason}")
    if any(tensor.device != indices.device for tensor in every):
        devices = sorted({str(tensor.device) for tensor in (indices, *every)})
        raise ValueError(f"the kernels need all tensors on one device, got {' and '.join(devices)}")
    if not runs_on(indices.device):
        raise ValueError(f"the kernels run on a GPU, not on {indices.device}: take the functions of reference.py there")


def precision_of(*tensors: Tensor) -> Precision:
    """How products of these are taken: as float32 would if one is float32."""
    return Precision.of(torch.float32 if any(one.dtype == torch.float32 for one in tensors) else tensors[0].dtype)


def no_second_derivative(name: str) -> object:
    """A backward for gradients' operators: refuses with a sentence."""

    def refuse(ctx: object, *gradients: object) -> None:
        raise NotImplementedError(
            f"the Triton kernels of {name} have no second derivatives: take them through writesae.sae.kernels.reference"
        )

    return refuse


def meta(*shape: int, dtype: torch.dtype | str = torch.float32) -> Tensor:
    """A tensor without memory, of a dtype or the name of one."""
    named = NAMED_DTYPES[dtype] if isinstance(dtype, str) else dtype
    return torch.empty(*shape, dtype=named, device="meta")


def launched(name: str, case: Case, launches: list[Launch]) -> Iterator[Variant]:
    """The variants of recorded launches."""
    for launch in launches:
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        yield from variants_of(name, launch.kernel, launch.arguments, case, **options)


@register
def variants(case: Case) -> Iterator[Variant]:
    """Both sums and the inner products, for every number of terms."""
    batch, n_rows = 256, 2048
    for terms in TERMS:
        indices, order = meta(batch, terms, dtype=torch.int64), meta(batch * terms, dtype=torch.int64)
        table, vectors = meta(n_rows, case.d_k, dtype=case.dtype), meta(batch, case.d_k, dtype=case.dtype)
        with recorded(case.backend) as launches:
            inner_of_rows(table, vectors, indices)
            sum_of_rows(meta(batch, terms), table, indices)
            sum_by_row(meta(batch, terms), vectors, order, meta(n_rows + 1, dtype=torch.int64))
        yield from launched(f"rows, {terms} terms", case, launches)
