"""The search against asking about every edit by itself."""

import pytest
import torch

from hooked_recurrent import WriteEdit
from tests.hooked_recurrent.models import HYBRID, RULES
from tests.writesae.evaluation.cells_for_tests import cell
from writesae.evaluation.predicting.logit_search import strongest_edits

STACKS = [*[(rule, rule) for rule in RULES], HYBRID]


@pytest.mark.parametrize("layer_types", STACKS, ids="-".join)
def test_the_best_are_the_best_and_move_the_logit_as_predicted(layer_types):
    model, sae, tokens = cell(layer_types, layer=0, rank=2)
    table = strongest_edits(model, sae, tokens[:1], 7, position=12, count=15, amplitude=1e-5)
    assert len(table) == 15 and (table["per_unit"].abs().diff().dropna() <= 0).all()
    assert (table["position"] <= 12).all() and not table.duplicated(["layer", "head", "position", "atom"]).any()
    assert (table["measured"] > 0).all()
    assert ((table["measured"] - table["predicted"]).abs() < 1e-2 * table["predicted"]).all()


def test_nothing_stronger_was_missed():
    """Every atom, position and cell, by the derivative along each; the search goes in blocks of positions."""
    model, sae, tokens = cell(passages=1, length=40)
    cells, first, at, target = [(0, 1)], 3, 36, 11
    table = strongest_edits(
        model, sae, tokens, target, position=at, cells=cells, first_position=first, count=5000, amplitude=1e-6
    )
    assert len(table) == (at - first + 1) * 12
    _, cache = model.run_with_cache(tokens, incl_bwd=True, metric=lambda made: made[0, at, target])
    norms = sae.atom_norms().detach()
    for row in table.iloc[::97].itertuples():
        key, value = sae.key_atoms[row.atom, 0].detach(), sae.value_atoms[row.atom, 0].detach()
        effect = key @ cache.write_grad(row.layer, row.head, row.position)[0] @ value / norms[row.atom]
        assert float(effect) == pytest.approx(row.per_unit, rel=1e-9, abs=1e-12)
    row = table.iloc[0]
    layer, head, position, atom = (int(row[name]) for name in ("layer", "head", "position", "atom"))
    key, value = sae.key_atoms[atom, 0].detach(), sae.value_atoms[atom, 0].detach()
    edit = WriteEdit(layer, head, position, "add", key, value * (1e-6 * row["sign"] / float(norms[atom])))
    shift = (model(tokens, edits=[edit]) - model(tokens))[0, at, target]
    assert float(shift.detach()) == pytest.approx(row["measured"], rel=1e-4)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"target": 29}, IndexError, "target 29"),
        ({"position": 24}, IndexError, "24 tokens"),
        ({"first_position": 9, "position": 8}, IndexError, "positions 9 to 8"),
        ({"cells": [(1, 9)]}, IndexError, "no cell"),
    ],
)
def test_what_does_not_exist_is_said(given, error, words):
    model, sae, tokens = cell()
    with pytest.raises(error, match=words):
        strongest_edits(model, sae, tokens[:1], **{"target": 3, **given})


def test_one_text_and_fitting_atoms_are_asked_for():
    model, sae, tokens = cell()
    with pytest.raises(ValueError, match="one text, got 3"):
        strongest_edits(model, sae, tokens, 3)
    with pytest.raises(ValueError, match="dense"):
        strongest_edits(model, cell(decoder="dense")[1], tokens[:1], 3)
    assert torch.is_grad_enabled()
