"""The encoder swap: every type at the same firings, measured as by hand, and resumable."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

import writesae.evaluation.comparing.encoder_swap as module
from tests.hooked_recurrent.models import RULES, tiny_model, tokens_of
from writesae import WriteSAE
from writesae.evaluation.comparing.encoder_swap import (
    STAND_INS,
    TYPES,
    EncoderSwapConfig,
    EncoderSwapResult,
    encoder_swap,
)
from writesae.evaluation.firings import encode_cell

SMALL = {"n_atoms": 10, "k": 3, "steps": 4, "batch_size": 16, "per_atom": 1, "total": 3, "horizon": 1}
CONFIG = EncoderSwapConfig(**SMALL, seeds=(0, 5), first_position=2)


def setting(rule="gated_delta_net"):
    model = tiny_model((rule, rule))
    return model, tokens_of(model, batch=3, length=12), tokens_of(model, batch=6, length=14, seed=1)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    model, tokens, text = setting()
    folder, seen = tmp_path_factory.mktemp("swap"), []
    result = encoder_swap(
        model,
        tokens,
        train_tokens=text,
        cells=[(0, 1), (1, 2)],
        config=CONFIG,
        folder=folder,
        on_progress=lambda *now: seen.append(now),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    return model, tokens, text, folder, result


def test_a_row_per_dictionary_reading_and_stand_in(ran):
    *_, result = ran
    keys = ["layer", "head", "preset", "seed", "reading", "stand_in"]
    assert len(result.table) == 2 * 5 * 2 * 3 * 3 == len(result.table[keys].drop_duplicates())
    assert list(result.table["preset"].unique()) == list(TYPES) and result.cells == [[0, 1], [1, 2]]
    assert (result.table["n"] == 3).all() and (result.table["floor_max"] < 1e-12).all()
    assert result.table.groupby(["layer", "reading"])["median_kl_delete"].nunique().eq(1).all()  # the same firings
    sizes = result.table.groupby("preset")["parameters"].first()  # two sides of 3 + 5 or 15 numbers, and a bias
    expected = {"flat": 310, "rank1": 240, "bilinear": 170, "bilinear_flat": 240, "bilinear_tied": 90}
    assert sizes.to_dict() == expected
    assert result.table["closer"].isna().sum() == 2 * 3 * 3  # the dictionary whose firings they are, of either cell
    seeds = result.table.groupby(["layer", "preset", "seed"])["fvu"].first().unstack()
    assert (seeds[0] != seeds[5]).all()


def test_quality_is_that_of_the_matrices(ran):
    model, tokens, _, folder, result = ran
    for preset in TYPES:
        sae = WriteSAE.load(folder / "seed-5" / "sae" / f"l1h2-{preset}")
        assert sae.config.seed == sae.provenance["training"]["seed"] == 5  # first factors and order of the writes
        writes = encode_cell(model, sae, tokens, 1, 2)
        x = torch.einsum("npk,npv->npkv", writes.key, writes.value)[:, 2:].flatten(0, 1)
        with torch.no_grad():
            error = (sae(x.float()).double() - x).square().sum()
        rows = result.table.query("preset == @preset and seed == 5 and layer == 1")
        assert rows["mse"].iloc[0] == pytest.approx(float(error) / x.numel(), rel=1e-4)
        assert rows["fvu"].iloc[0] == pytest.approx(float(error / (x - x.mean(0)).square().sum()), rel=1e-4)
        fired = writes.codes.indices[:, 2:][writes.codes.active[:, 2:]].unique()
        assert rows["dead_fraction"].iloc[0] == pytest.approx(1 - len(fired) / 10)
        assert rows["l0"].iloc[0] == pytest.approx(float(writes.codes.l0[:, 2:].double().mean()))


def test_a_second_call_goes_on_where_the_first_was(ran, monkeypatch):
    model, tokens, text, folder, result = ran
    fields = {"train_tokens": text, "cells": [(0, 1), (1, 2)], "config": CONFIG, "folder": folder}
    (folder / "measured-l1h2.json").unlink()
    measured = []
    own = module._measure
    monkeypatch.setattr(module, "_measure", lambda *given: measured.append(given[3:5]) or own(*given))
    again = encoder_swap(model, tokens, **fields)
    assert measured == [(1, 2)]  # the other cell was there
    pd.testing.assert_frame_equal(again.table, result.table)
    for change, word in (
        ({"config": EncoderSwapConfig(**{**CONFIG.to_dict(), "total": 4})}, "other config;"),
        ({"train_tokens": text[:5]}, "other train_tokens;"),
    ):
        with pytest.raises(ValueError, match=word):
            encoder_swap(model, tokens, **{**fields, **change})
    with pytest.raises(ValueError, match="other tokens;"):
        encoder_swap(model, tokens[:2], **fields)


def test_summary_averages_over_cells_and_seeds(ran, tmp_path):
    *_, result = ran
    rows = result.summary()
    assert len(rows) == 5 * 3 * len(STAND_INS)
    row = next(
        row for row in rows if (row["preset"], row["reading"], row["stand_in"]) == ("flat", "cache", "atom_norm")
    )
    mine = result.table.query("preset == 'flat' and reading == 'cache' and stand_in == 'atom_norm'")
    assert (row["n_dictionaries"], row["n"]) == (4, 12)
    for name in ("win_rate", "fvu", "mse", "closer"):
        assert row[name] == pytest.approx(mine[name].mean())
    assert row["lowest_to_highest"] == [mine["win_rate"].min(), mine["win_rate"].max()]
    again = EncoderSwapResult.from_json(result.to_json(tmp_path / "e.json"))
    assert again.cells == result.cells and len(again.table) == len(result.table)
    assert len(result.figure().axes) == 3


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_without_a_folder(rule):
    model, tokens, text = setting(rule)
    config = EncoderSwapConfig(**{**SMALL, "total": 2}, seeds=(0,), first_position=2, presets=("flat", "bilinear_tied"))
    result = encoder_swap(model, tokens, train_tokens=text, cells=[(1, 2)], config=config)
    assert np.isfinite(result.table[["win_rate", "median_kl", "fvu", "mse"]]).all().all()
    assert (
        result.table.query("preset == 'bilinear_tied'")["closer"].isna().all()
    )  # the only one of outer products leads
    assert result.table.query("preset == 'flat'")["closer"].notna().all()
    json.dumps(result.about)


def test_bad_input_is_refused():
    model, tokens, text = setting()
    for cells, error, word in (
        ([], ValueError, "one or more different"),
        ([(0, 1), (0, 1)], ValueError, "one or more different"),
        ([(2, 0)], IndexError, "no cell \\(layer 2"),
        ([(0, 4)], IndexError, "heads 0 to 3"),
    ):
        with pytest.raises(error, match=word):
            encoder_swap(model, tokens, train_tokens=text, cells=cells, config=CONFIG)
    for fields, word in (
        ({"presets": ("flatt",)}, "did you mean 'flat'"),
        ({"seeds": ()}, "seeds"),
        ({"steps": 0}, "steps"),
        ({"presets": ("flat",)}, "outer"),
    ):
        with pytest.raises(ValueError, match=word):
            EncoderSwapConfig(**fields)
    with pytest.raises(ValueError, match="seeds"):
        EncoderSwapConfig(seeds=(1, 1))
