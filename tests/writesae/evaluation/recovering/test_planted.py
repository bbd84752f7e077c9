"""Planted samples: what is asked for is what is made."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from writesae import WriteSAE, WriteSAEConfig
from writesae.evaluation.recovering.planted import NOISE_TERMS, Planted, PlantedAtoms


def drawn(n, **fields):
    planted = Planted(**fields)
    atoms = PlantedAtoms(planted)
    return atoms, atoms.draw(n, torch.Generator().manual_seed(1))


def group_pairs(n_atoms, group):
    groups = torch.arange(n_atoms) // group
    return (groups[:, None] == groups[None]) & ~torch.eye(n_atoms, dtype=torch.bool)


@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("group", [8, 240])
def test_the_overlap_is_as_asked_within_groups_and_none_between(overlap, group):
    atoms = PlantedAtoms(Planted(n_atoms=240, d_k=32, d_v=48, overlap=overlap, group=group))
    torch.testing.assert_close(atoms.key.norm(dim=1), torch.ones(240))
    torch.testing.assert_close(atoms.value.norm(dim=1), torch.ones(240))
    cosines, within = atoms.cosines(), group_pairs(240, group)
    assert cosines[within].mean() == pytest.approx(overlap, abs=0.02)
    if group < 240:
        assert abs(cosines[~within & ~torch.eye(240, dtype=torch.bool)].mean()) < 0.01
    # Each side has its share: key and value cosines alone are the root of the overlap.
    assert (atoms.key @ atoms.key.T)[within].mean() == pytest.approx(overlap**0.5, abs=0.03)


def test_cosines_are_those_of_the_matrices():
    atoms = PlantedAtoms(Planted(n_atoms=6, d_k=4, d_v=5, overlap=0.4, k=2))
    x = (atoms.key[:, :, None] * atoms.value[:, None, :]).flatten(1)
    torch.testing.assert_close(atoms.cosines(), torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1))


def test_a_write_is_k_different_atoms_with_coefficients_in_range():
    atoms, samples = drawn(50, n_atoms=12, d_k=16, d_v=16, k=5, lowest=0.25, noise=0.0)
    flat = (atoms.key[:, :, None] * atoms.value[:, None, :]).flatten(1).double()
    codes = torch.linalg.lstsq(flat.T, samples.matrices().flatten(1).T.double()).solution.T
    active = codes.abs() > 1e-4
    assert (active.sum(1) == 5).all()
    assert codes[active].min() > 0.25 - 1e-4 and codes[active].max() < 1.75 + 1e-4
    assert codes[active].mean() == pytest.approx(1, abs=0.1)
    assert active.any(0).all()


def test_all_atoms_are_equally_likely():
    atoms, samples = drawn(4000, n_atoms=10, d_k=8, d_v=8, k=2, noise=0.0, lowest=1.0)
    counts = (samples.key.flatten(0, 1) @ atoms.key.T > 1 - 1e-5).sum(0)
    assert counts.sum() == 8000 and (counts - 800).abs().max() < 5 * 800**0.5


@settings(max_examples=20, deadline=None)
@given(noise=st.floats(0.001, 2), overlap=st.floats(0, 0.9), k=st.integers(1, 6))
def test_the_noise_has_the_norm_that_was_asked_for(noise, overlap, k):
    fields = dict(n_atoms=20, d_k=12, d_v=9, k=k, overlap=overlap)
    _, noisy = drawn(1500, noise=noise, **fields)
    clean = noisy.key[:, :k].transpose(1, 2) @ noisy.value[:, :k]
    added = noisy.matrices() - clean
    share = (added.square().sum((1, 2)) / clean.square().sum((1, 2))).mean().sqrt()
    assert share == pytest.approx(noise, rel=0.1)
    assert noisy.terms == k + NOISE_TERMS


def test_the_noise_is_white():
    _, noisy = drawn(20000, n_atoms=4, d_k=3, d_v=2, k=1, noise=1.0)
    added = (noisy.key[:, 1:].transpose(1, 2) @ noisy.value[:, 1:]).flatten(1)
    covariance = added.T @ added / len(added)
    off = covariance / covariance.diagonal().mean() - torch.eye(6)
    assert off.abs().max() < 0.15


def test_a_state_is_the_decayed_sum_of_planted_writes():
    fields = dict(n_atoms=9, d_k=5, d_v=4, k=2, noise=0.1)
    _, writes = drawn(6 * 3, **fields)
    _, states = drawn(6, kind="states", length=3, log_decay=-0.3, **fields)
    expected = torch.zeros(6, 5, 4)
    for step in range(3):
        expected = torch.exp(torch.tensor(-0.3)) * expected + writes.matrices().view(6, 3, 5, 4)[:, step]
    torch.testing.assert_close(states.matrices(), expected)


def test_a_dictionary_of_the_same_seed_does_not_start_at_the_planted_atoms():
    atoms = PlantedAtoms(Planted(n_atoms=64, d_k=32, d_v=32, k=2, seed=0))
    sae = WriteSAE(WriteSAEConfig(d_k=32, d_v=32, n_atoms=64, k=2, seed=0))
    assert (sae.key_atoms[:, 0] @ atoms.key.T).diagonal().abs().max() < 0.9


def test_batches_follow_from_their_seed_and_differ_from_each_other():
    atoms = PlantedAtoms(Planted(n_atoms=9, d_k=5, d_v=4, k=2))
    one, two, other = (atoms.batches(4, seed) for seed in (3, 3, 4))
    first = next(one)
    assert torch.equal(first.value, next(two).value) and not torch.equal(first.value, next(other).value)
    second = next(one)
    assert torch.equal(second.value, next(two).value) and not torch.equal(first.value, second.value)
    assert not torch.equal(atoms.key, PlantedAtoms(Planted(n_atoms=9, d_k=5, d_v=4, k=2, seed=1)).key)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"k": 513}, "k must be at most n_atoms=512, got 513"),
        ({"overlap": 1.0}, "overlap must lie below 1"),
        ({"overlap": -0.1}, "overlap must be at least 0"),
        ({"overlap": 0.5, "d_v": 1}, "at least 2 dimensions"),
        ({"lowest": 1.1}, "lowest must lie in 0..1"),
        ({"noise": -1.0}, "noise must be at least 0"),
        ({"kind": "write"}, "did you mean 'writes'"),
        ({"log_decay": 0.1}, "log_decay must be at most 0"),
        ({"length": 0}, "length must be greater than 0"),
        ({"group": 0}, "group must be greater than 0"),
    ],
)
def test_what_cannot_be_planted_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        Planted(**fields)


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="did you mean 'noise'"):
        Planted.from_dict({"nois": 0.1})
    assert Planted.from_dict(Planted(k=3).to_dict()) == Planted(k=3)
