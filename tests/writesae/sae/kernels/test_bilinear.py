"""Scores at chosen rows, interpreted, against the matrices formed in float64 on the same (rounded) inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.writesae.sae.kernels.cases import BOUNDS, COMMON, chosen, compare, error, outcome, random
from writesae.sae.kernels import bilinear as kernels
from writesae.sae.kernels import reference
from writesae.sae.kernels.bilinear import bilinear_at


def dense(key_factors, value_factors, key, value, indices):
    """By the definition, p_i^T X r_i of every row, of which the chosen ones are taken."""
    x = torch.einsum("bk,bv->bkv", key, value)
    return torch.einsum("rk,bkv,rv->br", key_factors, x, value_factors).gather(1, indices)


def inputs(batch=3, terms=5, d_k=16, d_v=16, rows=9, dtype=torch.float32, seed=0):
    shapes = ((rows, d_k), (rows, d_v), (batch, d_k), (batch, d_v))
    tensors = [random(*shape, seed=seed + place, dtype=dtype) for place, shape in enumerate(shapes)]
    return [*tensors, chosen(batch, terms, rows, seed)]


@pytest.mark.parametrize("dtype", COMMON, ids=str)
@pytest.mark.parametrize("widths", [(16, 16), (48, 80), (7, 133), (1, 1), (300, 1)], ids=str)
def test_equals_the_matrix(widths, dtype):
    compare(bilinear_at, dense, inputs(d_k=widths[0], d_v=widths[1], dtype=dtype), BOUNDS[dtype])


@pytest.mark.parametrize(("batch", "terms"), [(1, 1), (1, 32), (1, 33), (2, 70), (40, 1), (33, 2)])
def test_any_number_of_samples_and_rows(batch, terms):
    """More pairs of one row than a block of them, too: three rows share all pairs."""
    compare(bilinear_at, dense, inputs(batch=batch, terms=terms, rows=3), 1e-4)


@settings(max_examples=10)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 70), st.integers(1, 70), st.integers(1, 12)),
    st.sampled_from(list(BOUNDS)),
    st.integers(0, 10**6),
)
def test_equals_the_matrix_whatever_the_sizes(sizes, dtype, seed):
    given_ = inputs(**dict(zip(("batch", "terms", "d_k", "d_v", "rows"), sizes, strict=True)), dtype=dtype, seed=seed)
    compare(bilinear_at, dense, given_, BOUNDS[dtype])


def test_equals_the_reference():
    for got, expected in zip(outcome(bilinear_at, inputs()), outcome(reference.bilinear_at, inputs()), strict=True):
        assert error(got, expected) < 1e-5


def test_rows_that_nobody_chose_get_no_gradient():
    given_ = inputs(batch=2, terms=2, rows=7)
    given_[-1] = torch.tensor([[1, 6], [3, 1]])
    for gradient in compare(bilinear_at, dense, given_, 1e-4)[1:3]:
        assert gradient.abs().sum(-1).nonzero().flatten().tolist() == [1, 3, 6]


def test_pairs_without_a_gradient_add_nothing():
    """What an activation cuts off has no gradient; its pairs stand in no row."""
    given_ = [one.requires_grad_() if one.is_floating_point() else one for one in inputs(rows=4)]
    cut = torch.ones(3, 5)
    cut[:, 2:] = 0.0
    (bilinear_at(*given_) * cut).sum().backward()
    expected = outcome(lambda *a: (dense(*a) * cut).sum()[None] / random(1, seed=99).item(), inputs(rows=4))
    for leaf, gradient in zip(given_, expected[1:], strict=False):
        assert error(leaf.grad, gradient) < 1e-4


def test_a_projection_of_zero_still_has_a_gradient():
    """(p . key) = 0 where key is orthogonal to p: the gradient of r vanishes, that of p does not."""
    given_ = inputs(batch=1, terms=2, rows=2)
    given_[2][:, 0], given_[0][:, 1:] = 0.0, 0.0
    _, of_p, of_r, *_ = compare(bilinear_at, dense, given_, 1e-4)
    assert of_r.abs().max() == 0 and of_p.abs().max() > 0


def test_only_what_is_asked_for_is_computed(monkeypatch):
    asked = []
    for name in ("sum_by_row", "sum_of_rows"):
        real = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, name=name, real=real: asked.append(name) or real(*a))
    for leaf, name in ((0, "sum_by_row"), (1, "sum_by_row"), (2, "sum_of_rows"), (3, "sum_of_rows")):
        asked.clear()
        given_ = [one.requires_grad_() if place == leaf else one for place, one in enumerate(inputs())]
        bilinear_at(*given_).sum().backward()
        assert asked == [name, name]


def test_strided_inputs():
    strided = [torch.stack([one, one], dim=-1)[..., 0] for one in inputs()]
    for got, expected in zip(outcome(bilinear_at, strided), outcome(bilinear_at, inputs()), strict=True):
        assert torch.equal(got, expected)


def test_no_sample_is_no_score_and_no_gradient():
    empty = [one if place < 2 else one[:0] for place, one in enumerate(inputs())]
    value, *gradients = outcome(bilinear_at, empty)
    assert value.shape == (0, 5)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


def test_the_operators_are_what_they_say():
    """Schema, fake tensors, autograd and ahead-of-time dispatch, by torch's own checks."""
    given_ = [one.requires_grad_() if one.is_floating_point() else one for one in inputs()]
    torch.library.opcheck(kernels.projections_at, tuple(given_))
    plain = tuple(one.detach() for one in given_)
    for of_factors in (False, True):
        gradients = (torch.ones(3, 5), torch.ones(3, 5))
        torch.library.opcheck(kernels.projections_gradient, (*gradients, *plain, of_factors))


def test_a_second_derivative_is_refused():
    given_ = [one.requires_grad_() if one.is_floating_point() else one for one in inputs()]
    (gradient,) = torch.autograd.grad(bilinear_at(*given_).sum(), given_[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="bilinear_at have no second derivatives"):
        gradient.sum().backward()
