"""Readers against plain full passes, in float64, on every rule and the hybrid; and a planted reader."""

import numpy as np
import pandas as pd
import pytest
import torch

from hooked_recurrent import WriteEdit
from tests.hooked_recurrent.models import HYBRID, RULES
from tests.writesae.evaluation.cells_for_tests import HEAD, cell
from writesae.evaluation.acting.readers import ReadersConfig, later_heads, readers, relative_change
from writesae.evaluation.acting.readers_result import ReadersResult
from writesae.evaluation.describing.contexts import atom_coefficients
from writesae.evaluation.firings import encode_cell

pytestmark = pytest.mark.shapes_on_one_rule

CONFIG = ReadersConfig(count=2, per_atom=3, horizon=2, first_position=2, seed=4)
STUDIES = {}


def study(layer_types, config=CONFIG):
    if (layer_types, config) not in STUDIES:
        model, sae, tokens = cell(layer_types, layer=0, passages=3, length=12)
        model.requires_grad_(False)
        result = readers(model, sae, tokens, layer=0, head=HEAD, config=config)
        STUDIES[layer_types, config] = (model, sae, tokens, result)
    return STUDIES[layer_types, config]


@pytest.mark.parametrize("layer_types", [*((rule, rule) for rule in RULES), HYBRID], ids=[*RULES, "hybrid"])
def test_every_change_equals_a_full_pass(layer_types):
    model, sae, tokens, result = study(layer_types)
    hooks = later_heads(model, 0)
    assert set(result.table["layer"]) == set(range(1, len(layer_types)))
    assert result.floor() < 1e-10
    _, plain = model.run_with_cache(tokens, names_filter=list(hooks))
    rows, got = result.table[result.table["kind"] != "native"], {}
    keep = [(name, lambda z, hook: got.update({hook.name: z.clone()})) for name in hooks]
    for (passage, t), mine in list(rows.groupby(["passage", "position"]))[:3]:
        got.clear()
        edit = WriteEdit(0, HEAD, int(t), "delete")
        model.run_with_hooks(tokens[int(passage)][None], fwd_hooks=keep, edits=[edit])
        for name, layer in hooks.items():
            after, before = got[name][0, t : t + 3], plain[name][passage, t : t + 3]
            for head in range(4):
                expected = float((after - before)[:, head].norm() / before[:, head].norm())
                found = mine[(mine["layer"] == layer) & (mine["head"] == head)]["change"].to_numpy()
                assert np.allclose(found, expected, rtol=1e-7) and expected > 1e-12


def test_controls_are_silent_near_in_norm_and_of_the_same_passage():
    model, sae, tokens, result = study(("gated_delta_net",) * 2)
    writes = encode_cell(model, sae, tokens, 0, HEAD)
    wide = result.table.groupby(["pair", "kind"])[["atom", "passage", "position", "write_norm"]].first().unstack()
    for _, pair in wide.iterrows():
        atom, passage = int(pair["atom", "firing"]), int(pair["passage", "firing"])
        coefficients = atom_coefficients(writes, atom)[passage]
        assert pair["passage", "control"] == passage
        assert coefficients[int(pair["position", "firing"])] > 0 == coefficients[int(pair["position", "control"])]
        assert 2 <= pair["position", "control"] <= 9 and pair["position", "native"] == pair["position", "firing"]
        assert pair["write_norm", "control"] == pytest.approx(
            float(writes.norms[passage, int(pair["position", "control"])])
        )
    first = wide.groupby(wide["passage", "firing"]).head(1)  # nothing was used up yet
    for _, pair in first[first["atom", "firing"] == first["atom", "firing"].min()].iterrows():
        passage, norm = int(pair["passage", "firing"]), pair["write_norm", "firing"]
        silent = (atom_coefficients(writes, int(pair["atom", "firing"]))[passage] == 0).nonzero()[:, 0]
        silent = silent[(silent >= 2) & (silent <= 9)]
        best = (writes.norms[passage, silent].log() - np.log(norm)).abs().min()
        assert abs(np.log(pair["write_norm", "control"] / norm)) == pytest.approx(float(best))


