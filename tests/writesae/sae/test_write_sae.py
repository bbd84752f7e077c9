"""WriteSAE: factored against dense (values and gradients), codes in raw units, clear errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from writesae.config import WriteSAEConfig
from writesae.sae import WriteSAE


def sae_of(rank=1, center=False, n_atoms=24, k=5, d_k=8, d_v=6, seed=0):
    sae = WriteSAE(WriteSAEConfig(d_k=d_k, d_v=d_v, n_atoms=n_atoms, k=k, rank=rank, center=center, seed=seed)).double()
    with torch.no_grad():  # away from the initial point, where encoder = decoder and all norms are 1
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return sae


def writes(n=10, d_k=8, d_v=6, size=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(n, d_k, dtype=torch.float64, generator=generator)
    return key, size * torch.randn(n, d_v, dtype=torch.float64, generator=generator)


def matrices(key, value):
    return torch.einsum("...k,...v->...kv", key, value)


@given(st.integers(1, 3), st.booleans(), st.integers(1, 8), st.sampled_from([1e-3, 1.0, 50.0]), st.integers(0, 99))
def test_factored_loss_equals_the_dense_loss(rank, center, k, size, seed):
    torch.manual_seed(seed)
    sae = sae_of(rank, center, k=k)
    key, value = writes(size=size, seed=seed)
    sae.calibrate_(*writes(200, size=size, seed=seed + 1))
    factored, dense = sae.loss(key, value), sae.dense_loss(matrices(key, value))
    for name in ("loss", "fvu", "l0", "errors"):
        torch.testing.assert_close(getattr(factored, name), getattr(dense, name), rtol=1e-10, atol=1e-10)
    gradients = []
    for output in (factored, dense):
        sae.zero_grad()
        output.loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in sae.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-10, atol=1e-10, msg=name)
        assert gradient.abs().sum() > 0


def test_the_loss_also_differentiates_to_the_writes():
    sae, (key, value) = sae_of(center=True), writes()
    sae.calibrate_(*writes(100))
    results = []
    for factored in (True, False):
        inputs = [key.clone().requires_grad_(), value.clone().requires_grad_()]
        output = sae.loss(*inputs) if factored else sae.dense_loss(matrices(*inputs))
        results.append(torch.autograd.grad(output.loss, inputs))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("center", [False, True])
def test_encode_agrees_with_encode_matrix_and_rebuilds_raw_writes(rank, center):
    sae, (key, value) = sae_of(rank, center), writes(40)
    sae.calibrate_(key, value)
    codes, of_matrix = sae.encode(key, value), sae.encode_matrix(matrices(key, value))
    torch.testing.assert_close(codes.dense(24), of_matrix.dense(24), rtol=1e-12, atol=1e-12)
    by_hand = sum(
        codes.values[:, place, None, None] * torch.stack([sae.atom(int(i)).AB for i in codes.indices[:, place]])
        for place in range(5)
    )
    by_hand = by_hand if sae.mean is None else by_hand + sae.mean
    torch.testing.assert_close(sae.decode(codes), by_hand, rtol=1e-12, atol=1e-12)
    error = (matrices(key, value) - by_hand).square().sum((1, 2)) * sae.input_scale**2
    torch.testing.assert_close(sae.loss(key, value).errors, error, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sae(matrices(key, value)), by_hand, rtol=1e-12, atol=1e-12)


def test_a_write_that_is_an_atom_gets_its_own_size_as_coefficient():
    sae = WriteSAE(WriteSAEConfig(d_k=8, d_v=6, n_atoms=24, k=1)).double()
    sae.calibrate_(*writes(100, size=40.0))
    codes = sae.encode(sae.key_atoms[[3, 9], 0] * 2.0, sae.value_atoms[[3, 9], 0] * 30.0)
    assert codes.indices[:, 0].tolist() == [3, 9]
    assert (codes.values[:, 0] - 60.0).abs().max() < 1e-4


def test_codes_scale_with_the_writes_when_the_scale_does():
    """Raw units: multiplying the writes and recalibrating multiplies the codes and changes nothing else."""
    sae, (key, value) = sae_of(), writes(50)
    sae.calibrate_(key, value)
    small, loss = sae.encode(key, value), sae.loss(key, value)
    sae.calibrate_(key, 1000 * value)
    large = sae.encode(key, 1000 * value)
    assert torch.equal(small.indices, large.indices)
    torch.testing.assert_close(large.values, 1000 * small.values, rtol=1e-10, atol=0)
    torch.testing.assert_close(sae.loss(key, 1000 * value).loss, loss.loss, rtol=1e-10, atol=0)


def test_codes_are_ordered_and_keep_any_leading_axes(monkeypatch):
    monkeypatch.setattr("writesae.sae.write_sae._SCORES_AT_ONCE", 24 * 4)  # several blocks
    monkeypatch.setattr("writesae.sae.write_sae._MATRIX_AT_ONCE", 24 * 6 * 4)
    sae, (key, value) = sae_of(), writes(30)
    flat = sae.encode(key, value)
    assert (flat.values.diff(dim=-1) <= 0).all()
    shaped = sae.encode(key.view(2, 5, 3, 8), value.view(2, 5, 3, 6))
    assert torch.equal(shaped.indices.flatten(0, 2), flat.indices)
    assert shaped.values.shape == (2, 5, 3, 5)
    assert sae.decode(shaped).shape == (2, 5, 3, 8, 6)
    assert torch.equal(sae.encode_matrix(matrices(key, value)).indices, flat.indices)
    one = sae.encode(key[0], value[0])
    assert one.indices.shape == (5,) and sae.decode(one).shape == (8, 6)
    assert sae.encode(key[:0], value[:0]).indices.shape == (0, 5)
    assert sae.decode(sae.encode(key[:0], value[:0])).shape == (0, 8, 6)


def test_gradients_reach_active_atoms_only():
    sae, (key, value) = sae_of(k=1), writes(3)
    output = sae.loss(key, value)
    output.loss.backward()
    active = set(output.codes.indices[output.codes.active].tolist())
    touched = sae.key_atoms.grad.abs().sum((1, 2)).nonzero().flatten().tolist()
    assert set(touched) == active and 0 < len(active) < 24


def test_calibration_sets_unit_power_and_the_variance():
    sae, (key, value) = sae_of(center=True), writes(500)
    value = value + 2.0
    key = key + 1.0
    sae.calibrate_(key, value)
    x = matrices(key, value)
    scaled = x * sae.input_scale
    torch.testing.assert_close(scaled.square().sum((1, 2)).mean(), torch.ones_like(sae.input_scale))
    torch.testing.assert_close(sae.mean, x.mean(0))
    variance = (scaled - scaled.mean(0)).square().sum((1, 2)).mean()
    torch.testing.assert_close(sae.input_variance, variance)


@pytest.mark.parametrize("center", [False, True])
def test_calibration_gives_the_encoder_its_best_amplitude(center):
    sae = WriteSAE(WriteSAEConfig(d_k=8, d_v=6, n_atoms=200, k=40, center=center)).double()
    key, value = writes(300)
    before = sae.loss(key, value).fvu
    sae.calibrate_(key, value)
    best = sae.loss(key, value).loss
    assert before > 2 and best < 1
    for factor in (0.9, 1.1):
        with torch.no_grad():
            sae.encoder.amplify_(torch.tensor(factor).double())
        assert sae.loss(key, value).loss > best
        with torch.no_grad():
            sae.encoder.amplify_(torch.tensor(1 / factor).double())


def test_float32_loss_is_close_to_float64():
    sae, (key, value) = sae_of(), writes(60)
    sae.calibrate_(key, value)
    exact = sae.loss(key, value)
    rough = sae.float().loss(key.float(), value.float())
    assert abs(rough.loss.item() - exact.loss.item()) < 1e-5


def test_writes_of_another_dtype_are_converted():
    sae, (key, value) = sae_of(), writes()
    rough = sae.encode(key.bfloat16(), value.float())
    assert rough.values.dtype == torch.float64
    torch.testing.assert_close(
        rough.dense(24), sae.encode(key.bfloat16().double(), value).dense(24), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda sae: sae.encode(torch.zeros(2, 6).double(), torch.zeros(2, 8).double()), "d_k=8"),
        (lambda sae: sae.loss(torch.zeros(2, 8).double(), torch.zeros(2, 5).double()), "d_v=6"),
        (lambda sae: sae.encode(torch.zeros(2, 8).double(), torch.zeros(3, 6).double()), "same leading axes"),
        (lambda sae: sae.encode_matrix(torch.zeros(2, 6, 8).double()), "transposed"),
        (lambda sae: sae.dense_loss(torch.zeros(2, 8, 5).double()), r"\(8, 6\)"),
        (lambda sae: sae.calibrate_(torch.zeros(2, 8).double(), torch.zeros(2, 6).double()), "writes nothing"),
    ],
)
def test_bad_inputs_give_one_clear_error(call, word):
    with pytest.raises(Exception, match=word) as caught:
        call(sae_of())
    assert caught.type is ValueError


def test_an_atom_outside_the_dictionary_is_an_index_error():
    with pytest.raises(IndexError, match="24 atoms"):
        sae_of().atom(24)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"k": 25}, "k must be at most n_atoms=24"),
        ({"k": 0}, "greater than 0"),
        ({"rank": 7}, "rank must be at most"),
        ({"encoder": "bilinaer"}, "did you mean 'bilinear'"),
        ({"activation": "topk2"}, "did you mean 'topk'"),
        ({"n_atom": 3}, "did you mean 'n_atoms'"),
    ],
)
def test_a_bad_configuration_is_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        WriteSAEConfig.from_dict({"d_k": 8, "d_v": 6, "n_atoms": 24, "k": 5, **fields})
