"""The training loop: schedule, planted atoms found again, seeds, errors, and `train` on a real (tiny, random) model."""

import json
import math

import pytest
import torch

from tests.hooked_recurrent.models import HYBRID, tiny_model, tokens_of
from writesae import Passages, TrainConfig, WriteSAE, WriteSAEConfig, fit, train
from writesae.parallel import World
from writesae.sae.states import StateSequences
from writesae.training import Trainer

HOOK = "blocks.1.mixer.hook_write"
SMALL = WriteSAEConfig(d_k=3, d_v=5, n_atoms=16, k=2)


def unit(*shape, generator):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def planted(n_atoms=32, d_k=16, d_v=12, batch=128, seed=777):
    """Planted factors, and endless batches of single planted atoms at random sizes with 1% noise."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = unit(n_atoms, d_k, generator=generator), unit(n_atoms, d_v, generator=generator)

    def batches():
        while True:
            which = torch.randint(n_atoms, (batch,), generator=generator)
            size = 0.5 + 2 * torch.rand(batch, 1, generator=generator)
            noise = [0.01 * torch.randn(batch, d, generator=generator) for d in (d_k, d_v)]
            yield keys[which] + noise[0], size * values[which] + noise[1]

    return keys, values, batches()


def found(sae, keys, values):
    """Share of the planted atoms that some learned atom matches at cosine > 0.95."""
    learned = torch.stack([sae.atom(i).AB.flatten() for i in range(sae.config.n_atoms)])
    truth = torch.einsum("nk,nv->nkv", keys, values).flatten(1)
    cosines = torch.nn.functional.normalize(learned, dim=1) @ truth.T
    return float((cosines.amax(0) > 0.95).double().mean())


def calibrated(config, batches):
    sae = WriteSAE(config)
    sae.calibrate_(*(torch.cat(parts) for parts in zip(*(next(batches) for _ in range(8)), strict=True)))
    return sae


@pytest.mark.parametrize(("k", "rank", "center"), [(1, 1, False), (3, 1, False), (1, 1, True), (1, 2, False)])
def test_planted_atoms_are_found_again(k, rank, center):
    keys, values, batches = planted()
    sae = calibrated(WriteSAEConfig(d_k=16, d_v=12, n_atoms=48, k=k, rank=rank, center=center), batches)
    assert found(sae, keys, values) < 0.1
    log = fit(sae, batches, TrainConfig(steps=350, batch_size=128, lr=1e-2, dead_after=30, resample_every=50))
    assert found(sae, keys, values) > 0.9
    assert log[-1]["fvu"] < 0.05 < 0.5 < log[0]["fvu"]
    assert (sae.atom_norms() - 1).abs().max() < 1e-5


def test_dead_atoms_are_revived():
    keys, values, batches = planted()
    shares = []
    for revive in (False, True):
        sae = calibrated(WriteSAEConfig(d_k=16, d_v=12, n_atoms=48, k=1), batches)
        with torch.no_grad():
            sae.encoder.bias[:40] = -5.0  # these can never fire by themselves
        every, weight = (50, 1.0) if revive else (0, 0.0)
        config = TrainConfig(steps=250, batch_size=128, lr=1e-2, dead_after=20, resample_every=every, aux_weight=weight)
        fit(sae, batches, config)
        shares.append(found(sae, keys, values))
    assert shares[0] < 0.3 and shares[1] > 0.8


def test_the_same_seeds_give_the_same_dictionary():
    weights = []
    for seed in (0, 0, 1):
        _, _, batches = planted(seed=seed)
        sae = calibrated(WriteSAEConfig(d_k=16, d_v=12, n_atoms=48, k=1), batches)
        fit(sae, batches, TrainConfig(steps=60, batch_size=128, dead_after=5, resample_every=20))
        weights.append(sae.key_atoms.detach().clone())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("variant", [{}, {"encoder": "linear", "decoder": "dense"}, {"activation": "batch_topk"}])
def test_bfloat16_ends_where_float32_does(variant):
    quality = []
    for precision in ("float32", "bfloat16"):
        _, _, batches = planted()
        sae = calibrated(WriteSAEConfig(d_k=16, d_v=12, n_atoms=48, k=2, **variant), batches)
        trainer = Trainer(sae, TrainConfig(steps=80, batch_size=128, lr=1e-2, dead_after=20, precision=precision))
        quality.append(trainer.run(batches)[-1]["fvu"])
        for parameter in sae.parameters():
            assert parameter.dtype == parameter.grad.dtype == torch.float32 and torch.isfinite(parameter.grad).all()
            assert all(moment.dtype == torch.float32 for moment in trainer.optimizer.state[parameter].values())
        assert sae.scoring_dtype is None
    assert quality[0] != quality[1] and quality[1] == pytest.approx(quality[0], abs=0.01)
    assert quality[0] < 0.5


def test_the_sparsifier_follows_the_schedule():
    _, _, batches = planted()
    sae = calibrated(WriteSAEConfig(16, 12, n_atoms=48, activation="jumprelu", sparsity=2.0, bandwidth=0.1), batches)
    trainer = Trainer(sae, TrainConfig(steps=5, sparsity_warmup_steps=2, bandwidth_final=0.01))
    seen = []
    for _ in range(5):
        trainer.advance(next(batches))
        seen.append((sae.activation.sparsity, sae.activation.bandwidth))
    assert [sparsity for sparsity, _ in seen] == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0])
    assert [bandwidth for _, bandwidth in seen][::2] == pytest.approx([0.1, 0.01, 0.001])
    assert sae.activation.log_threshold.grad.abs().sum() > 0  # the penalty reaches the thresholds


@pytest.mark.parametrize("change", [{"n_atoms": 47}, {"rank": 2}, {"center": True}, {"activation": "gated"}])
def test_a_state_of_another_dictionary_is_refused(change):
    _, _, batches = planted()
    shape = {"d_k": 16, "d_v": 12, "n_atoms": 48, "k": 1}
    trainer, other = (
        Trainer(WriteSAE(WriteSAEConfig(**fields)), TrainConfig()) for fields in (shape, {**shape, **change})
    )
    other.advance(next(batches))
    before = {name: tensor.clone() for name, tensor in other.sae.state_dict().items()}
    with pytest.raises(ValueError, match="should be a tensor of shape"):
        other.load_state_dict(trainer.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in other.sae.state_dict().items())


def test_the_states_of_a_passage_stay_in_one_process():
    states = StateSequences(-torch.rand(5, 7), torch.randn(5, 7, 3), torch.randn(5, 7, 4), skip=1)
    sae = WriteSAE(WriteSAEConfig(3, 4, n_atoms=8, k=2))
    shares = [Trainer(sae, TrainConfig(), World(rank, 2))._share(states) for rank in range(2)]
    assert [len(share) for share in shares] == [12, 18] and all(isinstance(share, StateSequences) for share in shares)
    torch.testing.assert_close(torch.cat([share.matrices() for share in shares]), states.matrices())
    with pytest.raises(ValueError, match="5 passages has nothing for some of the 6 processes"):
        Trainer(sae, TrainConfig(), World(0, 6)).advance(states)


def test_the_log_and_the_callback():
    _, _, batches = planted()
    seen = []
    sae = calibrated(WriteSAEConfig(d_k=16, d_v=12, n_atoms=48, k=1), batches)
    log = fit(sae, batches, TrainConfig(steps=23, batch_size=128, log_every=10), lambda done, line: seen.append(done))
    assert [line["step"] for line in log] == [0, 10, 20, 22]
    assert seen == list(range(1, 24))
    assert all(math.isfinite(value) for line in log for value in line.values())
    json.dumps(log)


def test_gradients_along_an_atom_are_projected_away():
    _, _, batches = planted()
    sae = calibrated(WriteSAEConfig(d_k=16, d_v=12, n_atoms=48, k=1), batches)
    trainer = Trainer(sae, TrainConfig(project_gradient=True, grad_clip=0.0))
    trainer.advance(next(batches))
    assert sae.key_atoms.grad.abs().sum() > 0
    fresh = calibrated(WriteSAEConfig(d_k=16, d_v=12, n_atoms=48, k=1), batches)
    assert (sae.key_atoms.grad * fresh.key_atoms).sum(-1).abs().max() < 1e-6


def test_a_loss_that_is_not_finite_stops_the_run():
    _, _, batches = planted()
    sae = calibrated(WriteSAEConfig(d_k=16, d_v=12, n_atoms=48, k=1), batches)
    with pytest.raises(ValueError, match="the loss is nan at step 0"):
        fit(sae, iter([(torch.full((4, 16), torch.nan), torch.ones(4, 12))]), TrainConfig(steps=5))


def test_batches_that_end_early_are_an_error():
    _, _, batches = planted()
    sae = calibrated(WriteSAEConfig(d_k=16, d_v=12, n_atoms=48, k=1), batches)
    with pytest.raises(ValueError, match="ended at step 1 of 5"):
        fit(sae, [next(batches)], TrainConfig(steps=5))


@pytest.mark.parametrize("cache_bytes", [0, 1 << 29])
def test_train_on_a_model_by_hook_name(tmp_path, cache_bytes):
    model = tiny_model()
    tokens = tokens_of(model, batch=12, length=20)
    text = Passages(tokens, ("a.py",) * 12, (0,) * 12, "train", "f00d", 3, 1, 0)
    config = TrainConfig(
        steps=50, batch_size=64, cache_bytes=cache_bytes, buffer_writes=128, passages_per_forward=5, log_every=5
    )
    told = []
    result = train(
        model,
        HOOK,
        2,
        tokens=text,
        config=config,
        sae_config=SMALL,
        heldout=tokens_of(model, batch=2, length=9, seed=1),
        progress=lambda *args: told.append(args),
    )
    assert result.log[-1]["loss"] < 0.9 * result.log[0]["loss"]
    assert set(result.metrics) == {"train", "heldout"} and result.metrics["heldout"]["n_writes"] == 16
    assert told[-1] == ("steps", 50, 50) and (("writes", 12, 12) in told) == bool(cache_bytes)
    loaded = WriteSAE.load(result.sae.save(tmp_path / "sae"))
    origin = loaded.provenance
    assert (origin["hook"], origin["layer"], origin["head"], origin["layout"]) == (HOOK, 1, 2, "key_first")
    assert origin["split"]["train"]["split"] == "train" and origin["split"]["train"]["fingerprint"] == "f00d"
    assert origin["split"]["heldout"] == {"n_passages": 2, "length": 9}
    assert TrainConfig.from_dict(origin["training"]) == config and origin["metrics"] == result.metrics


def test_train_takes_the_sizes_of_the_model_by_default():
    model = tiny_model()
    config = TrainConfig(steps=1, batch_size=8)
    sae = train(model, HOOK, 0, tokens=tokens_of(model, batch=2, length=9), config=config).sae
    assert (sae.config.d_k, sae.config.d_v, sae.config.n_atoms, sae.config.k) == (3, 5, 2048, 32)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"hook": "blocks.9.mixer.hook_write"}, "layer 9 has no writes"),
        ({"hook": "blocks.1.attn.hook_pattern"}, "no vector per token"),
        ({"hook": "blocks.0.mixer.hook_wirte"}, "did you mean 'blocks.0.mixer.hook_write'"),
        ({"head": 4}, "head must be 0..3, got 4"),
        ({"sae_config": WriteSAEConfig(d_k=5, d_v=3, n_atoms=4, k=1)}, r"\(5, 3\).*\(3, 5\)"),
    ],
)
def test_train_refuses_what_does_not_fit_the_model(arguments, word):
    model = tiny_model(HYBRID)
    with pytest.raises(ValueError, match=word):
        train(model, **{"hook": "blocks.0.mixer.hook_write", "tokens": tokens_of(model), **arguments})


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"steps": 0}, "steps must be greater than 0"),
        ({"lr_min": 1.0}, "lr_min must be at most"),
        ({"resample_until": 1.5}, "resample_until"),
        ({"aux_weight": -1.0}, "aux_weight must be at least 0"),
        ({"aux_weight": math.nan}, "aux_weight"),
        ({"buffer_writes": 10}, "must hold a batch of 256"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"precision": "float16"}, "did you mean 'bfloat16'"),
        ({"log_to": ["tensorbord"]}, "did you mean 'tensorboard'"),
        ({"keep": 0}, "keep must be greater than 0"),
        ({"learning_rate": 1.0}, "no field 'learning_rate'"),
    ],
)
def test_a_bad_training_configuration_is_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        TrainConfig.from_dict(fields)
