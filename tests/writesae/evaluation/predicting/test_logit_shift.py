"""The whole experiment on tiny models: what is edited, what is measured, and that predictions meet measurements."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch

from hooked_recurrent import WriteEdit
from tests.hooked_recurrent.models import ALL_LINEAR, HYBRID, RULES
from tests.writesae.evaluation.cells_for_tests import HEAD, LAYER, cell
from writesae.evaluation.firings import encode_cell
from writesae.evaluation.predicting.logit_shift import LogitShiftConfig, in_float64, logit_shift
from writesae.evaluation.predicting.logit_shift_predictors import PREDICTORS
from writesae.evaluation.predicting.logit_shift_result import LogitShiftResult

pytestmark = pytest.mark.shapes_on_one_rule

CONFIG = LogitShiftConfig(
    total=4, per_atom=1, fractions=(1e-5, 0.3), horizons=(0, 3), top=2, tail_rank=9, cells=((1, 2), (0, 1))
)
STACKS = [*[(rule, rule) for rule in RULES], HYBRID]


@lru_cache
def studied(layer_types=ALL_LINEAR, config=CONFIG):
    layer = 2 if layer_types == HYBRID else LAYER
    model, sae, tokens = cell(layer_types, layer=layer)
    if layer != LAYER:
        config = replace(config, cells=((2, 2), (0, 1)))
    return model, sae, tokens, logit_shift(model, sae, tokens, layer=layer, head=HEAD, config=config)


@pytest.mark.parametrize("layer_types", STACKS, ids="-".join)
def test_small_edits_do_what_first_order_says(layer_types):
    *_, result = studied(layer_types)
    assert (
        len(result.table) == 4 * (2 * 3 + 1 * 2) * 2 * 3
    )  # contexts x (own atoms x sizes + gaussians x sizes) x targets
    small = result.table[result.table["size"] == "1e-05"]
    scale = small["measured"].abs().max()
    for name in ("first_order", "norm_exact", "norm_midpoint"):
        assert (small["measured"] - small[name]).abs().max() < 1e-3 * scale
        assert result.r2(name, 1e-5) > 0.999999
    assert result.r2("shuffled", 1e-5) < 0.9 and result.r2("three_factor", 1e-5) < 0.99


def test_what_is_measured_is_a_full_run_with_the_edit():
    model, sae, tokens, result = studied()
    row = result.table[(result.table["source"] == "firing") & (result.table["size"] == "natural")].iloc[7]
    assert (row["layer"], row["head"]) == (LAYER, HEAD) and row["horizon"] in (0, 3)
    writes = encode_cell(model, sae, tokens, LAYER, HEAD)
    codes = writes.codes
    here = codes.indices[row["passage"], row["position"]].tolist()
    coefficient = float(codes.values[row["passage"], row["position"], here.index(row["atom"])])
    key, value = sae.key_atoms[row["atom"], 0].detach(), sae.value_atoms[row["atom"], 0].detach()
    assert row["amplitude"] == pytest.approx(coefficient * float(key.norm() * value.norm()))
    assert row["fraction"] == pytest.approx(row["amplitude"] / float(writes.norms[row["passage"], row["position"]]))
    text = tokens[row["passage"]][None]
    edit = WriteEdit(LAYER, HEAD, int(row["position"]), "add", key, coefficient * value)
    plain, edited = model(text)[0], model(text, edits=[edit])[0]
    at = row["position"] + row["horizon"]
    assert int((plain[at] > plain[at, row["token"]]).sum()) == row["rank"] - 1
    assert float((edited - plain)[at, row["token"]].detach()) == pytest.approx(row["measured"], abs=1e-10)


def test_every_size_is_the_share_it_says_and_silent_atoms_are_silent():
    model, sae, tokens, result = studied()
    table = result.table
    shares = table[table["size"] != "natural"]
    assert np.allclose(shares["fraction"], shares["size"].astype(float))
    codes = encode_cell(model, sae, tokens, LAYER, HEAD).codes
    for row in table.drop_duplicates(["context", "atom", "layer"]).itertuples():
        active = codes.indices[row.passage, row.position][codes.active[row.passage, row.position]].tolist()
        assert (row.source == "firing") == (row.atom in active) and (row.source == "gaussian") == (row.layer == 0)
    natural = table[table["size"] == "natural"].groupby("context")["amplitude"].nunique()
    assert (natural == 1).all() and set(table[table["source"] == "gaussian"]["size"]) == {"1e-05", "0.3"}


def test_the_null_is_another_passages_gradient():
    *_, result = studied()
    first = result.table["passage"].min()
    assert (result.table["shuffled"].isna() == (result.table["passage"] == first)).all()


def test_where_linearity_ends_is_told_from_the_untouched_run():
    *_, result = studied()
    table = result.table
    small, large = (table[table["size"] == size] for size in ("1e-05", "0.3"))
    assert np.allclose(large["read_change"].to_numpy(), 3e4 * small["read_change"].to_numpy())
    found = result.by_reach(edges=(1e-4, 0.1))
    assert found["n"].sum() == (table["tokens"] == "top").sum()
    assert found["first_order"].iloc[0] < 1e-3 < found["first_order"].iloc[-1]
    assert found["norm_midpoint"].iloc[-1] < found["first_order"].iloc[-1]


def test_summary_figure_and_file(tmp_path):
    *_, result = studied()
    summary = result.summary(n_resamples=20)
    sources = set(result.table["source"])
    pairs = len(result.table.groupby(["tokens", "size", "source"]))
    assert len(sources) > 1 and len(summary) == (2 * 3 + pairs) * (len(PREDICTORS) + 1)
    for source in sources:
        rows = result.table[(result.table["source"] == source) & (result.table["tokens"] == "top")]
        apart = [
            row for row in summary if (row["source"], row["tokens"], row["predictor"]) == (source, "top", "in_layer")
        ]
        assert sum(row["n"] for row in apart) == len(rows)
    best = next(
        row
        for row in summary
        if (row["tokens"], row["size"], row["predictor"], row["source"]) == ("top", "1e-05", "first_order", "all")
    )
    assert best["r2"] == pytest.approx(result.r2("first_order", 1e-5)) and best["n"] == 4 * 3 * 2 * 2
    assert result.by("horizon", "layer", n_resamples=5)["n"].min() > 0
    axes = result.figure().axes[0]
    assert [line.get_text() for line in axes.get_legend().get_texts()] == [
        *(p.replace("_", " ") for p in PREDICTORS),
        "shuffled",
    ]
    again = LogitShiftResult.from_json(result.to_json(tmp_path / "logits.json"))
    assert again.r2("norm_exact", 0.3) == pytest.approx(result.r2("norm_exact", 0.3), rel=1e-9)
    assert LogitShiftConfig.from_dict(again.config) == CONFIG
    with pytest.raises(KeyError, match="there are predictors"):
        result.r2("second_order", 0.3)
    with pytest.raises(KeyError, match="no column 'heads'"):
        result.by("heads")


def test_float32_and_float64_agree_and_the_model_is_left_alone():
    model, sae, tokens, result = studied()
    single, small = model.float(), sae.float()
    try:
        assert in_float64(single).dtype == torch.float64 and single.dtype == torch.float32
        for double in (True, False):
            config = replace(CONFIG, fractions=(0.3,), double=double, predictors=("first_order",))
            again = logit_shift(single, small, tokens, layer=LAYER, head=HEAD, config=config)
            mine = result.table[result.table["size"] == "0.3"]
            close = again.table[again.table["size"] == "0.3"]
            assert np.allclose(close["measured"], mine["measured"], atol=1e-3)
            assert single.dtype == torch.float32
    finally:
        model.double(), sae.double()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"cells": ((5, 0),)}, IndexError, r"no cell \(5, 0\)"),
        ({"cells": ((1, 4),)}, IndexError, "heads 0 to 3"),
        ({"horizons": (0, 40)}, ValueError, "24 tokens; this experiment needs at least 49"),
        ({"tail_rank": 30}, ValueError, "vocabulary has 29"),
        ({"atoms": (11,), "first_position": 20}, ValueError, "no listed atom fires"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_runs(changes, error, words):
    model, sae, tokens = cell()
    with pytest.raises(error, match=words):
        logit_shift(model, sae, tokens, layer=LAYER, head=HEAD, config=replace(CONFIG, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"predictors": ("second",)}, "among three_factor"),
        ({"tail_rank": 2}, "behind the top 2"),
        ({"horizons": ()}, "horizons"),
        ({"fractions": (0.0,)}, "fractions"),
        ({"total": 0}, "total"),
        ({"cells": ()}, "pairs"),
        ({"cells": ((1, 2, 3),)}, "pairs"),
    ],
)
def test_a_config_that_makes_no_sense(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(CONFIG, **changes)
