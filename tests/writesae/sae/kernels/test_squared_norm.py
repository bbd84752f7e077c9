"""The squared norm of a sum over chosen rows, interpreted, against the matrix in float64 on the same (rounded) inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.writesae.sae.kernels.cases import BOUNDS, COMMON, chosen, compare, error, outcome, random, surrounded
from writesae.sae.kernels import reference, squared_norm
from writesae.sae.kernels.squared_norm import squared_norm_at


def dense(coefficients, key_atoms, value_atoms, indices, extra_key, extra_value, extra_coefficients):
    """By the definition."""
    matrix = torch.einsum("blt,btk,btv->blkv", coefficients, key_atoms[indices], value_atoms[indices])
    matrix = matrix + torch.einsum("blm,bmk,bmv->blkv", extra_coefficients, extra_key, extra_value)
    return matrix.square().sum((2, 3))


def inputs(batch=3, levels=1, terms=5, extras=1, d_k=16, d_v=16, rows=9, dtype=torch.float32, seed=0):
    """Arguments of `squared_norm_at`; coefficients stay float32, as activations do."""
    return [
        random(batch, levels, terms, seed=seed),
        random(rows, d_k, seed=seed + 1, dtype=dtype),
        random(rows, d_v, seed=seed + 2, dtype=dtype),
        chosen(batch, terms, rows, seed),
        random(batch, extras, d_k, seed=seed + 3, dtype=dtype),
        random(batch, extras, d_v, seed=seed + 4, dtype=dtype),
        random(batch, levels, extras, seed=seed + 5),
    ]


@pytest.mark.parametrize("dtype", COMMON, ids=str)
@pytest.mark.parametrize(("widths", "levels"), [((16, 16), 1), ((48, 80), 3), ((7, 33), 1)], ids=str)
def test_equals_the_matrix(widths, levels, dtype):
    given_ = inputs(batch=2, levels=levels, d_k=widths[0], d_v=widths[1], dtype=dtype)
    compare(squared_norm_at, dense, given_, BOUNDS[dtype])


@pytest.mark.parametrize(("terms", "extras"), [(18, 1), (1, 1), (15, 0), (3, 13)])
def test_any_number_of_terms(terms, extras):
    compare(squared_norm_at, dense, inputs(batch=1, terms=terms, extras=extras, rows=30), 1e-4)


@pytest.mark.parametrize("terms", [32, 47, 48, 64])
def test_any_number_of_terms_forward(terms):
    """Blocks of 16 terms and, from 49 on, of 32; full ones and others."""
    given_ = inputs(batch=1, levels=2, terms=terms, rows=90)
    assert (
        error(squared_norm_at(*given_), dense(*(one.double() if one.is_floating_point() else one for one in given_)))
        < 1e-4
    )


@pytest.mark.parametrize("widths", [(1, 1), (300, 1), (2, 257), (128, 64), (17, 600)], ids=str)
def test_any_width(widths):
    compare(squared_norm_at, dense, inputs(batch=1, terms=6, rows=7, d_k=widths[0], d_v=widths[1]), 1e-4)


@settings(max_examples=10)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 8), st.integers(0, 2)),
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9)),
    st.sampled_from(list(BOUNDS)),
    st.integers(0, 10**6),
)
def test_equals_the_matrix_whatever_the_sizes(counts, sizes, dtype, seed):
    names = ("batch", "levels", "terms", "extras", "d_k", "d_v", "rows")
    given_ = inputs(**dict(zip(names, (*counts, *sizes), strict=True)), dtype=dtype, seed=seed)
    compare(squared_norm_at, dense, given_, BOUNDS[dtype])


@pytest.mark.parametrize(("levels", "terms", "extras"), [(1, 4, 1), (3, 15, 0)])
def test_coefficients_amid_nan(levels, terms, extras):
    """The operator itself: what is public joins the coefficients in memory of its own."""
    coefficients, *tensors, extra = inputs(batch=2, levels=levels, terms=terms, extras=extras)
    every = surrounded(torch.cat([coefficients, extra], dim=2))
    squared, applied = squared_norm.squared_norm(every, *tensors)
    assert error(squared, dense(coefficients, *tensors, extra)) < 1e-5 and applied.isfinite().all()
    for of_extra in (False, True):
        gradient = surrounded(torch.ones(2, levels))
        assert all(
            one.isfinite().all() for one in squared_norm.squared_norm_gradient(gradient, every, *tensors, of_extra)
        )


def test_equals_the_reference():
    given_ = inputs(levels=2, terms=9, extras=2)
    for got, expected in zip(outcome(squared_norm_at, given_), outcome(reference.squared_norm_at, given_), strict=True):
        assert error(got, expected) < 1e-5


def test_dtypes_may_differ():
    """Atoms in float32 and writes in bfloat16, or the reverse."""
    given_ = inputs(terms=9)
    for narrow in ((1, 2), (4, 5), (2, 4)):
        mixed = [one.bfloat16() if place in narrow else one for place, one in enumerate(given_)]
        assert compare(squared_norm_at, dense, mixed, 1e-2)[0].dtype == torch.float32


def test_a_good_reconstruction_keeps_its_precision():
    """An error of 1e-3 |X|^2, which is a difference of numbers some thousand times its size."""
    given_ = inputs(batch=2, terms=4, d_k=24, d_v=20)
    key, value = given_[1][given_[3]], given_[2][given_[3]]
    given_[4], given_[5] = key[:, :1], value[:, :1]
    given_[0].zero_()
    given_[0][:, :, 0], given_[6][:] = -0.97, 1.0
    compare(squared_norm_at, dense, given_, 1e-4)


def test_rows_of_inactive_atoms_get_no_gradient_and_their_pairs_stand_in_no_row():
    """Codes of different lengths are padded with zero coefficients, at whatever row."""
    given_ = inputs(batch=4, levels=2, terms=6, rows=9)
    given_[3][:, 3:] = 5
    given_[3][:, :3] = torch.tensor([0, 1, 2])
    given_[0][:, :, 3:] = 0.0
    key_gradient, value_gradient = compare(squared_norm_at, dense, given_, 1e-4)[2:4]
    for gradient in (key_gradient, value_gradient):
        assert gradient.abs().sum(-1).nonzero().flatten().tolist() == [0, 1, 2]


def test_an_atom_active_in_one_level_alone_gets_that_levels_gradient():
    given_ = inputs(batch=2, levels=2, terms=4, rows=4)
    given_[3][:] = torch.arange(4)
    given_[0][:, 0, 2:] = 0.0
    assert compare(squared_norm_at, dense, given_, 1e-4)[2].abs().sum(-1).gt(0).all()


def test_no_sample_is_no_norm_and_no_gradient():
    given_ = inputs(batch=1)
    empty = [one if place in (1, 2) else one[:0] for place, one in enumerate(given_)]
    value, *gradients = outcome(squared_norm_at, empty)
    assert value.shape == (0, 1)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


def test_strided_inputs():
    given_ = inputs(levels=2)
    strided = [torch.stack([one, one], dim=-1)[..., 0] for one in given_]
    assert not strided[1].is_contiguous()
    for got, expected in zip(outcome(squared_norm_at, strided), outcome(squared_norm_at, given_), strict=True):
        assert torch.equal(got, expected)


def test_only_what_is_asked_for_is_computed(monkeypatch):
    """Writes are data: their gradient is not computed unless somebody wants it, nor that of frozen atoms."""
    asked = []
    real = squared_norm.rows_gradient
    monkeypatch.setattr(squared_norm, "rows_gradient", lambda *a: asked.append(a[-1] is None) or real(*a))
    for leaves, expected in (((0,), []), ((0, 1), [False]), ((2,), [False]), ((4,), [True]), ((1, 5), [False, True])):
        asked.clear()
        given_ = [one.requires_grad_() if place in leaves else one for place, one in enumerate(inputs())]
        squared_norm_at(*given_).sum().backward()
        assert asked == expected
        assert all(given_[place].grad is not None for place in leaves)


def test_no_tensor_of_gathered_rows_is_made(monkeypatch):
    """Nothing as large as [batch, term, d] is allocated on the way, forward or backward."""
    largest = []
    fresh = torch.empty
    batch, terms, d = 10, 7, 48
    monkeypatch.setattr(torch, "empty", lambda *a, **k: largest.append(fresh(*a, **k)) or largest[-1])
    outcome(squared_norm_at, inputs(batch=batch, terms=terms, d_k=d, d_v=d, rows=5))
    assert largest and max(one.numel() for one in largest) < batch * terms * d / 4


def test_the_operators_are_what_they_say():
    """Schema, fake tensors, autograd and ahead-of-time dispatch, by torch's own checks."""
    coefficients, *tensors, extra = inputs(levels=2)
    every = torch.cat([coefficients, extra], dim=2)
    leaves = [one.requires_grad_() if one.is_floating_point() else one for one in (every, *tensors)]
    torch.library.opcheck(squared_norm.squared_norm, tuple(leaves))
    plain = tuple(leaf.detach() for leaf in leaves)
    for of_extra in (False, True):
        torch.library.opcheck(squared_norm.squared_norm_gradient, (torch.ones(3, 2), *plain, of_extra))


