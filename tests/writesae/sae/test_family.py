"""Every variant against its formulas written out densely: loss, penalty, codes and gradients, on every kind of samples."""

import itertools

import pytest
import torch

from writesae.config import PRESETS, WriteSAEConfig
from writesae.sae import Factored, Matrices, Vectors, WriteSAE
from writesae.sae.activations import GATE_TEMPERATURE

D_K, D_V, N, K = 6, 5, 16, 3
PAIRS = [("bilinear", "outer_product"), ("tied", "outer_product"), ("linear", "outer_product")]
PAIRS += [("bilinear", "dense"), ("linear", "dense")]
SPARSIFIERS = ["topk", "batch_topk", "jumprelu", "gated", "soft_gated"]
FORMS = [(False, (), 1), (True, (4, 9), 2)]
VARIANTS = [(*pair, act, *form) for pair, act, form in itertools.product(PAIRS, SPARSIFIERS, FORMS)]


def sae_of(encoder, decoder, activation, center, matryoshka, rank, seed=0):
    torch.manual_seed(seed)
    fields = {"bandwidth": 0.1, "init_threshold": 0.02, "sparsity": 0.7}
    config = WriteSAEConfig(D_K, D_V, N, K, rank, center, encoder, decoder, activation, matryoshka, **fields)
    sae = WriteSAE(config).double()
    with torch.no_grad():  # away from the initial point, where encoder = decoder and all norms are 1
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    sae.calibrate_(samples(200, seed + 1))
    return sae.train()


def samples(n=11, seed=0, terms=2):
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(n, terms, D_K, generator=generator).double()
    return Factored(key, 3 * torch.randn(n, terms, D_V, generator=generator).double() + 0.5)


def products(factors):
    return torch.einsum("nrk,nrv->nkv", *factors)


def by_formulas(sae, x):
    """Loss and penalty of matrices x, all atoms taking part: the definition, in scaled units."""
    config, activation, x = sae.config, sae.activation, x * sae.input_scale
    atoms = sae.decoder.atoms if config.decoder == "dense" else products((sae.key_atoms, sae.value_atoms))
    if config.encoder == "linear":
        listening = sae.encoder.weight
    elif config.encoder == "tied":
        listening = atoms
    else:
        listening = products((sae.encoder.key_factors, sae.encoder.value_factors))
    z = torch.einsum("bkv,nkv->bn", x, listening)
    z = z if sae.encoder.bias is None else z + sae.encoder.bias
    mean = 0.0 if sae.mean is None else sae.mean * sae.input_scale

    def error(codes, atoms):
        return (x - mean - torch.einsum("bn,nkv->bkv", codes, atoms)).square().sum((1, 2))

    penalty = torch.zeros(()).double()
    if config.activation == "topk":
        codes = z.relu() * torch.zeros_like(z).scatter(1, z.topk(K).indices, 1.0)
    elif config.activation == "batch_topk":
        codes = z.relu() * (z >= z.flatten().topk(K * len(z)).values[-1])
    elif config.activation == "jumprelu":
        theta, h = activation.log_threshold.exp(), activation.bandwidth
        window = ((z - theta).abs() <= h / 2).detach() / h
        jump = (z > theta).double()
        # Straight through: values of the jump, gradients of the window.
        codes = z * jump + window * theta.detach() * (theta.detach() - theta)
        penalty = config.sparsity * (jump + window * (theta.detach() - theta)).sum(1).mean()
    else:
        magnitude = (activation.log_magnitude.exp() * z + activation.magnitude_bias).relu()
        gate = z + activation.gate_bias
        if config.activation == "gated":
            codes, gate = magnitude * (gate > 0), gate.relu()
        else:
            gate = (gate / GATE_TEMPERATURE).sigmoid()
            codes = gate * magnitude
        penalty = config.sparsity * gate.sum(1).mean()
        levels = [gate * (torch.arange(N) < size) for size in (*config.matryoshka, N)]
        penalty = penalty + torch.stack([error(level, atoms.detach()) for level in levels]).mean()
    levels = [error(codes * (torch.arange(N) < size), atoms) for size in (*config.matryoshka, N)]
    return torch.stack(levels).mean(), penalty, codes / sae.input_scale


