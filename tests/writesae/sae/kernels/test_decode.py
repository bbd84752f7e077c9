"""What codes rebuild, interpreted, against dense sums in float64 on the same (rounded) inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.writesae.sae.kernels.cases import BOUNDS, COMMON, chosen, compare, error, outcome, random
from writesae.sae.kernels import decode as kernels
from writesae.sae.kernels import reference
from writesae.sae.kernels.decode import decode_at, decode_dense_at


def dense(values, key_atoms, value_atoms, indices, rank=1):
    """All atoms as matrices, and a code with a place for each of them."""
    atoms = torch.einsum("nrk,nrv->nkv", key_atoms.unflatten(0, (-1, rank)), value_atoms.unflatten(0, (-1, rank)))
    every = torch.zeros(len(values), len(atoms), dtype=values.dtype).scatter_add(1, indices, values)
    return torch.einsum("bn,nkv->bkv", every, atoms)


def dense_rows(values, atoms, indices):
    """A code with a place for every atom, times the atoms."""
    every = torch.zeros(len(values), len(atoms), dtype=values.dtype).scatter_add(1, indices, values)
    return every @ atoms


def inputs(batch=3, terms=5, d_k=16, d_v=16, atoms=9, rank=1, dtype=torch.float32, seed=0):
    tables = [random(atoms * rank, d, seed=seed + place, dtype=dtype) for place, d in enumerate((d_k, d_v))]
    return [random(batch, terms, seed=seed + 2), *tables, chosen(batch, terms, atoms, seed)]


@pytest.mark.parametrize("dtype", COMMON, ids=str)
@pytest.mark.parametrize("widths", [(16, 16), (48, 80), (7, 33), (1, 1), (130, 1)], ids=str)
def test_equals_the_dense_sum(widths, dtype):
    compare(decode_at, dense, inputs(d_k=widths[0], d_v=widths[1], dtype=dtype), BOUNDS[dtype])


@pytest.mark.parametrize(("batch", "terms", "rank"), [(1, 1, 1), (1, 33, 1), (2, 12, 3), (7, 2, 2), (1, 64, 1)])
def test_any_number_of_atoms_of_any_rank(batch, terms, rank):
    compare(decode_at, dense, inputs(batch=batch, terms=terms, rank=rank, atoms=4), 1e-4, rank=rank)


@settings(max_examples=10)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 70), st.integers(1, 70), st.integers(1, 6)),
    st.integers(1, 3),
    st.sampled_from(list(BOUNDS)),
    st.integers(0, 10**6),
)
def test_equals_the_dense_sum_whatever_the_sizes(sizes, rank, dtype, seed):
    names = ("batch", "terms", "d_k", "d_v", "atoms")
    given_ = inputs(**dict(zip(names, sizes, strict=True)), rank=rank, dtype=dtype, seed=seed)
    compare(decode_at, dense, given_, BOUNDS[dtype], rank=rank)


def test_equals_the_reference():
    given_ = inputs(rank=2)
    expected = outcome(reference.decode_at, given_, rank=2)
    for got, other in zip(outcome(decode_at, given_, rank=2), expected, strict=True):
        assert error(got, other) < 1e-5


@pytest.mark.parametrize("dtype", COMMON, ids=str)
@pytest.mark.parametrize(("batch", "terms", "width"), [(3, 5, 16), (1, 1, 1), (2, 40, 70), (9, 3, 1100)])
def test_rows_equal_the_dense_sum(batch, terms, width, dtype):
    """Values in the dtype of the atoms, as torch's sum of rows has them."""
    given_ = inputs(batch=batch, terms=terms, d_k=width, atoms=4, dtype=dtype)
    got = compare(decode_dense_at, dense_rows, [given_[0], given_[1], given_[3]], BOUNDS[dtype])
    assert got[0].dtype == dtype


def test_rows_equal_the_reference():
    values, atoms, _, indices = inputs()
    expected = outcome(reference.decode_dense_at, [values, atoms, indices])
    for got, other in zip(outcome(decode_dense_at, [values, atoms, indices]), expected, strict=True):
        assert error(got, other) < 1e-5


def test_inactive_atoms_get_no_gradient_and_give_one_to_their_values():
    """A coefficient of zero adds nothing, but what it would add is known."""
    given_ = inputs(rank=1, atoms=7)
    given_[3][:, 2:] = torch.tensor([4, 5, 5])
    given_[3][:, :2] = torch.tensor([0, 6])
    given_[0][:, 2:] = 0.0
    got = compare(decode_at, dense, given_, 1e-4)
    assert got[1].abs().min() > 0
    assert all(one.abs().sum(-1).nonzero().flatten().tolist() == [0, 6] for one in got[2:])
    got = compare(decode_dense_at, dense_rows, [given_[0], given_[1], given_[3]], 1e-4)
    assert got[1].abs().min() > 0 and got[2].abs().sum(-1).nonzero().flatten().tolist() == [0, 6]


