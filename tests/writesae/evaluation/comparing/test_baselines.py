"""Baselines at one budget: trained as the dictionary was, and measured as a plain full pass would."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import writesae.evaluation.comparing.stand_ins as stand_ins
from tests.hooked_recurrent.models import RULES, tiny_model, tokens_of
from tests.writesae.evaluation.cells_for_tests import HEAD, LAYER
from writesae import TrainConfig, WriteSAE, WriteSAEConfig
from writesae.evaluation.comparing.baselines import (
    METHODS,
    BaselinesConfig,
    BaselinesResult,
    baselines,
    budget_of,
    flat_config,
)
from writesae.evaluation.firings import Firing, encode_cell
from writesae.stream.sources import Source
from writesae.training import Job, train_many

CONFIG = BaselinesConfig(per_atom=1, total=4, horizon=1, first_position=2, fit_writes=50, seed=3)
TRAINING = TrainConfig(steps=6, batch_size=16, buffer_writes=64, calibration_writes=64, resample_every=3)
SOURCE = Source(f"blocks.{LAYER}.mixer.hook_write", HEAD)


def setting(rule="gated_delta_net", **fields):
    model = tiny_model((rule, rule))
    text, tokens = tokens_of(model, batch=6, length=14, seed=1), tokens_of(model, batch=3, length=12)
    job = Job("sae", SOURCE, WriteSAEConfig(3, 5, n_atoms=10, k=3, **fields))
    sae = train_many(model, [job], tokens=text, config=TRAINING)["sae"].sae
    return model, sae, text, tokens


@pytest.fixture(scope="module")
def ran():
    model, sae, text, tokens = setting()
    seen = []
    result = baselines(
        model,
        sae,
        tokens,
        layer=LAYER,
        head=HEAD,
        train_tokens=text,
        config=CONFIG,
        on_progress=lambda *now: seen.append(now),
    )
    assert seen[-1] == (4, 4)
    return model, sae, text, tokens, result


def test_kls_are_those_of_a_plain_pass_with_the_flat_reconstruction_written(ran):
    model, sae, text, tokens, result = ran
    budget = budget_of(sae)
    assert (budget.steps, budget.batch_size) == (6, 16)
    flat = train_many(model, [Job("x", SOURCE, flat_config(sae.config))], tokens=text, config=budget)["x"].sae
    writes = encode_cell(model, flat, tokens, LAYER, HEAD)
    for row in result.replacement.reading("in_recurrence").itertuples():
        firing = Firing(row.passage, row.position, 0, 1.0, 0, 1.0)
        codes = writes.codes
        here = type(codes)(
            codes.indices[row.passage, row.position][None], codes.values[row.passage, row.position][None]
        )
        with torch.no_grad():
            u, s, vh = torch.linalg.svd(flat.decode(here)[0].double())
        placed = torch.outer(u[:, 0], vh[0])

        for scale, size in (("coef", s[0]), ("norm", writes.norms[row.passage, row.position])):

            def put(write, hook, t=row.position, size=size, placed=placed):
                write = write.clone()
                write[:, t, HEAD] = size * placed
                return write

            with torch.no_grad():
                text_here = tokens[row.passage][None]
                edited = model.run_with_hooks(text_here, fwd_hooks=[(SOURCE.hook, put)])[0, row.position]
                after, before = edited.log_softmax(-1), model(text_here)[0, row.position].log_softmax(-1)
            expected = float((after.exp() * (after - before)).sum())
            assert getattr(row, f"kl_flat_svd_{scale}") == pytest.approx(expected, rel=1e-4, abs=1e-10)
        assert stand_ins.reconstructed(flat, writes)(firing).norm() == pytest.approx(float(s[0]), rel=1e-5)


def test_summary_compares_every_method_with_the_dictionary_at_the_same_scale(ran, tmp_path):
    *_, result = ran
    rows = result.summary(n_resamples=50)
    assert len(rows) == 3 * 2 * (1 + len(METHODS))
    for row in rows:
        mine = result.kl(f"{row['method']}_{row['scale']}", row["reading"])
        table = result.replacement.reading(row["reading"])
        assert row["n"] == len(mine) == 4
        assert row["win_rate"] == pytest.approx((mine < table["kl_delete"].to_numpy()).mean())
        reference = table[f"kl_atom_dominant_{row['scale']}"].to_numpy()
        if row["method"] == "rank1":
            assert "difference" not in row and np.array_equal(mine, reference)
        else:
            assert row["closer"] == pytest.approx((mine < reference).mean())
        assert (row["fvu"] is None) == (row["method"] == "by_token")
    again = BaselinesResult.from_json(result.to_json(tmp_path / "b.json"))
    pd.testing.assert_frame_equal(again.table, result.table)
    assert len(again.summary(50)) == len(rows) and again.dictionaries == result.dictionaries
    assert result.figure().axes[0].get_ylabel()


def test_dictionaries_are_described(ran):
    model, sae, _, tokens, result = ran
    about = result.dictionaries
    assert set(about) == {"rank1", "flat", "rank2", "pca", "one_for_all"}
    sizes = {"rank1": 10 * (2 * 8 + 1), "rank2": 10 * (2 * 16 + 1), "flat": 10 * (2 * 15 + 1)}  # two sides and a bias
    assert sizes == {name: about[name]["parameters"] for name in sizes}
    writes = encode_cell(model, sae, tokens, LAYER, HEAD)
    x = torch.einsum("npk,npv->npkv", writes.key, writes.value)[:, 2:].flatten(0, 1)
    variance = float((x - x.mean(0)).square().sum())
    assert 0 < about["pca"]["fvu"] < 2 and 0 < about["one_for_all"]["fvu"] < float(x.square().sum()) / variance
    assert result.about["training"]["steps"] == 6 and result.about["train_text"]["n_passages"] == 6


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "gated_delta_net"])
def test_every_rule(rule):
    model, sae, text, tokens = setting(rule)
    config = BaselinesConfig(**{**CONFIG.to_dict(), "total": 2})
    result = baselines(model, sae, tokens, layer=LAYER, head=HEAD, train_tokens=text, config=config)
    columns = [f"kl_{method}_{scale}" for method in METHODS for scale in ("coef", "norm")]
    assert np.isfinite(result.table[columns]).all().all() and result.replacement.floor()[1] < 1e-12


def test_what_cannot_be_compared_is_refused():
    model, sae, text, tokens = setting()
    run = {"layer": LAYER, "head": HEAD, "train_tokens": text, "config": CONFIG}
    for fields, word in (({"rank": 2}, "of rank 2"), (None, "dense")):
        config = flat_config(sae.config) if fields is None else replace(sae.config, **fields)
        other = WriteSAE(config)
        other.provenance["training"] = TRAINING.to_dict()
        with pytest.raises(ValueError, match=word):
            baselines(model, other, tokens, **run)
    sae.provenance["form"] = "net"
    with pytest.raises(ValueError, match="trained on net writes"):
        baselines(model, sae, tokens, **run)
    del sae.provenance["training"]
    with pytest.raises(ValueError, match="does not say how it was trained"):
        baselines(model, sae, tokens, **run)
    for field in ("components", "fit_writes", "total"):
        with pytest.raises(ValueError, match=field):
            BaselinesConfig(**{field: 0})
    assert math.isfinite(budget_of(setting()[1]).lr)
