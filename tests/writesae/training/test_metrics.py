"""Quality numbers against their definitions on matrices."""

import pytest
import torch

from writesae.config import WriteSAEConfig
from writesae.sae import WriteSAE
from writesae.training.metrics import measure


@pytest.mark.parametrize(("rank", "center"), [(1, False), (2, True)])
def test_quality_is_that_of_the_matrices(monkeypatch, rank, center):
    monkeypatch.setattr("writesae.training.metrics._AT_ONCE", 7)
    sae = WriteSAE(WriteSAEConfig(d_k=5, d_v=4, n_atoms=30, k=3, rank=rank, center=center)).double()
    with torch.no_grad():
        sae.key_atoms.mul_(1 + torch.rand(30, 1, 1))  # norms other than 1
    key, value = torch.randn(40, 5).double() + 0.3, 3 * torch.randn(40, 4).double() + 0.3
    sae.calibrate_(key[:20], value[:20])
    with torch.no_grad():
        sae.encoder.bias.sub_(0.4)  # some writes then excite no atom
    x = torch.einsum("bk,bv->bkv", key, value)
    codes = sae.encode(key, value)
    quality = measure(sae, key, value)
    error, variance = (x - sae.decode(codes)).square().sum(), (x - x.mean(0)).square().sum()
    assert quality.fvu == pytest.approx(float((error / variance).detach()), rel=1e-9)
    dense = codes.dense(30).detach()
    assert quality.l0 == pytest.approx(float((dense > 0).sum(1).double().mean()))
    assert quality.dead_fraction == pytest.approx(float((dense.amax(0) == 0).double().mean()))
    fires = dense.amax(1) > 0
    atoms = torch.stack([sae.atom(int(i)).AB for i in dense.argmax(1)])
    cosines = torch.nn.functional.cosine_similarity(x.flatten(1), atoms.flatten(1))
    assert quality.cosine == pytest.approx(float(cosines[fires].mean()), rel=1e-9)
    assert quality.silent_fraction == pytest.approx(float((~fires).double().mean()))
    assert 0 < quality.silent_fraction < 1 and quality.n_writes == 40


def test_a_perfect_dictionary_has_no_unexplained_variance():
    sae = WriteSAE(WriteSAEConfig(d_k=5, d_v=4, n_atoms=6, k=1)).double()
    quality = measure(sae, 2 * sae.key_atoms[:, 0].detach(), sae.value_atoms[:, 0].detach())
    assert quality.fvu < 1e-6 and quality.dead_fraction == 0 and quality.cosine == pytest.approx(1.0)


def test_no_writes_is_a_clear_error():
    with pytest.raises(ValueError, match="at least one write"):
        measure(WriteSAE(WriteSAEConfig(d_k=5, d_v=4, n_atoms=6, k=1)), torch.zeros(0, 5), torch.zeros(0, 4))