@pytest.mark.parametrize(("encoder", "decoder", "activation", "center", "matryoshka", "rank"), VARIANTS)
def test_loss_codes_and_gradients_are_those_of_the_formulas(encoder, decoder, activation, center, matryoshka, rank):
    sae = sae_of(encoder, decoder, activation, center, matryoshka, rank)
    factored, names = samples(), [name for name, _ in sae.named_parameters()]
    parameters = list(sae.parameters())
    loss, penalty, codes = by_formulas(sae, factored.matrices())
    expected = torch.autograd.grad(loss + penalty, parameters, allow_unused=True)
    for given in (factored, Matrices(factored.matrices())):
        output = sae.loss(given)
        torch.testing.assert_close(output.loss, loss, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(output.penalty, penalty, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(output.codes.dense(N), codes.detach(), rtol=1e-10, atol=1e-10)
        found = torch.autograd.grad(output.loss + output.penalty, parameters, allow_unused=True)
        for name, ours, reference in zip(names, found, expected, strict=True):
            reference = torch.zeros_like(ours) if reference is None else reference
            torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9, msg=name)
            assert name == "encoder.bias" or ours.abs().sum() > 0


@pytest.mark.parametrize("activation", SPARSIFIERS)
@pytest.mark.parametrize(("encoder", "decoder"), PAIRS)
def test_codes_rebuild_by_their_atoms_and_do_not_depend_on_the_batch(encoder, decoder, activation):
    sae = sae_of(encoder, decoder, activation, True, (), 1)
    for seed in range(5):
        sae.loss(samples(seed=seed))  # batch_topk learns its threshold
    sae.eval()
    given = samples(7, seed=9)
    codes = sae.encode_samples(given)
    by_hand = torch.einsum("bn,nkv->bkv", codes.dense(N), sae.decoder.matrices()) + sae.mean
    torch.testing.assert_close(sae.decode(codes), by_hand, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sae(given.matrices()), by_hand, rtol=1e-10, atol=1e-10)
    alone = torch.cat([sae.encode_samples(given.take(torch.tensor([i]))).dense(N) for i in range(7)])
    torch.testing.assert_close(alone, codes.dense(N), rtol=1e-10, atol=1e-10)
    errors = ((given.matrices() - by_hand) * sae.input_scale).square().sum((1, 2))
    torch.testing.assert_close(sae.loss(given).errors, errors, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_parameters_that_the_paper_counts(name):
    sae = WriteSAE(WriteSAEConfig.preset(name, D_K, D_V, n_atoms=N, k=K))
    d_in, factors = D_K * D_V, N * (D_K + D_V)
    expected = {
        "flat": 2 * N * d_in + N,
        "rank1": N * d_in + factors + N,
        "bilinear": 2 * factors + N,
        "bilinear_tied": factors + N,
        "bilinear_flat": factors + N * d_in + N,
        "bilinear_gated": 2 * factors + 3 * N,
        "bilinear_jumprelu": 2 * factors + 2 * N,
    }  # and a decoder bias each, which is our mean: a buffer, and optional
    assert sum(parameter.numel() for parameter in sae.parameters()) == expected[name]


def test_a_flat_dictionary_of_vectors_is_an_ordinary_sparse_autoencoder():
    sae = WriteSAE(WriteSAEConfig.preset("flat", 8, 1, n_atoms=N, k=K)).double()
    x = torch.randn(20, 8).double()
    sae.calibrate_(Vectors(x))
    w_enc, w_dec = sae.encoder.weight[:, :, 0].T, sae.decoder.atoms[:, :, 0]
    scores = x @ w_enc
    codes = scores.relu() * torch.zeros_like(scores).scatter(1, scores.topk(K).indices, 1.0)
    errors = (x - codes @ w_dec).square().sum(1) * sae.input_scale**2
    torch.testing.assert_close(sae.loss(Vectors(x)).errors, errors.detach(), rtol=1e-9, atol=1e-9)


def test_only_active_atoms_get_gradients_from_sparse_variants():
    for activation in ("topk", "batch_topk"):
        sae = sae_of("bilinear", "outer_product", activation, False, (), 1)
        output = sae.loss(samples(2))
        output.loss.backward()
        active = set(output.codes.indices[output.codes.active].tolist())
        touched = sae.key_atoms.grad.abs().sum((1, 2)).nonzero().flatten().tolist()
        assert set(touched) == active and len(active) < N


def test_narrow_scoring_chooses_by_it_and_learns_exactly():
    sae = sae_of("bilinear", "outer_product", "topk", False, (), 1).float()
    given = samples().to(dtype=torch.float32)
    exact = sae.loss(given)
    sae.scoring_dtype = torch.bfloat16
    narrow = sae.loss(given)
    assert not torch.equal(narrow.scores.scores, exact.scores.scores)
    same = (narrow.codes.indices.sort(1).values == exact.codes.indices.sort(1).values).all(1)
    assert same.sum() >= 8
    torch.testing.assert_close(narrow.errors[same], exact.errors[same], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"encoder": "tied", "decoder": "dense"}, "'dense' has none"),
        ({"matryoshka": (4, 4)}, "rising sizes"),
        ({"matryoshka": (4, 17)}, r"1..16"),
        ({"matryoshka": (0,)}, "rising sizes"),
        ({"bandwidth": 0.0}, "bandwidth must be greater"),
        ({"sparsity": -1.0}, "sparsity must be at least 0"),
    ],
)
def test_variants_that_cannot_be_are_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        WriteSAEConfig(D_K, D_V, n_atoms=N, k=K, **fields)


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'bilinear_tied'"):
        WriteSAEConfig.preset("bilinear_tide", D_K, D_V)


def test_dense_atoms_have_no_factors_and_say_so():
    sae = WriteSAE(WriteSAEConfig.preset("flat", D_K, D_V, n_atoms=N, k=K))
    with pytest.raises(ValueError, match="dense matrices and have no factors"):
        sae.key_atoms  # noqa: B018
    assert torch.linalg.matrix_norm(sae.atom(3).AB - sae.decoder.atoms[3]) < 1e-5
