"""Encoders: scores by definition, at chosen atoms, their gradients, and where moved atoms point."""

import pytest
import torch

from writesae.config import WriteSAEConfig
from writesae.sae.atoms import DECODERS
from writesae.sae.encoders import ENCODERS
from writesae.sae.samples import Factored, Matrices

TIGHT = {"rtol": 1e-12, "atol": 1e-12}
KINDS = [
    ("bilinear", "outer_product", 1),
    ("bilinear", "dense", 2),
    ("tied", "outer_product", 2),
    ("linear", "dense", 1),
]


def encoder_of(encoder, decoder, rank, n_atoms=7):
    config = WriteSAEConfig(d_k=5, d_v=4, n_atoms=n_atoms, k=2, rank=rank, encoder=encoder, decoder=decoder)
    generator = torch.Generator().manual_seed(0)
    atoms = DECODERS[decoder](config, generator).double()
    made = ENCODERS[encoder](config, atoms, biased=True).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made, atoms


def listening_matrices(encoder, atoms, kind):
    """What every atom takes the inner product with."""
    if kind == "linear":
        return encoder.weight
    factors = (atoms.key_atoms, atoms.value_atoms) if kind == "tied" else (encoder.key_factors, encoder.value_factors)
    return torch.einsum("nrk,nrv->nkv", *factors)


def writes(terms, n=3):
    return Factored(torch.randn(n, terms, 5).double(), torch.randn(n, terms, 4).double())


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize(("kind", "decoder", "rank"), KINDS)
def test_scores_and_their_gradients_are_those_of_the_definition(kind, decoder, rank, terms):
    encoder, atoms = encoder_of(kind, decoder, rank)
    factored, indices = writes(terms), torch.tensor([[6, 0], [2, 3], [1, 6]])
    weights, parameters = torch.rand(3, 2).double(), [*encoder.parameters(), *atoms.parameters()]
    definition = (
        torch.einsum("bkv,nkv->bn", factored.matrices(), listening_matrices(encoder, atoms, kind)) + encoder.bias
    )
    expected = torch.autograd.grad((definition.gather(1, indices) * weights).sum(), parameters, allow_unused=True)
    for samples in (factored, Matrices(factored.matrices())):
        scores = encoder.project(samples)
        torch.testing.assert_close(scores.scores, definition.detach(), **TIGHT)
        assert not scores.scores.requires_grad
        chosen = encoder.at(indices, samples, scores)
        torch.testing.assert_close(chosen, definition.gather(1, indices), **TIGHT)
        found = torch.autograd.grad((chosen * weights).sum(), parameters, allow_unused=True)
        for ours, reference in zip(found, expected, strict=True):
            assert (ours is None) == (reference is None)
            if reference is not None:
                torch.testing.assert_close(ours, reference, **TIGHT)


@pytest.mark.parametrize(("kind", "decoder", "rank"), KINDS)
def test_scores_of_a_matrix_and_amplification(kind, decoder, rank):
    encoder, atoms = encoder_of(kind, decoder, rank)
    x = torch.randn(5, 4).double()
    before = encoder.of_matrix(x).detach().clone()
    torch.testing.assert_close(before, (listening_matrices(encoder, atoms, kind) * x).sum((1, 2)).detach(), **TIGHT)
    louder = encoder.amplify_(torch.tensor(2.5).double())
    assert louder == (kind != "tied")
    torch.testing.assert_close(encoder.of_matrix(x).detach(), before * (2.5 if louder else 1.0), **TIGHT)


@pytest.mark.parametrize(("kind", "decoder", "rank"), [KINDS[0], KINDS[3]])
def test_reset_shrinks_to_the_living_and_clears_the_bias(kind, decoder, rank):
    encoder, _ = encoder_of(kind, decoder, rank)
    alive, chosen = torch.tensor([0, 1, 2]), writes(1, n=1)
    rows = (lambda: encoder.weight.flatten(1)) if kind == "linear" else (lambda: encoder.key_factors[:, 0])
    wanted = chosen.matrices().flatten(1) if kind == "linear" else chosen.key[:, 0]
    mean_length = rows()[alive].norm(dim=-1).mean()
    encoder.reset_(torch.tensor([5]), chosen, chosen.leading(torch.arange(1)), alive, 0.2)
    torch.testing.assert_close(rows()[5], 0.2 * mean_length * wanted[0] / wanted[0].norm(), **TIGHT)
    assert encoder.bias[5] == 0 and encoder.bias[4] != 0
    encoder.reset_(torch.tensor([5]), chosen, chosen.leading(torch.arange(1)), alive[:0], 0.2)
    assert abs(rows()[5].norm().item() - 0.2) < 1e-12
