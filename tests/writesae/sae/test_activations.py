"""TopK: the k largest signed scores, then ReLU; the grouped search finds what the plain one finds."""

import pytest
import torch

from writesae.config import WriteSAEConfig
from writesae.sae.activations import TopK, largest


@pytest.mark.parametrize("n_atoms", [40, 1024, 2048, 1000])
@pytest.mark.parametrize("k", [1, 8, 32])
def test_largest_finds_the_k_largest(n_atoms, k):
    scores = torch.randn(9, n_atoms)
    found = scores.gather(1, largest(scores, k)).sort(dim=1, descending=True).values
    assert torch.equal(found, scores.topk(k, dim=1).values)


def test_largest_survives_ties_and_minus_infinity():
    scores = torch.full((3, 2048), -torch.inf)
    scores[:, 7], scores[1:, 300:400] = 1.0, 2.0
    indices = largest(scores, 32)
    assert all(len(set(row)) == 32 for row in indices.tolist())
    assert scores.gather(1, indices)[1:].eq(2.0).all()


def test_top_k_drops_negative_scores_among_the_largest():
    topk = TopK(WriteSAEConfig(d_k=4, d_v=3, n_atoms=6, k=3))
    scores = torch.tensor([[-5.0, 2.0, -0.5, -3.0, 1.0, -4.0]])
    indices = topk.select(scores)
    values = topk.apply(scores.gather(1, indices), indices)
    kept = dict(zip(indices[0].tolist(), values[0].tolist(), strict=True))
    assert kept == {1: 2.0, 4: 1.0, 2: 0.0}
