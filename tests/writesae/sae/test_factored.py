"""The factored sums against the same sums with the matrices formed, values and gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

import writesae.sae.factored as factored
from writesae.sae.factored import bilinear_at, inner_with_sum, pairs_by_row, squared_norm_of_sum, sum_outer_at


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(*[st.integers(1, 4)] * 2, st.integers(1, 30), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_squared_norm_of_sum_is_that_of_the_matrix(batch, levels, terms, d_k, d_v, seed):
    coefficients, left, right = (
        random(batch, levels, terms, seed=seed),
        random(batch, terms, d_k),
        random(batch, terms, d_v, seed=1),
    )
    matrix = torch.einsum("blt,btk,btv->blkv", coefficients, left, right)
    expected = matrix.square().sum((2, 3))
    torch.testing.assert_close(squared_norm_of_sum(coefficients, left, right), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("advantage", [0, 100])
def test_squared_norm_of_sum_gradients(monkeypatch, levels, advantage):
    """By Gram matrices and by the matrix itself; one list of coefficients, which takes a way of its own, and several."""
    monkeypatch.setattr("writesae.sae.factored._GRAM_ADVANTAGE", advantage)
    inputs = [
        random(3, levels, 4).requires_grad_(),
        random(3, 4, 5).requires_grad_(),
        random(3, 4, 6, seed=1).requires_grad_(),
    ]
    assert gradcheck(squared_norm_of_sum, inputs)
    frozen = [inputs[0], inputs[1].detach(), inputs[2]]
    assert gradcheck(squared_norm_of_sum, frozen)


def test_rows_are_gathered_a_few_samples_at_a_time_and_again_on_the_way_back(monkeypatch):
    monkeypatch.setattr(factored, "_GATHERED", 3)
    gathered, seen = factored._gathered_norms, []
    monkeypatch.setattr(factored, "_gathered_norms", lambda c, i, *rows: seen.append(len(i)) or gathered(c, i, *rows))
    tables, coefficients = [random(7, 5), random(7, 4, seed=1)], random(8, 2, 4, seed=2)
    indices = torch.randint(7, (8, 4), generator=torch.Generator().manual_seed(0))
    inputs = [tensor.requires_grad_() for tensor in (coefficients, *tables)]
    whole = squared_norm_of_sum(inputs[0], *(side[indices] for side in inputs[1:]))
    in_parts = factored.squared_norms_at(inputs[0], tuple(inputs[1:]), indices)
    torch.testing.assert_close(in_parts, whole, rtol=1e-12, atol=1e-12)
    expected, found = (torch.autograd.grad(way.square().sum(), inputs) for way in (whole, in_parts))
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    assert sorted(seen) == [2, 2, 3, 3, 3, 3]


def test_inner_with_sum_is_that_of_the_matrices():
    left, right, other_left, other_right = (
        random(2, 3, 5),
        random(2, 3, 4),
        random(2, 6, 5, seed=1),
        random(2, 6, 4, seed=2),
    )
    coefficients = random(2, 6, seed=3)
    matrix = torch.einsum("bt,btk,btv->bkv", coefficients, other_left, other_right)
    expected = torch.einsum("btk,bkv,btv->bt", left, matrix, right)
    result = inner_with_sum(left, right, coefficients, other_left, other_right)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def bilinear_at_rows(key_factors, value_factors, key, value, indices):
    by_key, by_value = (key @ key_factors.T).detach(), (value @ value_factors.T).detach()
    return bilinear_at(key_factors, value_factors, key, value, by_key, by_value, indices)


def test_bilinear_at_is_the_product_of_projections_and_its_gradients_hold():
    tables = [random(7, 5), random(7, 4, seed=1), random(3, 5, seed=2), random(3, 4, seed=3)]
    # Row 6 is never chosen, row 2 by every sample, row 0 twice by one sample.
    indices = torch.tensor([[2, 0, 0], [1, 2, 3], [5, 4, 2]])
    dense = (tables[2] @ tables[0].T) * (tables[3] @ tables[1].T)
    torch.testing.assert_close(bilinear_at_rows(*tables, indices), dense.gather(1, indices), rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda *inputs: bilinear_at_rows(*inputs, indices), [table.requires_grad_() for table in tables])


def test_bilinear_at_gives_no_gradient_to_rows_nobody_chose():
    key_factors = random(7, 5).requires_grad_()
    bilinear_at_rows(key_factors, random(7, 4), random(2, 5), random(2, 4), torch.tensor([[1], [3]])).sum().backward()
    assert key_factors.grad.abs().sum(-1).nonzero().flatten().tolist() == [1, 3]


@pytest.mark.parametrize("n_rows", [1, 4, 50])
def test_sum_outer_at_is_a_scattered_sum(n_rows):
    indices = torch.randint(n_rows, (6, 3), generator=torch.Generator().manual_seed(0))
    weights, vectors = random(6, 3), random(6, 5, seed=1)
    expected = torch.zeros(n_rows, 5, dtype=torch.float64)
    for sample in range(6):
        for place in range(3):
            expected[indices[sample, place]] += weights[sample, place] * vectors[sample]
    result = sum_outer_at(weights, *pairs_by_row(indices, n_rows), vectors)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
