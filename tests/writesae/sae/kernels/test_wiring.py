"""Whole losses through the kernels, interpreted, against the same losses in plain torch: values and gradients."""

import pytest
import torch

from tests.writesae.sae.kernels.cases import error, random
from writesae.config import WriteSAEConfig
from writesae.sae import WriteSAE, kernels
from writesae.sae.atoms import OuterProductAtoms
from writesae.sae.samples import Factored, Matrices, Vectors

D_K, D_V, ATOMS, K = 12, 10, 8, 2
SAMPLES = {
    "writes": lambda d_v: Factored(random(3, D_K), random(3, d_v, seed=1)),
    "net writes": lambda d_v: Factored(random(3, 2, D_K), random(3, 2, d_v, seed=1)),
    "matrices": lambda d_v: Matrices(random(3, D_K, d_v)),
    "vectors": lambda d_v: Vectors(random(3, D_K)),
}
CASES = [
    ("writes", {}),
    ("writes", {"matryoshka": (3, 6), "center": True}),
    ("net writes", {"rank": 2, "center": True}),
    ("net writes", {"encoder": "tied", "activation": "batch_topk"}),
    ("vectors", {"matryoshka": (4,)}),
    ("matrices", {"rank": 2, "matryoshka": (4,)}),
    ("matrices", {"encoder": "linear", "decoder": "dense"}),
    ("writes", {"encoder": "bilinear", "decoder": "dense", "center": True}),
    ("matrices", {"activation": "gated"}),
]


@pytest.fixture
def by_kernels(monkeypatch):
    """Says yes to every question for kernels, and lets nobody gather rows."""

    def switch():
        asked = []
        monkeypatch.setattr(kernels, "use_triton", lambda *factors, widest=1024: asked.append(factors) or True)
        monkeypatch.setattr(OuterProductAtoms, "factors_at", lambda *a: pytest.fail("rows were gathered"))
        return asked

    return switch


def dictionary(d_v=D_V, **fields):
    config = {"k": K, "encoder": "bilinear", "decoder": "outer_product", "activation": "topk"} | fields
    sae = WriteSAE(WriteSAEConfig(d_k=D_K, d_v=d_v, n_atoms=ATOMS, seed=3, **config))
    for name, parameter in sae.named_parameters():  # encoder and decoder apart from each other
        parameter.data += 0.1 * random(*parameter.shape, seed=len(name))
    return sae.train()


def outcome(sae, samples, more):
    """The loss, the errors of a residual with other atoms, what is decoded, and all gradients."""
    sae.zero_grad()
    output = sae.loss(samples)
    indices = (ATOMS - 1 - torch.arange(more)).expand(len(samples), more)
    values = sae.scores_at(indices, samples, output.scores).relu()
    residual = sae.residual_errors(samples, output, type(output.codes)(indices, values))
    decoded = sae.decode(output.codes)
    (output.loss + output.penalty + 0.1 * residual.square().mean()).backward()
    gradients = [parameter.grad for parameter in sae.parameters() if parameter.grad is not None]
    return [output.errors, residual.detach(), decoded.detach(), *gradients]


@pytest.mark.parametrize(("kind", "fields"), CASES, ids=str)
def test_a_loss_is_the_same_by_kernels(kind, fields, by_kernels):
    d_v = 1 if kind == "vectors" else D_V
    samples, sae = SAMPLES[kind](d_v), dictionary(d_v, **fields)
    sae.calibrate_(samples)
    expected = outcome(sae, samples, more=3)
    asked = by_kernels()
    got = outcome(sae, samples, more=3)
    assert asked and len(got) == len(expected)
    assert all(error(one, other) < 1e-4 for one, other in zip(got, expected, strict=True))


def test_calibration_is_the_same_by_kernels(by_kernels):
    samples = SAMPLES["writes"](D_V)
    plain, kernel = dictionary(rank=2), dictionary(rank=2)
    plain.calibrate_(samples)
    by_kernels()
    kernel.calibrate_(samples)
    for one, other in zip(kernel.state_dict().values(), plain.state_dict().values(), strict=True):
        assert error(one.float(), other.float()) < 1e-4


def test_scores_found_in_a_narrower_type_are_learned_from_in_the_dictionarys_own(by_kernels):
    samples, sae = SAMPLES["writes"](D_V), dictionary()
    sae.calibrate_(samples)
    sae.scoring_dtype = torch.bfloat16
    expected = outcome(sae, samples, more=3)
    by_kernels()
    got = outcome(sae, samples, more=3)
    assert all(error(one, other) < 1e-4 for one, other in zip(got, expected, strict=True))


def test_a_dictionary_of_16_bits_keeps_its_dtype(by_kernels):
    by_kernels()
    samples, sae = SAMPLES["writes"](D_V), dictionary().bfloat16()
    output = sae.loss(samples)
    output.loss.backward()
    assert output.codes.values.dtype == sae.decode(output.codes).dtype == output.errors.dtype == torch.bfloat16
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in sae.parameters())


def test_many_terms_are_formed_as_matrices(by_kernels, monkeypatch):
    """Where Gram matrices would cost more than the matrix, kernels form that too."""
    samples, sae = SAMPLES["writes"](2), dictionary(2, k=8)
    expected = outcome(sae, samples, more=8)
    by_kernels()
    monkeypatch.setattr(kernels, "squared_norm_at", lambda *a: pytest.fail("a Gram matrix"), raising=False)
    got = outcome(sae, samples, more=8)
    assert all(error(one, other) < 1e-4 for one, other in zip(got, expected, strict=True))
