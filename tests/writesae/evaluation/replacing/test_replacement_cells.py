"""The sweep over cells against one replacement test at a time, and its summary by hand."""

import numpy as np
import pytest
import torch

from tests.writesae.evaluation.cells_for_tests import cell
from writesae import WriteSAE, WriteSAEConfig
from writesae.evaluation.replacing.replacement import NoFirings, ReplacementConfig, replacement
from writesae.evaluation.replacing.replacement_cells import CellsResult, find_cells, sweep_cells

CONFIG = ReplacementConfig(per_atom=2, total=5, horizon=2, first_position=2, seed=3, readings=("cache",))


def silent():
    """A dictionary whose codes are all zero."""
    sae = WriteSAE(WriteSAEConfig(d_k=3, d_v=5, n_atoms=12, k=4)).double()
    with torch.no_grad():
        for weight in sae.encoder.parameters():
            weight.zero_()
    return sae


def test_a_sweep_is_a_replacement_per_cell(tmp_path):
    model, sae, tokens = cell(length=12)
    cells = {(1, 2): sae, (0, 1): sae, (1, 3): silent()}
    told, kept = [], []
    result = sweep_cells(
        model, cells, tokens, CONFIG, on_progress=lambda done, total: told.append((done, total)), on_cell=kept.append
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert [(one.layer, one.head) for one in kept] == [(0, 1), (1, 2)]
    rows = result.of("cache")
    assert list(zip(rows["layer"], rows["head"], rows["n"], strict=True)) == [(0, 1, 5), (1, 2, 5), (1, 3, 0)]
    for layer, head in ((0, 1), (1, 2)):
        alone = replacement(model, sae, tokens, layer=layer, head=head, config=CONFIG)
        row = rows[(rows["layer"] == layer) & (rows["head"] == head)].iloc[0]
        assert row["win_rate"] == alone.win_rate("cache")
        assert row["median_kl_delete"] == alone.table["kl_delete"].median()
        assert row["floor_max"] == alone.floor("cache")[1] < 1e-12
    assert (result.layer, result.head) == (-1, -1)
    assert (sweep_cells(model, {(1, 2): sae}, tokens, CONFIG).layer, result.kind) == (1, "replacement_cells")
    again = CellsResult.from_json(result.to_json(tmp_path / "cells.json"))
    assert again.of("cache")["n"].tolist() == [5, 5, 0]
    (axes,) = result.figure().axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.1", "1.2", "1.3"]
    with pytest.raises(KeyError, match="nothing is called"):
        result.of("horizon")


def test_mean_and_spread_count_cells_and_not_firings():
    model, sae, tokens = cell(length=12)
    table = sweep_cells(model, {(1, 2): sae, (1, 3): sae, (0, 0): silent()}, tokens, CONFIG).table
    mine = (table["pool"] == "dominant") & (table["scale"] == "coef")
    table.loc[mine, ["n", "win_rate", "low", "high"]] = [
        [0, np.nan, np.nan, np.nan],
        [30, 0.9, 0.8, 1.0],
        [10, 0.5, 0.4, 0.6],
    ]
    row = next(
        row for row in CellsResult(table, 1, -1, {}).summary() if (row["pool"], row["scale"]) == ("dominant", "coef")
    )
    assert (row["cells"], row["silent_cells"], row["n"], row["worst"]) == (2, 1, 40, "1.3")
    assert row["mean_win_rate"] == pytest.approx(0.7) and row["pooled"] == pytest.approx(0.8)
    assert row["sd_win_rate"] == pytest.approx(0.08**0.5) and row["range"] == [0.5, 0.9]
    assert row["above_half"] == 0.5


def test_what_does_not_fit_is_refused_before_anything_runs():
    model, sae, tokens = cell(length=12)
    done = []
    with pytest.raises(ValueError, match="4 x 4"):
        wrong = WriteSAE(WriteSAEConfig(4, 4, n_atoms=8, k=2))
        sweep_cells(model, {(0, 0): sae, (1, 0): wrong}, tokens, CONFIG, on_progress=lambda *told: done.append(told))
    assert done == []
    with pytest.raises(ValueError, match="got none"):
        sweep_cells(model, {}, tokens, CONFIG)
    with pytest.raises(NoFirings, match="any of the cells"):
        sweep_cells(model, {(0, 0): silent()}, tokens, CONFIG)


def test_a_folder_of_dictionaries_is_read_by_cell(tmp_path):
    sae = silent()
    with pytest.raises(ValueError, match="no dictionary lies"):
        find_cells(tmp_path)
    for name, (layer, head) in {"b": (0, 3), "a": (2, 1)}.items():
        sae.provenance |= {"layer": layer, "head": head}
        sae.save(tmp_path / "sae" / name)
    checkpoint = tmp_path / "checkpoints" / "step-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "sae.safetensors").write_bytes(b"a trainer's own file")
    found = find_cells(tmp_path)
    assert [(cell, path.name) for cell, (path, _) in found.items()] == [((0, 3), "b"), ((2, 1), "a")]
    sae.save(tmp_path / "again")
    with pytest.raises(ValueError, match="two dictionaries are of layer 2, head 1"):
        find_cells(tmp_path)
    sae.provenance["head"] = None
    sae.save(tmp_path / "again")
    with pytest.raises(ValueError, match="does not say which layer and head"):
        find_cells(tmp_path)
