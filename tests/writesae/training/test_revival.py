"""Reviving dead atoms: counters, the auxiliary loss against its dense definition, resampling."""

import pytest
import torch

from writesae.config import WriteSAEConfig
from writesae.sae import Codes, Factored, WriteSAE
from writesae.training.revival import RESAMPLED_ENCODER_LENGTH, auxiliary_loss, count_step, dead_atoms, resample


def sae_of(rank=1, center=False):
    sae = WriteSAE(WriteSAEConfig(d_k=8, d_v=6, n_atoms=20, k=3, rank=rank, center=center)).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    sae.calibrate_(*writes(100, seed=1))
    return sae


def writes(n=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(n, 8, dtype=torch.float64, generator=generator)
    return key, 4 * torch.randn(n, 6, dtype=torch.float64, generator=generator) + 1


def some_dead(n=7):
    dead = torch.zeros(20, dtype=torch.bool)
    dead[-n:] = True
    return dead


def test_counters_rise_and_fall():
    sae = sae_of()
    for _ in range(3):
        count_step(sae, Codes(torch.tensor([[0, 1], [1, 2]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]])))
    assert sae.steps_since_active.tolist() == [0, 0, *[3] * 18]  # atom 2 was chosen, but its coefficient is zero
    count_step(sae, Codes(torch.tensor([[5, 4]]), torch.tensor([[0.0, 3.0]])))
    assert sae.steps_since_active[:6].tolist() == [1, 1, 4, 4, 0, 4]
    assert dead_atoms(sae, 4).sum() == 17 and not dead_atoms(sae, 4)[[0, 1, 4]].any()


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("center", [False, True])
def test_auxiliary_loss_is_the_error_of_rebuilding_the_residual(rank, center):
    sae, (key, value), dead = sae_of(rank, center), writes(), some_dead()
    aux = auxiliary_loss(sae, Factored(key, value), sae.loss(key, value), dead, k=4)
    aux.backward()
    factored = {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}
    sae.zero_grad()

    x = torch.einsum("bk,bv->bkv", key, value)
    residual = (x - sae(x)).detach()
    scores = torch.einsum("nrk,bkv,nrv->bn", sae.encoder.key_factors, x, sae.encoder.value_factors)
    scores = (scores + sae.encoder.bias / sae.input_scale).masked_fill(~dead, -torch.inf)
    values, indices = scores.topk(4)
    rebuilt = sae.decoder.decode(indices, values.relu())
    reference = ((residual - rebuilt) * sae.input_scale).square().sum((1, 2)).mean()
    reference.backward()
    torch.testing.assert_close(aux, reference, rtol=1e-10, atol=1e-10)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(factored[name], parameter.grad, rtol=1e-10, atol=1e-10, msg=name)
        assert parameter.grad[dead].abs().sum() > 0 and parameter.grad[~dead].abs().sum() == 0


@pytest.mark.parametrize(("n_dead", "k"), [(0, 5), (5, 0)])
def test_auxiliary_loss_is_zero_without_atoms_to_revive(n_dead, k):
    sae, (key, value) = sae_of(), writes()
    dead = torch.arange(20) < n_dead
    assert auxiliary_loss(sae, Factored(key, value), sae.loss(key, value), dead, k) == 0


def test_auxiliary_loss_takes_fewer_atoms_than_k():
    sae, (key, value) = sae_of(), writes()
    output = sae.loss(key, value)
    two, many = (auxiliary_loss(sae, Factored(key, value), output, some_dead(2), k) for k in (2, 50))
    torch.testing.assert_close(two, many)


def trained_once(sae):
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    sae.dense_loss(torch.einsum("bk,bv->bkv", *writes(200))).loss.backward()
    optimizer.step()
    for state in optimizer.state.values():
        state["exp_avg"].fill_(1.0)
        state["exp_avg_sq"].fill_(1.0)
    return optimizer


