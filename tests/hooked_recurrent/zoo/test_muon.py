import pytest
import torch

from hooked_recurrent.zoo.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 24, 24)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    matrices = torch.randn(shape, dtype=torch.float64)
    result = orthogonalize(matrices)
    u, values, v = torch.linalg.svd(matrices, full_matrices=False)
    inside = u.mT @ result @ v.mT  # diagonal exactly when the singular vectors are those of the input
    diagonal = inside.diagonal(dim1=-2, dim2=-1)
    assert (inside - torch.diag_embed(diagonal)).abs().max() < 1e-10
    well_above_zero = values > 0.1 * values[:, :1]  # smaller ones need more steps than five
    assert diagonal[well_above_zero].min() > 0.6 and diagonal.max() < 1.3


def test_scale_of_the_gradient_does_not_matter():
    matrix = torch.randn(1, 16, 24, dtype=torch.float64)
    torch.testing.assert_close(orthogonalize(matrix), orthogonalize(1000 * matrix), rtol=1e-6, atol=1e-8)


def test_agrees_with_torch_up_to_its_bfloat16():
    shapes = [(16, 16), (48, 16), (16, 48), (48, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    mine = Muon(ours, lr=0.05, momentum=0.9, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.05, momentum=0.9, weight_decay=0.1, adjust_lr_fn="original")
    start = [p.detach().clone() for p in ours]
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        mine.step()
        reference.step()
    for p, q, before in zip(ours, theirs, start, strict=True):
        assert (p - q).norm() < 0.03 * (q - before).norm()


def test_a_parameter_without_gradient_stays():
    still, moved = (torch.nn.Parameter(torch.randn(16, 16)) for _ in range(2))
    before = still.detach().clone()
    moved.grad = torch.randn(16, 16)
    Muon([still, moved], weight_decay=0.1).step()
    assert torch.equal(still, before)


def test_only_matrices():
    with pytest.raises(ValueError, match=r"Muon trains matrices, got a parameter of shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
