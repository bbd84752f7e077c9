"""Atoms as factors against atoms as matrices."""

import pytest
import torch

from writesae.config import WriteSAEConfig
from writesae.sae.atoms import DenseAtoms, OuterProductAtoms
from writesae.sae.samples import Factored, Matrices

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def atoms_of(rank, n_atoms=7):
    config = WriteSAEConfig(d_k=5, d_v=4, n_atoms=n_atoms, k=2, rank=rank)
    return OuterProductAtoms(config, torch.Generator().manual_seed(0)).double()


def matrices(atoms):
    return torch.einsum("nrk,nrv->nkv", atoms.key_atoms, atoms.value_atoms)


@pytest.mark.parametrize("rank", [1, 3])
def test_atoms_start_at_unit_norm(rank):
    assert (atoms_of(rank).norms() - 1).abs().max() < 1e-6


@pytest.mark.parametrize("rank", [1, 3])
def test_norms_are_recomputed_from_the_factors(rank):
    atoms = atoms_of(rank)
    with torch.no_grad():
        atoms.key_atoms[2] *= 3.0
    torch.testing.assert_close(atoms.norms(), matrices(atoms).flatten(1).norm(dim=1), **TIGHT)


@pytest.mark.parametrize("rank", [1, 3])
def test_normalise_keeps_directions_and_balances_factors(rank):
    atoms = atoms_of(rank)
    with torch.no_grad():
        atoms.key_atoms.mul_(torch.rand(7, rank, 1) + 0.5)
        atoms.value_atoms.mul_(5.0)
    before = matrices(atoms)
    atoms.normalise_()
    expected = before / before.flatten(1).norm(dim=1)[:, None, None]
    torch.testing.assert_close(matrices(atoms), expected, **TIGHT)
    torch.testing.assert_close(atoms.key_atoms.norm(dim=-1), atoms.value_atoms.norm(dim=-1), **TIGHT)


@pytest.mark.parametrize("rank", [1, 2])
def test_normalise_leaves_a_zero_atom_finite(rank):
    atoms = atoms_of(rank)
    with torch.no_grad():
        atoms.key_atoms[0] = atoms.value_atoms[0] = 0.0
    atoms.normalise_()
    assert torch.isfinite(atoms.key_atoms).all() and matrices(atoms)[0].abs().max() == 0


@pytest.mark.parametrize("rank", [1, 3])
def test_decode_and_inner_products_agree_with_matrices(rank):
    atoms = atoms_of(rank)
    indices, values = torch.tensor([[0, 6], [3, 3], [2, 1]]), torch.rand(3, 2, dtype=torch.float64)
    expected = torch.einsum("bi,bikv->bkv", values, matrices(atoms)[indices])
    torch.testing.assert_close(atoms.decode(indices, values), expected, **TIGHT)
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(atoms.inner_with_matrix(x), (matrices(atoms) * x).sum((1, 2)), **TIGHT)
    torch.testing.assert_close(atoms.matrix(3).AB, matrices(atoms)[3], **TIGHT)


def test_projected_gradients_are_orthogonal_to_their_factors():
    atoms = atoms_of(2)
    matrices(atoms).pow(3).sum().backward()
    before = atoms.key_atoms.grad.clone()
    atoms.project_gradients_()
    assert (atoms.key_atoms.grad * atoms.key_atoms).sum(-1).abs().max() < 1e-12
    assert (atoms.value_atoms.grad * atoms.value_atoms).sum(-1).abs().max() < 1e-12
    assert (before - atoms.key_atoms.grad).abs().max() > 1e-3


@pytest.mark.parametrize("rank", [1, 3])
def test_reset_makes_the_given_outer_product_lead(rank):
    atoms = atoms_of(rank)
    others = matrices(atoms)[[0, 2, 3, 5, 6]]
    chosen = Factored(torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64))
    atoms.reset_(torch.tensor([4, 1]), chosen, chosen.leading(torch.arange(2)))
    made = matrices(atoms)
    assert torch.equal(made[[0, 2, 3, 5, 6]], others)
    leading = chosen.matrices() / chosen.squared_norms().sqrt()[:, None, None]
    assert (made[[4, 1]] - leading).flatten(1).norm(dim=1).max() <= 0.01 * (rank - 1) + 1e-12
    assert atoms.key_atoms[4].norm(dim=-1).min() > 0


def dense_atoms(encoder="linear"):
    config = WriteSAEConfig(d_k=5, d_v=4, n_atoms=7, k=2, encoder=encoder, decoder="dense")
    return DenseAtoms(config, torch.Generator().manual_seed(0)).double()


def test_dense_atoms_beside_a_bilinear_encoder_start_as_its_outer_products():
    atoms = dense_atoms("bilinear")
    key, value = atoms.leading_factors()
    torch.testing.assert_close(torch.einsum("nrk,nrv->nkv", key, value).double(), atoms.matrices())
    assert torch.linalg.matrix_rank(dense_atoms().matrices()).tolist() == [4] * 7


def test_dense_atoms_answer_as_their_matrices_do():
    atoms = dense_atoms()
    assert (atoms.norms() - 1).abs().max() < 1e-6
    indices, values = torch.tensor([[0, 6], [3, 3], [2, 1]]), torch.rand(3, 2, dtype=torch.float64)
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    rebuilt = torch.einsum("bi,bikv->bkv", values, atoms.atoms[indices])
    torch.testing.assert_close(atoms.decode(indices, values), rebuilt, **TIGHT)
    inner = torch.einsum("bkv,bikv->bi", x, atoms.atoms[indices])
    torch.testing.assert_close(atoms.inner_at(Matrices(x), indices), inner, **TIGHT)
    of_code = torch.einsum("bkv,bikv->bi", rebuilt, atoms.atoms[indices])
    torch.testing.assert_close(atoms.inner_with_code(indices, indices, values), of_code, **TIGHT)
    torch.testing.assert_close(atoms.squared_norms_of(indices, values), rebuilt.square().sum((1, 2)), **TIGHT)
    torch.testing.assert_close(atoms.matrix(3).AB, atoms.atoms[3], **TIGHT)


def test_dense_atoms_are_kept_at_unit_norm_and_reset_to_samples():
    atoms = dense_atoms()
    atoms.atoms.pow(3).sum().backward()
    atoms.project_gradients_()
    assert (atoms.atoms.grad * atoms.atoms).sum((1, 2)).abs().max() < 1e-12 < atoms.atoms.grad.abs().max()
    with torch.no_grad():
        atoms.atoms.mul_(3.0)
    atoms.normalise_()
    assert (atoms.norms() - 1).abs().max() < 1e-12
    chosen = Matrices(torch.randn(1, 5, 4, dtype=torch.float64))
    atoms.reset_(torch.tensor([2]), chosen, chosen.leading(torch.arange(1)))
    torch.testing.assert_close(atoms.atoms[2], chosen.x[0] / chosen.x[0].norm(), **TIGHT)
