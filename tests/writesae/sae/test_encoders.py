"""The bilinear encoder: scores of writes from their factors, of matrices by definition, and at chosen atoms."""

import pytest
import torch

from writesae.config import WriteSAEConfig
from writesae.sae.encoders import BilinearEncoder

TIGHT = {"rtol": 1e-12, "atol": 1e-12}
SCALE = torch.tensor(0.5, dtype=torch.float64)


def encoder_of(rank, n_atoms=7):
    config = WriteSAEConfig(d_k=5, d_v=4, n_atoms=n_atoms, k=2, rank=rank)
    encoder = BilinearEncoder(config, torch.randn(n_atoms, rank, 5), torch.randn(n_atoms, rank, 4)).double()
    with torch.no_grad():
        encoder.bias.normal_()
    return encoder


def writes(n=3):
    return torch.randn(n, 5, dtype=torch.float64), torch.randn(n, 4, dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 2])
def test_all_three_ways_score_alike(rank):
    encoder, (key, value) = encoder_of(rank), writes()
    by_definition = torch.stack(
        [
            sum(
                (encoder.key_factors[i, r] @ torch.outer(key[b], value[b]) @ encoder.value_factors[i, r])
                for r in range(rank)
            )
            + SCALE * encoder.bias[i]
            for b in range(3)
            for i in range(7)
        ]
    ).view(3, 7)
    of_matrix = encoder.scores_of_matrix(torch.einsum("bk,bv->bkv", key, value), SCALE)
    projections = encoder.project(key, value, SCALE)
    indices = torch.tensor([[6, 0], [2, 3], [1, 1]])
    chosen = encoder.at(indices, key, value, projections, SCALE)
    torch.testing.assert_close(of_matrix, by_definition, **TIGHT)
    torch.testing.assert_close(projections.scores, by_definition, **TIGHT)
    torch.testing.assert_close(chosen, by_definition.gather(1, indices), **TIGHT)
    assert not projections.scores.requires_grad


@pytest.mark.parametrize("rank", [1, 2])
def test_gradients_at_chosen_atoms_are_those_of_the_definition(rank):
    encoder, (key, value) = encoder_of(rank), writes()
    indices, weights = torch.tensor([[6, 0], [2, 3], [1, 6]]), torch.rand(3, 2, dtype=torch.float64)
    (encoder.at(indices, key, value, encoder.project(key, value, SCALE), SCALE) * weights).sum().backward()
    factored = [parameter.grad.clone() for parameter in encoder.parameters()]
    encoder.zero_grad()
    scores = encoder.scores_of_matrix(torch.einsum("bk,bv->bkv", key, value), SCALE)
    (scores.gather(1, indices) * weights).sum().backward()
    for ours, parameter in zip(factored, encoder.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, **TIGHT)


def test_absorbed_mean_centres_the_scores():
    encoder, (key, value) = encoder_of(2), writes()
    mean = torch.randn(5, 4, dtype=torch.float64)
    encoder.absorb_mean_(mean, 1 / SCALE)
    x = torch.einsum("bk,bv->bkv", key, value)
    centred = torch.einsum("nrk,bkv,nrv->bn", encoder.key_factors, x - mean, encoder.value_factors)
    torch.testing.assert_close(encoder.scores_of_matrix(x, SCALE), centred, **TIGHT)


def test_reset_shrinks_to_the_living_and_clears_the_bias():
    encoder = encoder_of(1)
    alive = torch.tensor([0, 1, 2])
    mean_length = encoder.key_factors[alive].norm(dim=-1).mean()
    direction = torch.nn.functional.normalize(torch.randn(1, 5, dtype=torch.float64), dim=1)
    encoder.reset_(torch.tensor([5]), direction, torch.randn(1, 4, dtype=torch.float64), alive, 0.2)
    torch.testing.assert_close(encoder.key_factors[5, 0], 0.2 * mean_length * direction[0], **TIGHT)
    assert encoder.bias[5] == 0 and encoder.bias[4] != 0
    encoder.reset_(torch.tensor([5]), direction, torch.randn(1, 4, dtype=torch.float64), alive[:0], 0.2)
    assert abs(encoder.key_factors[5].norm().item() - 0.2) < 1e-12