def test_an_atom_has_the_same_rows_in_any_company():
    model, sae, tokens, result = study(("mamba2",) * 2)
    atom = int(result.table["atom"].max())
    config = ReadersConfig(**{**CONFIG.to_dict(), "atoms": (atom,)})
    alone = readers(model, sae, tokens, layer=0, head=HEAD, config=config).table
    mine = result.table[result.table["atom"] == atom].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, mine, rtol=1e-9)


def planted(ratios, passages=8):
    """A result whose reader L1H{h} changes ratios[h] times as much at firings as at controls."""
    rows = []
    for pair in range(2 * passages):
        for head, ratio in enumerate(ratios):
            noise = 1 + 0.02 * ((pair * 7 + head * 3) % 5 - 2)
            for kind, change in (("firing", 0.1 * ratio * noise), ("control", 0.1), ("native", 1e-9)):
                shared = {"pair": pair, "kind": kind, "atom": 5, "passage": pair // 2, "position": 9 + pair}
                rows.append({**shared, "write_norm": 2.0, "layer": 1, "head": head, "change": change})
    return ReadersResult(pd.DataFrame(rows), 0, 2, CONFIG.to_dict())


def test_a_planted_reader_is_found():
    rows = [row for row in planted([1.0, 4.0, 1.0, 0.5]).summary(n_resamples=200) if row["atom"] == 5]
    assert [row["reader"] for row in rows][0] == "L1H1" and rows[-1]["reader"] == "L1H3"
    best = rows[0]
    assert best["ratio"] == pytest.approx(4, rel=0.03) and best["ratio_interval"][0] > 3.8
    assert best["specificity"] == pytest.approx(4 / 2**0.25, rel=0.03)  # the geometric mean of 1, 4, 1, 1/2
    for name in ("ratio", "specificity"):
        adjusted = best[f"holm_{name}"]
        assert adjusted == pytest.approx(4 * best[f"p_{name}"]) and adjusted < 0.05
    assert 2.9 < best["specificity_interval"][0] < best["specificity"] < best["specificity_interval"][1] < 4
    assert (best["n"], best["n_passages"], best["norm_ratio"], best["floor"]) == (16, 8, 1.0, 1e-9)
    flat = planted([2.0, 2.0]).summary(n_resamples=50)
    assert all(row["specificity"] == pytest.approx(1, abs=0.05) for row in flat)


def test_summary_keeps_the_strongest_and_the_result_travels(tmp_path):
    result = study(("rwkv7",) * 2)[3]
    back = ReadersResult.from_json(result.to_json(tmp_path / "readers.json"))
    pd.testing.assert_frame_equal(back.table, result.table)
    rows = back.summary(strongest=2, n_resamples=20)
    assert [row["atom"] for row in rows].count("all") == 2 and len(rows) == 2 * 3
    assert result.figure().axes[0].get_ylabel() == "atom"


def test_relative_change_counts_all_positions_and_coordinates():
    before = torch.tensor([[[3.0, 0.0]], [[0.0, 4.0]]])
    assert relative_change(before + torch.tensor([0.0, 0.5]), before).tolist() == pytest.approx([0.5**0.5 / 5])
    assert relative_change(before * 0, before * 0).tolist() == [0.0]


def test_bad_studies():
    model, sae, tokens, _ = study(("gated_delta_net",) * 2)
    with pytest.raises(ValueError, match="layer 1 is the last of 2: no head lies above it"):
        readers(model, sae, tokens, layer=1, head=HEAD, config=CONFIG)
    with pytest.raises(ValueError, match="passages have 4 tokens; this test needs at least 5"):
        readers(model, sae, tokens[:, :4], layer=0, head=HEAD, config=CONFIG)
    with pytest.raises(ValueError, match="did you mean 'net'"):
        ReadersConfig(form="nte")
