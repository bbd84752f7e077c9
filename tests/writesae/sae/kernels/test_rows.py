"""Pairs sorted by row, and what is refused before a kernel reads it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_recurrent.scan.kernels import device
from tests.writesae.sae.kernels.cases import chosen, random
from writesae.sae.kernels import rows as module
from writesae.sae.kernels.bilinear import bilinear_at
from writesae.sae.kernels.rows import check, sorted_pairs, sum_by_row


@given(st.integers(0, 6), st.integers(1, 5), st.integers(1, 8), st.integers(0, 999))
def test_every_active_pair_stands_in_its_row_once_and_in_order(batch, terms, n_rows, seed):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(n_rows, (batch, terms), generator=generator)
    active = torch.rand(batch, terms, generator=generator) > 0.3
    order, offsets = sorted_pairs(indices, n_rows, active)
    assert offsets.shape == (n_rows + 1,) and offsets[0] == 0
    flat, there = indices.reshape(-1), active.reshape(-1)
    for row in range(n_rows):
        expected = [pair for pair in range(batch * terms) if flat[pair] == row and there[pair]]
        assert order[offsets[row] : offsets[row + 1]].tolist() == expected


def test_sums_are_the_same_bits_every_time():
    """Thousands of numbers of different sizes: any other order would round otherwise."""
    indices = chosen(300, 2, 3)
    weights, vectors = random(300, 2), random(300, 4) * torch.logspace(-4, 4, 300)[:, None]
    pairs = sorted_pairs(indices, 3, torch.ones(300, 2, dtype=torch.bool))
    first = sum_by_row(weights, vectors, *pairs)
    assert torch.equal(first, sum_by_row(weights, vectors, *pairs))


def test_what_kernels_would_read_wrongly_is_refused():
    table, indices = random(4, 8), chosen(2, 3, 4)
    with pytest.raises(ValueError, match="a row for every atom, got 4 and 3 rows"):
        check(indices, (table, table), (table[:3], table))
    with pytest.raises(ValueError, match="rows of width 8, what it meets has width 7"):
        check(indices, (table, table[:, :7]))
    with pytest.raises(ValueError, match="cannot serve torch.float64"):
        check(indices, (table, table.double()))
    with pytest.raises(ValueError, match="widths up to 7, got 8"):
        check(indices, (table, table), widest=7)
    with pytest.raises(ValueError, match="on one device, got cpu and meta"):
        check(indices, (table, table.to("meta")))
    check(indices, (table, table), widest=8)


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(device, "INTERPRETED", False)
    with pytest.raises(ValueError, match="run on a GPU, not on cpu: take the functions of reference.py"):
        bilinear_at(random(4, 8), random(4, 8), random(2, 8), random(2, 8), chosen(2, 3, 4))
    assert module.runs_on(torch.device("cuda", 0))
