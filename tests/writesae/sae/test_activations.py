"""Sparsifiers by their definitions: who is active, with what coefficient, what it costs, where gradients go."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from writesae.config import WriteSAEConfig
from writesae.sae.activations import ACTIVATIONS, largest


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


def choose(activation, scores, training=True):
    """Dense coefficients of one batch of scores."""
    choice = activation.select(scores, training)
    values = activation.apply(scores.gather(1, choice.indices), choice)
    assert all(len(set(row)) == len(row) for row in choice.indices.tolist())
    return torch.zeros_like(scores).scatter(1, choice.indices, values)


def activation_of(name, n_atoms=6, **fields):
    return ACTIVATIONS[name](WriteSAEConfig(4, 3, n_atoms=n_atoms, **{"k": 3, "activation": name, **fields})).double()


def test_top_k_drops_negative_scores_among_the_largest():
    scores = torch.tensor([[-5.0, 2.0, -0.5, -3.0, 1.0, -4.0]]).double()
    assert choose(activation_of("topk"), scores).tolist() == [[0.0, 2.0, 0.0, 0.0, 1.0, 0.0]]


@given(st.integers(1, 7), st.integers(1, 6), st.integers(0, 99))
def test_batch_top_k_keeps_the_largest_of_the_batch(batch, k, seed):
    scores = torch.randn(batch, 6, generator=torch.Generator().manual_seed(seed)).double()
    kept = choose(activation_of("batch_topk", k=k), scores)
    largest_of_batch = scores.flatten().sort(descending=True).values[: k * batch]
    assert torch.equal(kept[kept > 0].sort(descending=True).values, largest_of_batch[largest_of_batch > 0])
    assert torch.equal(kept[kept > 0], scores[kept > 0])


def test_batch_top_k_learns_the_threshold_of_inference():
    activation, generator = activation_of("batch_topk", n_atoms=200, k=10), torch.Generator().manual_seed(0)
    cuts = []
    for _ in range(300):
        scores = torch.randn(64, 200, generator=generator).double()
        cuts.append(float(scores.flatten().topk(640).values[-1]))
        choose(activation, scores)
    assert abs(float(activation.threshold) - sum(cuts) / len(cuts)) < 0.01
    scores, before = torch.randn(64, 200, generator=generator).double(), activation.threshold.clone()
    codes = choose(activation, scores, training=False)
    assert 8 < (codes > 0).sum(1).double().mean() < 12 and activation.threshold == before
    alone = torch.cat([choose(activation, row[None], training=False) for row in scores])
    assert torch.equal(codes, alone)  # a code does not depend on the rest of its batch


def test_batch_top_k_without_a_positive_score_is_silent():
    activation = activation_of("batch_topk")
    assert choose(activation, -torch.ones(2, 6).double()).sum() == 0 and activation.threshold == 0


def test_jump_relu_and_its_straight_through_gradients():
    activation = activation_of("jumprelu", init_threshold=0.5, bandwidth=0.2, sparsity=2.0)
    scores = torch.tensor([[0.9, 0.55, 0.45, 0.3, -1.0, 0.61]], dtype=torch.float64, requires_grad=True)
    choice = activation.select(scores.detach(), True)
    assert set(choice.indices[0].tolist()) == {0, 1, 2, 5}  # above, or inside a window of 0.1 on either side
    values = activation.apply(scores.gather(1, choice.indices), choice)
    dense = torch.zeros(1, 6).double().scatter(1, choice.indices, values)
    torch.testing.assert_close(dense[0], torch.tensor([0.9, 0.55, 0.0, 0.0, 0.0, 0.61], dtype=torch.float64))
    weights = torch.arange(1.0, 7.0).double()
    (dense * weights).sum().backward()
    assert scores.grad[0].tolist() == [1.0, 2.0, 0.0, 0.0, 0.0, 6.0]
    theta, h = 0.5, 0.2  # d a / d theta = -theta / h in the window, and d theta / d log theta = theta
    expected = -theta / h * torch.tensor([0.0, 2.0, 3.0, 0.0, 0.0, 0.0]).double() * theta
    torch.testing.assert_close(activation.log_threshold.grad, expected)
    activation.log_threshold.grad = None
    penalty = activation.penalty(scores.gather(1, choice.indices), choice)
    assert float(penalty) == 2.0 * 3
    penalty.backward()
    window = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 0.0]).double()
    torch.testing.assert_close(activation.log_threshold.grad, -2.0 / h * window * theta)
    assert choose(activation, scores.detach(), training=False)[0].tolist() == [0.9, 0.55, 0.0, 0.0, 0.0, 0.61]


def test_the_gate_decides_and_the_magnitude_measures():
    activation = activation_of("gated", sparsity=0.5)
    with torch.no_grad():
        activation.gate_bias.copy_(torch.tensor([-1.0, 0, 0, 0, 0, 2]))
        activation.magnitude_bias.copy_(torch.tensor([0.0, 1, 0, -9, 0, 0]))
        activation.log_magnitude.copy_(torch.full((6,), 0.5))
    scores = torch.tensor([[0.5, 1.0, 2.0, 3.0, -1.0, -1.5]]).double()
    slope = math.exp(0.5)
    expected = [0.0, slope + 1, 2 * slope, 0.0, 0.0, 0.0]
    torch.testing.assert_close(choose(activation, scores)[0], torch.tensor(expected).double())
    choice = activation.select(scores, True)
    assert set(choice.indices[0][choice.keep[0]].tolist()) == {1, 2, 3, 5}
    chosen = scores.gather(1, choice.indices)
    gates = torch.zeros_like(scores).scatter(1, choice.indices, activation.gates(chosen, choice))
    assert gates[0].tolist() == [0.0, 1.0, 2.0, 3.0, 0.0, 0.5]
    assert float(activation.penalty(chosen, choice)) == 0.5 * 6.5


def test_the_soft_gate_is_a_sigmoid_and_silences_nobody():
    activation = activation_of("soft_gated")
    with torch.no_grad():
        activation.gate_bias.fill_(0.05)
        activation.magnitude_bias.fill_(0.2)
    scores = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).double()
    expected = ((scores + 0.05) / 0.1).sigmoid() * (scores + 0.2).relu()
    torch.testing.assert_close(choose(activation, scores), expected)


@pytest.mark.parametrize("name", ["jumprelu", "gated", "soft_gated"])
def test_reset_gives_moved_atoms_fresh_parameters(name):
    activation = activation_of(name)
    with torch.no_grad():
        for parameter in activation.parameters():
            parameter.normal_()
    before = {key: parameter.detach().clone() for key, parameter in activation.named_parameters()}
    activation.reset_(torch.tensor([4]), torch.tensor([0, 1]))
    for key, parameter in activation.named_parameters():
        wanted = before[key][:2].mean() if name == "jumprelu" else 0.0
        assert float(parameter[4]) == pytest.approx(float(wanted)) and torch.equal(parameter[:4], before[key][:4])
