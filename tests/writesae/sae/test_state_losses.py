"""Dictionaries of states: loss, codes and every gradient by running sums against the states formed as matrices."""

import pytest
import torch

from tests.writesae.sae.states_for_tests import Largest, random, record_of, sequences_of, states_by_hand
from writesae import WriteSAE, WriteSAEConfig
from writesae.sae.samples import Matrices

EXACT = {"rtol": 1e-10, "atol": 1e-10}
KINDS = {
    "bilinear": {},
    "tied": {"encoder": "tied"},
    "rank 2": {"rank": 2},
    "tied, rank 2": {"encoder": "tied", "rank": 2},
    "linear": {"encoder": "linear"},
    "dense": {"decoder": "dense", "encoder": "linear"},
    "matryoshka": {"matryoshka": (5, 9)},
}
ACTIVATIONS = ("topk", "batch_topk", "jumprelu", "gated", "soft_gated")


def dictionary(samples, **fields):
    """A calibrated dictionary in float64 whose parameters all have moved away from their start."""
    sae = WriteSAE(WriteSAEConfig(samples.d_k, samples.d_v, **{"n_atoms": 24, "k": 4, **fields})).double()
    sae.calibrate_(samples)
    with torch.no_grad():
        for number, parameter in enumerate(sae.parameters()):
            parameter.add_(0.05 * random(*parameter.shape, seed=100 + number))
    return sae.train()


def results(sae, samples):
    """Loss and all gradients."""
    sae.zero_grad()
    output = sae.loss(samples)
    (output.loss + output.penalty).backward()
    grads = {name: parameter.grad.clone() for name, parameter in sae.named_parameters() if parameter.grad is not None}
    return output, grads


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_codes_and_gradients(kind, activation, center):
    record = record_of(2, 23, terms=2 if kind == "rank 2" else None, d_k=4, d_v=6)
    samples = sequences_of(record, skip=1)
    dense = Matrices(states_by_hand(record)[:, 1:].flatten(0, 1))
    sae = dictionary(samples, activation=activation, center=center, **KINDS[kind])
    (ours, grads), (theirs, expected) = results(sae, samples), results(sae, dense)
    for name in ("loss", "penalty", "fvu", "l0", "errors"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), **EXACT)
    assert torch.equal(ours.codes.indices, theirs.codes.indices)
    torch.testing.assert_close(ours.codes.values, theirs.codes.values, **EXACT)
    assert grads.keys() == expected.keys() and grads
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")
    sae.eval()
    ours, theirs = sae.encode_samples(samples), sae.encode_samples(dense)
    torch.testing.assert_close((ours.indices, ours.values), (theirs.indices, theirs.values), **EXACT)


@pytest.mark.parametrize("encoder", ["bilinear", "tied"])
def test_a_training_step_forms_no_state(encoder):
    """Forward and backward of the whole loss: nothing comes near [pos, d_k, d_v]."""
    record = record_of(1, 256, d_k=48, d_v=48)
    samples = sequences_of(record)
    sae = dictionary(samples, encoder=encoder, n_atoms=64, k=4, center=True)
    with Largest() as made:
        sae.calibrate_(samples)
        results(sae, samples)
    assert made.numel < 256 * 48 * 48 / 8


def test_calibration_is_that_of_the_states():
    record = record_of(2, 23, d_k=4, d_v=6)
    samples, dense = sequences_of(record), Matrices(states_by_hand(record).flatten(0, 1))
    made = [dictionary(of, center=True).state_dict() for of in (samples, dense)]
    for name, tensor in made[0].items():
        torch.testing.assert_close(tensor, made[1][name], **EXACT)
