"""What other dictionaries would put in a write's place, against the matrices written out, and paired comparisons by hand."""

import numpy as np
import pytest
import torch

import writesae.evaluation.comparing.stand_ins as stand_ins
from tests.writesae.evaluation.cells_for_tests import HEAD, LAYER, cell
from writesae import WriteSAE, WriteSAEConfig
from writesae.evaluation.comparing.head_to_head import against
from writesae.evaluation.firings import Firing, encode_cell
from writesae.evaluation.statistics import interval

HERE = Firing(1, 7, 0, 1.0, 0, 1.0)


def matrix(low):
    return low.key.T @ low.value


def setting(**sae):
    model, dictionary, tokens = cell(**sae)
    return dictionary, encode_cell(model, dictionary, tokens, LAYER, HEAD), tokens


def flat_setting():
    model, _, tokens = cell()
    torch.manual_seed(2)
    dictionary = WriteSAE(WriteSAEConfig.preset("flat", 3, 5, n_atoms=12, k=4)).double()
    return dictionary, encode_cell(model, dictionary, tokens, LAYER, HEAD), tokens


def test_leading_is_the_nearest_outer_product():
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64)
    found = stand_ins.leading(x)
    u, s, vh = torch.linalg.svd(x)
    assert found.key.shape == (1, 3) and torch.allclose(matrix(found), s[0] * torch.outer(u[:, 0], vh[0]))
    assert stand_ins.leading(x.float()).key.dtype == torch.float32


@pytest.mark.parametrize("make", [lambda: setting(), lambda: setting(rank=2), flat_setting])
def test_strongest_and_reconstructed(make):
    sae, writes, _ = make()
    codes = writes.codes
    top = sae.atom(int(codes.indices[1, 7, 0])).AB * codes.values[1, 7, 0]
    assert codes.values[1, 7, 0] == codes.values[1, 7].max() > 0
    whole, cut = (stand_ins.strongest(sae, writes, whole=flag)(HERE) for flag in (True, False))
    assert torch.allclose(matrix(whole), top)
    assert len(cut.key) == 1 and torch.allclose(matrix(cut), matrix(stand_ins.leading(top)))
    x = sum(codes.values[1, 7, m] * sae.atom(int(codes.indices[1, 7, m])).AB for m in range(4))
    rebuilt = stand_ins.reconstructed(sae, writes)
    assert torch.allclose(matrix(rebuilt(HERE)), matrix(stand_ins.leading(x)))
    scaled = stand_ins.native_norm(rebuilt, writes)(HERE)
    assert scaled.norm() == pytest.approx(float(writes.norms[1, 7])) and scaled.cosine(rebuilt(HERE)) == pytest.approx(
        1
    )


def test_all_components_give_back_the_write_and_few_do_not():
    _, writes, _ = setting()
    sides = [side.flatten(0, 1) for side in (writes.key, writes.value)]
    native = torch.outer(writes.key[1, 7], writes.value[1, 7])
    whole = stand_ins.components(stand_ins.principal_components(*sides, 99, 0), writes)(HERE)
    few = stand_ins.components(stand_ins.principal_components(*sides, 2, 0), writes)(HERE)
    assert torch.allclose(matrix(whole), native) and len(few.key) == 1
    assert float((matrix(few) - native).norm()) > 1e-3


def test_the_one_outer_product_is_the_best_and_is_projected():
    _, writes, _ = setting()
    key, value = (side.flatten(0, 1) for side in (writes.key, writes.value))
    best = stand_ins.best_outer_product(key, value)

    def explained(u, w):
        return float(((key @ u) * (value @ w)).square().sum())

    mine = explained(best.key[0], best.value[0])
    assert best.norm() == pytest.approx(1)
    torch.manual_seed(3)
    for size in (1.0, 0.1, 0.01):
        for _ in range(50):
            u, w = (side[0] + size * torch.randn_like(side[0]) for side in (best.key, best.value))
            assert explained(u / u.norm(), w / w.norm()) <= mine * (1 + 1e-12)
    native = torch.outer(writes.key[1, 7], writes.value[1, 7])
    placed = matrix(stand_ins.one_for_all(best, writes)(HERE))
    assert torch.allclose(placed, matrix(best) * (native * matrix(best)).sum())


def test_by_token_is_the_mean_write_of_the_token_elsewhere():
    torch.manual_seed(4)
    key, value = torch.randn(6, 3), torch.randn(6, 5)
    at = torch.tensor([4, 2, 4, 9, 4, 2])
    tokens = torch.tensor([[2, 4, 7]])
    stand_in = stand_ins.by_token(key, value, at, tokens)
    mean = torch.stack([torch.outer(key[n], value[n]) for n in (0, 2, 4)]).mean(0)
    assert torch.allclose(matrix(stand_in(Firing(0, 1, 0, 1.0, 0, 1.0))), matrix(stand_ins.leading(mean)), atol=1e-6)
    assert stand_in(Firing(0, 2, 0, 1.0, 0, 1.0)).norm() == 0


def test_paired_numbers_by_hand():
    kl = np.array([1.0, 4.0, 1e-20, 3.0])
    reference = np.array([2.0, 1.0, 1e-3, 6.0])
    delete = np.array([3.0, 3.0, 3.0, 3.0])
    passages = np.array([0, 0, 1, 1])
    found = against(kl, reference, delete, passages, 1e-6, 200)
    # wins: kl 1 0 1 0 (a tie loses), reference 1 1 1 0
    assert found["difference"] == pytest.approx(-0.25) and found["difference_by_passage"] == [-0.5, 0.0]
    ratios = np.log([0.5, 4, 1e-6 / 1e-3, 0.5])
    assert found["log_ratio"] == pytest.approx(np.median(ratios)) and found["closer"] == 0.75
    above = sum(np.sign(a - b) for a in kl for b in reference) / 16
    assert found["cliffs_delta"] == pytest.approx(above)
    below = against(np.full(2, 1e-20), np.full(2, 1e-3), delete[:2], passages[::2], 1e-6, 10)
    assert below["log_ratio"] == pytest.approx(np.log(1e-3))  # what is below the floor counts as the floor
    assert np.isnan(interval(kl, np.zeros(4), "mean", 10)).all()