def test_only_what_is_asked_for_is_computed(monkeypatch):
    asked = []
    for name in ("between", "atoms_gradient"):
        real = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, name=name, real=real: asked.append(name) or real(*a))
    for leaf, name in ((0, "between"), (1, "atoms_gradient"), (2, "atoms_gradient")):
        asked.clear()
        given_ = [one.requires_grad_() if place == leaf else one for place, one in enumerate(inputs())]
        decode_at(*given_).sum().backward()
        assert asked == [name]


def test_strided_inputs():
    strided = [torch.stack([one, one], dim=-1)[..., 0] for one in inputs()]
    for got, expected in zip(outcome(decode_at, strided), outcome(decode_at, inputs()), strict=True):
        assert torch.equal(got, expected)
    del strided[2]
    for got, expected in zip(outcome(decode_dense_at, strided), outcome(decode_dense_at, strided), strict=True):
        assert torch.equal(got, expected)


def test_no_sample_is_no_matrix_and_no_gradient():
    values, key_atoms, value_atoms, indices = inputs()
    for function, tables in ((decode_at, (key_atoms, value_atoms)), (decode_dense_at, (key_atoms,))):
        value, *gradients = outcome(function, [values[:0], *tables, indices[:0]])
        assert len(value) == 0
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


def test_the_operators_are_what_they_say():
    """Schema, fake tensors, autograd and ahead-of-time dispatch, by torch's own checks."""
    leaves = [one.requires_grad_() if one.is_floating_point() else one for one in inputs(d_v=20)]
    torch.library.opcheck(kernels.decode, tuple(leaves))
    torch.library.opcheck(kernels.decode_dense, (leaves[0], leaves[1], leaves[3]))
    plain = [leaf.detach() for leaf in leaves]
    for of_atoms in (False, True):
        torch.library.opcheck(kernels.decode_gradient, (torch.ones(3, 16, 20), *plain, of_atoms))
        rows = (torch.ones(3, 16), plain[0], plain[1], plain[3], of_atoms)
        torch.library.opcheck(kernels.decode_dense_gradient, rows)


def test_a_second_derivative_is_refused():
    values, key_atoms, value_atoms, indices = inputs()
    values.requires_grad_()
    key_atoms.requires_grad_()
    for function, tables in ((decode_at, (key_atoms, value_atoms)), (decode_dense_at, (key_atoms,))):
        (gradient,) = torch.autograd.grad(function(values, *tables, indices).sum(), key_atoms, create_graph=True)
        with pytest.raises(NotImplementedError, match="have no second derivatives"):
            gradient.sum().backward()


def dense_inner(matrices, key_atoms, value_atoms, indices):
    """With every atom, of which the chosen ones are taken."""
    return torch.einsum("bkv,nk,nv->bn", matrices, key_atoms, value_atoms).gather(1, indices)


def inner_inputs(d_k=16, d_v=16, dtype=torch.float32, **sizes):
    _, key_atoms, value_atoms, indices = inputs(d_k=d_k, d_v=d_v, dtype=dtype, **sizes)
    return [random(len(indices), d_k, d_v, seed=7, dtype=dtype), key_atoms, value_atoms, indices]


@pytest.mark.parametrize("dtype", COMMON, ids=str)
@pytest.mark.parametrize("widths", [(16, 16), (48, 80), (7, 33), (1, 1)], ids=str)
def test_inner_products_with_matrices(widths, dtype):
    given_ = inner_inputs(*widths, dtype=dtype)
    compare(kernels.inner_of_matrices_at, dense_inner, given_, BOUNDS[dtype])
    if dtype == torch.float32:
        compare(reference.inner_of_matrices_at, dense_inner, given_, BOUNDS[dtype])


def test_the_operators_of_inner_products_are_what_they_say():
    leaves = [one.requires_grad_() if one.is_floating_point() else one for one in inner_inputs(d_v=20)]
    torch.library.opcheck(kernels.inner_of_matrices, tuple(leaves))
    plain = [leaf.detach() for leaf in leaves]
    torch.library.opcheck(kernels.inner_of_matrices_gradient, (torch.ones(3, 5), *plain))


def test_matrices_that_are_data_get_no_gradient(monkeypatch):
    monkeypatch.setattr(kernels, "decode", lambda *a: pytest.fail("not asked for"))
    matrices, key_atoms, value_atoms, indices = inner_inputs()
    kernels.inner_of_matrices_at(matrices, key_atoms.requires_grad_(), value_atoms, indices).sum().backward()
    assert key_atoms.grad is not None
