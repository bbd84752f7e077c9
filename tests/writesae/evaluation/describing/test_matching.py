"""Matching of dictionaries: the same atoms in another order are found, others are not."""

import pytest
import torch

from writesae import WriteSAE, WriteSAEConfig
from writesae.evaluation.describing.matching import atom_cosines, match_atoms


def dictionary(seed, n_atoms=20, **more):
    return WriteSAE(WriteSAEConfig(d_k=6, d_v=9, n_atoms=n_atoms, k=2, seed=seed, **more)).double()


def shuffled(sae, seed=5, n_atoms=20, **more):
    other = dictionary(seed, n_atoms, **more)
    order = torch.randperm(n_atoms, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        # the sign may go from one side to the other, and a side may be longer
        other.decoder.key_atoms.copy_(-2 * sae.key_atoms[order])
        other.decoder.value_atoms.copy_(-sae.value_atoms[order])
    return other


@pytest.mark.parametrize("rank", [1, 2])
def test_the_same_atoms_in_another_order_match_completely(rank):
    sae = dictionary(0, rank=rank)
    match = match_atoms(sae, shuffled(sae, rank=rank))
    assert match.share == 1 and match.median_cosine == pytest.approx(1)
    assert match.null_share < 0.1 and match.null_median_cosine < 0.7


def test_other_atoms_match_no_better_than_chance():
    match = match_atoms(dictionary(0), dictionary(1))
    assert match.share == 0
    assert match.median_cosine == pytest.approx(match.null_median_cosine, abs=0.12)


def test_a_negated_atom_is_another_atom():
    sae, other = dictionary(0), dictionary(0)
    with torch.no_grad():
        other.decoder.key_atoms.neg_()
    assert match_atoms(sae, other).share == 0


def test_one_atom_is_the_partner_of_one():
    sae, other = dictionary(0, n_atoms=4), dictionary(1, n_atoms=4)
    with torch.no_grad():
        for side in ("key_atoms", "value_atoms"):
            getattr(sae.decoder, side).copy_(getattr(sae.decoder, side)[:1].expand(4, -1, -1))  # four times the same
            getattr(other.decoder, side)[2] = getattr(sae.decoder, side)[0]
    assert match_atoms(sae, other).share == 0.25


def test_chosen_atoms_and_dense_ones():
    sae = dictionary(0)
    some = torch.tensor([3, 7, 9])
    match = match_atoms(sae, sae, some, torch.arange(8))
    assert (match.n_first, match.n_second) == (3, 8) and match.share == pytest.approx(2 / 3)
    dense = dictionary(0, decoder="dense")
    assert match_atoms(dense, dense).share == 1
    expected = torch.cosine_similarity(sae.decoder.matrices()[3].flatten(), sae.decoder.matrices()[5].flatten(), dim=0)
    assert float(atom_cosines(sae, sae)[3, 5]) == pytest.approx(float(expected))


def test_what_cannot_be_matched_is_refused():
    other = WriteSAE(WriteSAEConfig(d_k=9, d_v=6, n_atoms=5, k=2)).double()
    with pytest.raises(ValueError, match="6 x 9 cannot be matched with atoms of 9 x 6"):
        match_atoms(dictionary(0), other)
    with pytest.raises(ValueError, match="nothing to match"):
        match_atoms(dictionary(0), dictionary(1), torch.arange(0))
