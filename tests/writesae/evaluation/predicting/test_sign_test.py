"""The sign test: measured against plain full passes, predictions against small edits, in float64, on every rule."""

import numpy as np
import pandas as pd
import pytest
import torch

from hooked_recurrent import WriteEdit
from tests.hooked_recurrent.models import RULES
from tests.writesae.evaluation.cells_for_tests import HEAD, LAYER, cell
from writesae.evaluation.installing.install_directions import unembedding_values
from writesae.evaluation.predicting.sign_test import KEYS, SignTestConfig, SignTestResult, _agreement, sign_test

pytestmark = pytest.mark.shapes_on_one_rule


def tried(rule, layer=0, **changed):
    model, sae, tokens = cell((rule, rule), layer=layer)
    config = SignTestConfig(**{"total": 6, "per_position": 2, "seed": 3, **changed})
    return model, tokens, sign_test(model, sae, tokens, layer=layer, head=HEAD, config=config)


@pytest.mark.parametrize("rule", RULES)
def test_small_edits_do_what_first_order_says(rule):
    model, tokens, result = tried(rule, magnitude=1e-5)
    table = result.table
    assert len(table) == 6 * len(KEYS)
    assert np.allclose(table["delta_logprob"], table["first_order"], rtol=1e-3, atol=1e-11)
    assert table["first_order"].abs().max() > 1e-8
    first = next(row for row in result.summary(50) if (row["key"], row["predictor"]) == ("all", "first_order"))
    assert first["r2"] > 0.999
    assert first["sign_agreement"] > 0.9


@pytest.mark.parametrize("rule", RULES)
def test_measured_equals_a_plain_full_pass(rule):
    model, tokens, result = tried(rule, magnitude=2.0)
    row = next(result.table[result.table["key"] == "native_key"].itertuples())
    text = tokens[row.passage : row.passage + 1, : row.position + 2]
    plain, cache = model.run_with_cache(text)
    key, value = (cache[f"blocks.0.mixer.hook_write_{side}"][0, row.position, HEAD] for side in ("key", "value"))
    direction = unembedding_values(model, torch.tensor([row.target]), ((0, HEAD),))[0]
    norm = 2.0 * key.norm() * value.norm()
    assert row.norm == pytest.approx(norm.item())
    edit = WriteEdit(0, HEAD, row.position, "add", key / key.norm(), norm * direction, reading="cache")
    with torch.no_grad():
        after = model.run_with_hooks(text, edits=[edit])[0, -1]
    change = after.log_softmax(-1) - plain[0, -1].log_softmax(-1)
    assert row.delta_logprob == pytest.approx(change[row.target].item(), abs=1e-11)
    decay = cache["blocks.0.mixer.hook_log_decay"][0, row.position + 1, HEAD].exp()
    match = (decay * key / key.norm()) @ cache["blocks.0.mixer.hook_query"][0, row.position + 1, HEAD]
    written = model.blocks[0].W_O[HEAD].T @ (norm * direction)
    assert row.product == pytest.approx((match * (written @ model.W_U[:, row.target])).item(), rel=1e-9)


def test_agreement_by_hand():
    measured, predicted = np.array([1.0, -2.0, 3.0, 0.0]), np.array([2.0, -2.0, -1.0, 1.0])
    found = _agreement(measured, predicted, pd.Series([0, 0, 1, 1]), 50)
    assert found["sign_agreement"] == 0.5
    assert found["median_ratio"] == 0.25
    total = ((measured - 0.5) ** 2).sum()
    assert found["r2"] == pytest.approx(1 - (1 + 0 + 16 + 1) / total)


def test_result_goes_through_json(tmp_path):
    model, tokens, result = tried("gated_delta_net", total=5)
    assert len(result.table) == 5 * len(KEYS)
    again = SignTestResult.from_json(result.to_json(tmp_path / "signs.json"))
    assert again.table.shape == result.table.shape
    assert len(result.figure().axes) == 2
    assert tried("gated_delta_net", total=5)[2].table.equals(result.table)


def test_refusals():
    model, sae, tokens = cell()
    with pytest.raises(ValueError, match="needs at least 10"):
        sign_test(model, sae, tokens[:, :9], layer=LAYER, head=HEAD)
    with pytest.raises(ValueError, match="total must be greater than 0"):
        SignTestConfig(total=0)