def test_a_second_derivative_is_refused():
    given_ = [one.requires_grad_() if one.is_floating_point() else one for one in inputs()]
    (gradient,) = torch.autograd.grad(squared_norm_at(*given_).sum(), given_[1], create_graph=True)
    with pytest.raises(NotImplementedError, match="squared_norm_at have no second derivatives"):
        gradient.sum().backward()


def test_what_is_refused():
    given_ = inputs()
    with pytest.raises(ValueError, match="cannot serve torch.float64"):
        squared_norm_at(given_[0], given_[1].double(), *given_[2:])
    wide = inputs(d_k=1025)
    with pytest.raises(ValueError, match="widths up to 1024, got 1025"):
        squared_norm_at(*wide)


def inner_inputs(batch=3, terms=4, others=6, d_k=16, d_v=16, rows=9, dtype=torch.float32, seed=0):
    tables = [random(rows, d, seed=seed + place, dtype=dtype) for place, d in enumerate((d_k, d_v))]
    return [*tables, chosen(batch, terms, rows, seed), chosen(batch, others, rows, seed + 1), random(batch, others)]


def dense_inner(key_atoms, value_atoms, indices, others, other_coefficients):
    """By the definition; the sum gets no gradient."""
    fixed = other_coefficients.detach(), key_atoms.detach()[others], value_atoms.detach()[others]
    return torch.einsum(
        "btk,bkv,btv->bt", key_atoms[indices], torch.einsum("bj,bjk,bjv->bkv", *fixed), value_atoms[indices]
    )


