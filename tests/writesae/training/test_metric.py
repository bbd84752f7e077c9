"""The output metric: its gradients against the curvature of the KL itself, and the way back to raw space, exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_recurrent import WriteEdit
from tests.hooked_recurrent.models import ALL_LINEAR, over_stacks, tiny_model, tokens_of
from writesae import WriteSAE, WriteSAEConfig
from writesae.sae import Factored
from writesae.training.metric import OutputMetric, output_gradients

LAYER, HEAD, T = 0, 2, 3


def factors(n=40, d_k=3, d_v=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sides = (torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (d_k, d_v))
    return Factored(*sides)


def some_metric(seed=3):
    gradients = torch.randn(60, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return OutputMetric.of_gradients(gradients * torch.tensor([3.0, 1.0, 0.2])[:, None].double())


@over_stacks
def test_the_gradients_are_a_sketch_of_the_fisher_information(layer_types):
    """E <Lambda, E>^2 over drawn labels is twice the KL of adding eps E, summed over positions, over eps^2."""
    model = tiny_model(layer_types, n_heads=4)
    text = tokens_of(model, batch=1, length=6)
    key, value = factors(1, seed=5).key[0, 0], factors(1, seed=5).value[0, 0]
    eps = 1e-5
    plain = model(text).log_softmax(-1)
    edit = WriteEdit(LAYER, HEAD, T, "add", eps * key, value)
    kl = (plain.exp() * (plain - model(text, edits=[edit]).log_softmax(-1))).sum()
    generator = torch.Generator().manual_seed(0)
    gradients = output_gradients(model, text.expand(1000, -1), LAYER, HEAD, generator)
    effects = torch.einsum("nkv,k,v->n", gradients[:, T], key, value)
    assert effects.square().mean().item() == pytest.approx(2 * kl.item() / eps**2, rel=0.15)
    assert abs(effects.mean()) < 4 * effects.std() / 1000**0.5  # a score has mean zero


def test_the_roots_are_those_of_both_sides():
    gradients = torch.randn(50, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    metric = OutputMetric.of_gradients(gradients, damping=0.1)
    by_key = sum(one @ one.T for one in gradients)
    by_value = sum(one.T @ one for one in gradients)
    for root, inverse, matrix in (
        (metric.key_root, metric.key_inverse, by_key),
        (metric.value_root, metric.value_inverse, by_value),
    ):
        unit = torch.eye(len(matrix), dtype=torch.float64)
        torch.testing.assert_close(root @ root, matrix / matrix.diagonal().mean() + 0.1 * unit)
        torch.testing.assert_close(root @ inverse, unit)


def test_the_error_of_transformed_samples_is_that_of_the_metric():
    metric, samples = some_metric(), factors()
    seen = metric.transform(samples).matrices()
    torch.testing.assert_close(seen, metric.key_root @ samples.matrices() @ metric.value_root)


@settings(max_examples=12, deadline=None)
@given(
    encoder=st.sampled_from(["bilinear", "tied", "linear"]),
    decoder=st.sampled_from(["outer_product", "dense"]),
    center=st.booleans(),
    rank=st.integers(1, 2),
    activation=st.sampled_from(["topk", "jumprelu", "soft_gated"]),
    seed=st.integers(0, 5),
)
def test_a_restored_dictionary_has_the_same_codes_and_rebuilds_the_raw_samples(
    encoder, decoder, center, rank, activation, seed
):
    if encoder == "tied" and decoder == "dense":
        return
    shape = {"d_k": 3, "d_v": 5, "n_atoms": 12, "k": 4, "seed": seed, "center": center, "rank": rank}
    config = WriteSAEConfig(encoder=encoder, decoder=decoder, activation=activation, **shape)
    metric, samples = some_metric(seed), factors(seed=seed)
    sae = WriteSAE(config).double().eval()
    sae.calibrate_(metric.transform(samples))
    with torch.no_grad():
        for parameter in sae.encoder.parameters():
            parameter.add_(0.1)
        restored = metric.restore(sae)
        codes, expected = restored.encode_samples(samples), sae.encode_samples(metric.transform(samples))
        assert torch.equal(codes.indices, expected.indices)
        torch.testing.assert_close(codes.values, expected.values)
        rebuilt = metric.key_root @ restored.decode(codes) @ metric.value_root
        torch.testing.assert_close(rebuilt, sae.decode(expected))
    assert not restored.training
    assert (restored.atom_norms() - 1).abs().max() > 1e-3  # one unit of the metric, not of the raw space


def test_restoring_leaves_the_dictionary_itself_alone():
    sae = WriteSAE(WriteSAEConfig(3, 5, n_atoms=6, k=2)).double()
    sae.provenance["layer"] = 4
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    restored = some_metric().restore(sae)
    assert all(torch.equal(before[name], tensor) for name, tensor in sae.state_dict().items())
    assert restored.provenance == sae.provenance and restored.provenance is not sae.provenance


def test_the_metric_is_measured_from_the_seed_and_gathers_the_gradients():
    model = tiny_model(ALL_LINEAR)
    tokens = tokens_of(model, batch=5, length=9)
    measured = OutputMetric.measure(model, tokens, LAYER, HEAD, seed=4, batch=2)
    generator = torch.Generator().manual_seed(4)
    gradients = [output_gradients(model, rows, LAYER, HEAD, generator) for rows in tokens.split(2)]
    torch.testing.assert_close(measured.key_root, OutputMetric.of_gradients(torch.cat(gradients)).key_root)
    other = OutputMetric.measure(model, tokens, LAYER, HEAD, seed=5, batch=2)
    assert not torch.allclose(measured.key_root, other.key_root)


def test_what_is_no_metric_is_refused():
    with pytest.raises(ValueError, match="every gradient is zero"):
        OutputMetric.of_gradients(torch.zeros(4, 3, 5))
    with pytest.raises(ValueError, match="damping must be greater than 0, got 0"):
        OutputMetric.of_gradients(torch.ones(4, 3, 5), damping=0.0)
