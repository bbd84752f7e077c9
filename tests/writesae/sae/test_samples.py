"""Samples that are known by their inner products answer as their matrices do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from writesae.sae.samples import Factored, Matrices, Vectors

TIGHT = {"rtol": 1e-11, "atol": 1e-11}


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kinds(n=6, terms=2, d_k=5, d_v=4, seed=0):
    factored = Factored(random(n, terms, d_k, seed=seed), random(n, terms, d_v, seed=seed + 1))
    return factored, Matrices(factored.matrices())


@given(st.integers(1, 7), st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_every_answer_is_that_of_the_matrices(n, terms, d_k, d_v, seed):
    factored, dense = kinds(n, terms, d_k, d_v, seed)
    x = torch.einsum("ntk,ntv->nkv", factored.key, factored.value)
    left, right = random(8, d_k, seed=seed + 2), random(8, d_v, seed=seed + 3)
    indices = torch.randint(8, (n, 3), generator=torch.Generator().manual_seed(seed))
    scores = torch.einsum("nkv,rk,rv->nr", x, left, right)
    coefficients, matrix = random(n, 2, 3, seed=seed + 4), random(d_k, d_v, seed=seed + 5)
    rebuilt = torch.einsum("nlt,ntk,ntv->nlkv", coefficients, left[indices], right[indices])
    for samples in (factored, dense):
        assert (len(samples), samples.d_k, samples.d_v) == (n, d_k, d_v)
        inner = samples.inner(left, right)
        close = [
            (samples.matrices(), x),
            (inner.scores, scores),
            (samples.inner_at(left, right, inner, indices), scores.gather(1, indices)),
            (samples.inner_with(left[indices], right[indices], (left, right), indices), scores.gather(1, indices)),
            (samples.inner_with_matrix(matrix), (x * matrix).sum((1, 2))),
            (samples.squared_norms(), x.square().sum((1, 2))),
            (samples.mean(), x.mean(0)),
            (samples.scaled(3.0).matrices(), 3 * x),
            (samples.take(torch.arange(n).flip(0)).matrices(), x.flip(0)),
            (torch.cat([block.matrices() for block in samples.blocks(2)]), x),
            (
                samples.squared_errors(coefficients, left[indices], right[indices], (left, right), indices),
                (x[:, None] - rebuilt).square().sum((2, 3)),
            ),
        ]
        for ours, reference in close:
            torch.testing.assert_close(ours, reference, **TIGHT)


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("which", [0, 1])
def test_leading_vectors_are_those_of_the_decomposition(terms, which):
    samples = kinds(terms=terms)[which]
    rows = torch.tensor([4, 1])
    u, v = samples.leading(rows)
    x = samples.matrices()[rows]
    strongest = torch.linalg.matrix_norm(x, 2)
    torch.testing.assert_close((u[:, None] @ x @ v[:, :, None]).flatten(), strongest, **TIGHT)
    torch.testing.assert_close(u.norm(dim=1), torch.ones(2).double(), **TIGHT)
    assert samples.leading(rows[:0])[0].shape == (0, 5)


def test_a_zero_sample_has_no_direction():
    key, value = random(2, 1, 5), random(2, 1, 4)
    key[1] = 0
    for samples in (Factored(key, value), Matrices(Factored(key, value).matrices())):
        u, v = samples.leading(torch.tensor([0, 1]))
        assert torch.isfinite(u).all() and u[1].abs().max() == 0 and abs(float(u[0].norm()) - 1) < 1e-12
        assert abs(float(v[0].norm()) - 1) < 1e-12


def test_vectors_are_matrices_of_one_column():
    x = random(3, 5)
    vectors = Vectors(x)
    assert vectors.d_v == 1 and torch.equal(vectors.matrices()[:, :, 0], x)
    torch.testing.assert_close(vectors.scaled(2.0).take(slice(1, 3)).matrices()[:, :, 0], 2 * x[1:], **TIGHT)


def test_scores_in_a_narrower_type_are_not_learned_from():
    samples = kinds()[0]
    left, right = random(8, 5, seed=3).requires_grad_(), random(8, 4, seed=4)
    indices = torch.tensor([[0, 7]] * 6)
    exact = samples.inner_at(left, right, samples.inner(left, right), indices)
    narrow = samples.inner(left, right)
    narrow = type(narrow)(narrow.scores.bfloat16(), tuple(kept.bfloat16() for kept in narrow.kept))
    again = samples.inner_at(left, right, narrow, indices)
    torch.testing.assert_close(again, exact, **TIGHT)
    first, second = (torch.autograd.grad(way.sum(), left)[0] for way in (exact, again))
    torch.testing.assert_close(first, second, **TIGHT)


def test_shapes_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="same leading axes"):
        Factored(random(3, 5), random(2, 4))
    with pytest.raises(ValueError, match=r"\[sample, d_k, d_v\]"):
        Matrices(random(3, 5))