def of_tables(function):
    """The function with other_coefficients held fixed, which have no gradient to compare."""
    return lambda *a: function(*a) + 0 * a[-1].sum()


@pytest.mark.parametrize("dtype", COMMON, ids=str)
@pytest.mark.parametrize(("terms", "others", "widths"), [(4, 6, (16, 16)), (1, 1, (1, 1)), (3, 20, (7, 33))], ids=str)
def test_inner_products_with_a_sum_equal_those_with_the_matrix(terms, others, widths, dtype):
    given_ = inner_inputs(terms=terms, others=others, d_k=widths[0], d_v=widths[1], dtype=dtype)
    compare(of_tables(squared_norm.inner_with_sum_at), of_tables(dense_inner), given_, BOUNDS[dtype])
    if dtype == torch.float32:
        compare(of_tables(reference.inner_with_sum_at), of_tables(dense_inner), given_, BOUNDS[dtype])


def test_a_sum_that_is_held_fixed_gives_its_rows_no_gradient():
    given_ = inner_inputs(rows=9)
    given_[2][:], given_[3][:] = torch.tensor([0, 1, 2, 2]), torch.tensor([3, 4, 5, 6, 7, 8])
    for gradient in compare(of_tables(squared_norm.inner_with_sum_at), of_tables(dense_inner), given_, 1e-4)[1:3]:
        assert gradient.abs().sum(-1).nonzero().flatten().tolist() == [0, 1, 2]


def test_the_operators_of_inner_products_are_what_they_say():
    given_ = [one.requires_grad_() if place < 2 else one for place, one in enumerate(inner_inputs(d_v=20))]
    torch.library.opcheck(squared_norm.inner_with_sum, tuple(given_))
    plain = [one.detach() for one in given_]
    torch.library.opcheck(squared_norm.inner_with_sum_gradient, (torch.ones(3, 4), *plain))