@pytest.mark.parametrize("rank", [1, 2])
def test_resampled_atoms_lie_on_badly_rebuilt_writes(rank):
    sae, (key, value) = sae_of(rank), writes()
    optimizer, dead = trained_once(sae), some_dead(2)
    sae.steps_since_active.fill_(500)
    errors = torch.tensor([0.0, 0, 3, 0, 0, 0, 1, 0, 0], dtype=torch.float64)
    before = [parameter.detach().clone() for parameter in sae.parameters()]
    moved = resample(sae, optimizer, Factored(key, value), errors, dead, torch.Generator().manual_seed(0))
    assert moved == 2
    x = torch.einsum("bk,bv->bkv", key, value)[[2, 6]].flatten(1)
    atoms = torch.stack([sae.atom(i).AB for i in (18, 19)]).flatten(1)
    cosines = torch.nn.functional.cosine_similarity(x[:, None], atoms[None], dim=-1)
    assert (cosines.amax(0) > 1 - 1e-3).all() and (cosines.amax(1) > 1 - 1e-3).all()
    length = RESAMPLED_ENCODER_LENGTH * sae.encoder.key_factors[:18].norm(dim=-1).mean()
    torch.testing.assert_close(sae.encoder.key_factors[18, 0].norm(), length)
    assert (sae.encoder.bias[18:] == 0).all() and sae.steps_since_active.tolist() == [*[500] * 18, 0, 0]
    for parameter, old in zip(sae.parameters(), before, strict=True):
        assert torch.equal(parameter[:18], old[:18])
        for moment in ("exp_avg", "exp_avg_sq"):
            assert (optimizer.state[parameter][moment][18:] == 0).all()
            assert (optimizer.state[parameter][moment][:18] == 1).all()


def test_no_more_atoms_move_than_there_are_writes_with_an_error():
    sae, (key, value) = sae_of(), writes()
    optimizer = trained_once(sae)
    key[4] = 0.0  # an empty write has no direction to move to
    errors = torch.tensor([0.0, 0, 3, 0, 5, 0, 1, 0, -1e-9], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    assert resample(sae, optimizer, Factored(key, value), errors, some_dead(7), generator) == 2
    assert resample(sae, optimizer, Factored(key, value), 0 * errors, some_dead(7), generator) == 0
    assert resample(sae, optimizer, Factored(key, value), errors, some_dead(0) & False, generator) == 0
    assert all(torch.isfinite(parameter).all() for parameter in sae.parameters())


def test_resampling_a_wholly_dead_dictionary_works():
    sae, (key, value) = sae_of(), writes()
    everything = torch.ones(20, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    assert resample(sae, trained_once(sae), Factored(key, value), torch.ones(9).double(), everything, generator) == 9
    assert all(torch.isfinite(parameter).all() for parameter in sae.parameters())


@pytest.mark.parametrize("decoder", ["outer_product", "dense"])
def test_an_atom_moves_onto_what_is_left_of_a_sum(decoder):
    """The larger term of every sample has an atom already; the dead one must get the smaller."""
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.nn.functional.normalize(torch.randn(1, 2, 6, generator=generator), dim=-1) for _ in range(2))
    samples = Factored(key, value * torch.tensor([3.0, 1.0])[:, None])
    sae = WriteSAE(WriteSAEConfig(d_k=6, d_v=6, n_atoms=2, k=1, decoder=decoder))
    found = (key[0, :1].T @ value[0, :1], key[0, 1:].T @ value[0, 1:])
    with torch.no_grad():
        if decoder == "dense":
            sae.decoder.atoms[0] = found[0]
        else:
            sae.key_atoms[0], sae.value_atoms[0] = key[0, :1], value[0, :1]
    codes = Codes(torch.tensor([[0]]), torch.tensor([[3.0]]))
    dead = torch.tensor([False, True])
    optimizer = torch.optim.Adam(sae.parameters())
    resample(sae, optimizer, samples, torch.ones(1), dead, generator, codes=codes)
    cosine = (sae.atom(1).AB * found[1]).sum() / sae.atom(1).AB.norm()
    assert cosine > 1 - 1e-5
    # Without the code, or for single outer products, it is the sample itself.
    resample(sae, optimizer, samples, torch.ones(1), dead, generator)
    assert (sae.atom(1).AB * found[0]).sum() > 0.8
    single = Factored(key[:, 0], value[:, 0])
    resample(sae, optimizer, single, torch.ones(1), dead, generator, codes=codes)
    torch.testing.assert_close(sae.atom(1).AB.abs(), found[0].abs(), rtol=1e-4, atol=1e-5)
