"""Sparse codes and their dense form."""

import torch

from writesae.sae.codes import Codes


def test_dense_puts_every_coefficient_in_its_place():
    codes = Codes(torch.tensor([[[3, 0]], [[1, 2]]]), torch.tensor([[[2.0, 1.0]], [[5.0, 0.0]]]))
    expected = torch.tensor([[[1.0, 0.0, 0.0, 2.0]], [[0.0, 5.0, 0.0, 0.0]]])
    assert torch.equal(codes.dense(4), expected)


def test_an_entry_of_zero_is_not_active():
    codes = Codes(torch.tensor([[1, 2]]), torch.tensor([[5.0, 0.0]]))
    assert codes.active.tolist() == [[True, False]]
    assert codes.l0.tolist() == [1]


def test_dense_carries_gradients_to_the_coefficients():
    values = torch.tensor([[1.0, 2.0]], requires_grad=True)
    (Codes(torch.tensor([[2, 0]]), values).dense(3) * torch.tensor([10.0, 20.0, 30.0])).sum().backward()
    assert values.grad.tolist() == [[30.0, 10.0]]
    assert not Codes(torch.tensor([[2, 0]]), values).detach().values.requires_grad


def test_blocks_of_different_lengths_join_without_losing_a_coefficient():
    short = Codes(torch.tensor([[0]]), torch.tensor([[5.0]]))
    long = Codes(torch.tensor([[1, 2, 3]]), torch.tensor([[1.0, 3.0, 2.0]]))
    joined = Codes.concatenate([short, long])
    assert joined.dense(4).tolist() == [[5.0, 0.0, 0.0, 0.0], [0.0, 1.0, 3.0, 2.0]]
    assert (joined.values.diff(dim=1) <= 0).all() and joined.l0.tolist() == [1, 3]


def test_codes_change_units_and_leading_axes():
    codes, scale = Codes(torch.tensor([[1, 2], [0, 3]]), torch.tensor([[4.0, 2.0], [6.0, 0.0]])), torch.tensor(2.0)
    assert codes.over(scale).values.tolist() == [[2.0, 1.0], [3.0, 0.0]]
    assert torch.equal(codes.over(scale).times(scale).values, codes.values)
    assert codes.reshape(torch.Size([2, 1])).indices.tolist() == [[[1, 2]], [[0, 3]]]
