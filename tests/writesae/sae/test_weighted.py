"""Weighted samples: the same in everything but the size of their errors."""

import pytest
import torch

from writesae import WriteSAE, WriteSAEConfig
from writesae.sae import Factored
from writesae.sae.weighted import Weighted


def sides(n=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(n, 1, generator=generator, dtype=torch.float64) ** 3
    key, value = (torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (3, 5))
    return size * key, value


def test_errors_count_by_their_weight_and_nothing_else_does(monkeypatch):
    key, value = sides()
    weight = torch.linspace(0, 3, 20, dtype=torch.float64)
    plain, weighted = Factored(key, value), Weighted(key, value, weight)
    sae = WriteSAE(WriteSAEConfig(3, 5, n_atoms=8, k=2)).double()
    sae.calibrate_(plain)
    expected, found = sae.loss(plain), sae.loss(weighted)
    torch.testing.assert_close(found.errors, expected.errors * weight)
    assert torch.equal(found.codes.values, expected.codes.values)
    assert torch.equal(weighted.squared_norms(), plain.squared_norms())
    # the way of the kernels, which take no float64
    monkeypatch.setattr(Factored, "squared_errors_at", lambda self, *given: torch.full((20, 1), 2.0).double())
    by_rows = weighted.squared_errors_at(expected.codes.values[:, None], sae.decoder.rows, expected.codes.indices)
    assert torch.equal(by_rows, 2 * weight[:, None])


def test_the_weights_travel_with_the_samples():
    weighted = Weighted(*sides(), torch.arange(20.0).double())
    rows = torch.tensor([4, 2])
    assert weighted.take(rows).weight.tolist() == [4, 2]
    moved = weighted.scaled(2.0).to(dtype=torch.float32).take(slice(3, 5))
    assert moved.weight.tolist() == [3, 4] and moved.weight.dtype == torch.float32
    torch.testing.assert_close(moved.key.double(), weighted.key[3:5], rtol=1e-6, atol=0)
    torch.testing.assert_close(moved.value.double(), 2 * weighted.value[3:5], rtol=1e-6, atol=0)
    assert torch.cat([block.weight for block in weighted.blocks(7)]).tolist() == list(range(20))


def test_relative_errors_weigh_a_write_by_its_own_size():
    relative = Weighted.relative(Factored(*sides()), floor=0.5)
    norms = relative.squared_norms()
    torch.testing.assert_close(relative.weight * (norms + 0.5 * norms.mean()), norms.mean().expand(20))
    zero = Weighted.relative(Factored(torch.zeros(2, 3), torch.zeros(2, 5)))
    assert torch.isfinite(zero.weight).all()


@pytest.mark.parametrize("form", [{}, {"encoder": "tied"}, {"encoder": "linear"}, {"decoder": "dense"}, {"rank": 2}])
def test_atoms_that_start_from_samples(form):
    key, value = sides()
    key[:5] = 0
    sae = WriteSAE(WriteSAEConfig(3, 5, n_atoms=10, k=1, start="samples", **form)).double()
    sae.calibrate_(key, value)
    torch.testing.assert_close(sae.atom_norms(), torch.ones(10, dtype=torch.float64))
    atoms = torch.stack([sae.atom(i).AB for i in range(10)]).flatten(1)
    writes = Factored(key, value).matrices()[5:].flatten(1)
    cosines = atoms @ (writes / writes.norm(dim=1, keepdim=True)).T
    best, which = cosines.max(1)
    assert best.min() > (0.95 if "rank" in form else 1 - 1e-9) and len(which.unique()) == 10
    with torch.no_grad():
        codes = sae.encode(key[5:][which], value[5:][which])
    assert (codes.indices[:, 0] == torch.arange(10)).all() or "rank" in form


def test_more_atoms_than_samples_leave_the_last_ones_random():
    key, value = sides(4)
    sae = WriteSAE(WriteSAEConfig(3, 5, n_atoms=9, k=1, start="samples")).double()
    before = sae.key_atoms[4:].detach().clone()
    sae.calibrate_(key, value)
    torch.testing.assert_close(sae.key_atoms[4:].detach(), before)
    with pytest.raises(ValueError, match="did you mean 'samples'"):
        WriteSAEConfig(3, 5, start="sample")
