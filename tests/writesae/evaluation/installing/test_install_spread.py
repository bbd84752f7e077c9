"""Writes into many heads at once: one trial, at the norm of one head, equal to a plain full pass."""

import pytest
import torch

from hooked_recurrent import WriteEdit
from tests.hooked_recurrent.models import RULES
from tests.writesae.evaluation.cells_for_tests import HEAD, LAYER, cell
from writesae.evaluation.installing.install import _Trials
from writesae.evaluation.installing.install_context import PLACES, Context, draw_targets
from writesae.evaluation.installing.install_lambda import Climb, at_cells, refine, slope, steepest
from writesae.evaluation.installing.install_measure import measure
from writesae.evaluation.installing.install_token import install_token

pytestmark = pytest.mark.shapes_on_one_rule

GREEDY = Climb("greedy", 3, "in_recurrence", "native")
CELL = (LAYER, HEAD)


def opened(rule):
    model, sae, tokens = cell((rule, rule))
    return model, sae, tokens, Context.open(model, tokens, 1, 9, 5)


@pytest.mark.parametrize("rule", RULES)
def test_cells_written_together_are_one_trial(rule):
    model, _, _, context = opened(rule)
    targets, pair = torch.tensor([3, 11]), ((0, 1), CELL)
    cells = pair * 2
    norms = torch.stack([context.native_norms(layer)[:, head] for layer, head in cells]) * 2.0
    start = slope(model, context, targets, [], GREEDY, [0, LAYER])
    first = steepest(cells, at_cells(start.writes, cells, 2), norms, "native", 2)
    assert len(first) == 2 and torch.allclose(first.norms, norms)
    alone = [
        steepest((one,) * 2, at_cells(start.writes, (one,) * 2), norms[i::2], "native") for i, one in enumerate(pair)
    ]
    batched = [edit for one in alone for edit in one.batched(context.first, "in_recurrence")]
    expected = slope(model, context, targets, batched, GREEDY, [LAYER]).value
    found = slope(model, context, targets, first.batched(context.first, "in_recurrence"), GREEDY, [LAYER]).value
    assert torch.allclose(found, expected)
    reached, value = refine(model, context, targets, first, norms, GREEDY, 4)
    assert torch.allclose(reached.norms, norms)
    assert (value > found).all()
    measured = measure(model, context, reached.single(context.first, "in_recurrence"), targets)
    for trial, target in enumerate(targets.tolist()):
        plain = [
            WriteEdit(*cells[row], 7 + place, "add", reached.key[row, place], reached.value[row, place])
            for row in (2 * trial, 2 * trial + 1)
            for place in range(PLACES)
        ]
        with torch.no_grad():
            after = model.run_with_hooks(context.text[:, :-1], edits=plain)[0, 9:].log_softmax(-1)
        assert measured["logprob"][trial].item() == pytest.approx(after[0, target].item(), abs=1e-10)
    split = steepest(cells, at_cells(start.writes, cells, 2), norms, "singular", 2)
    assert torch.allclose(split.total_norms, first.total_norms)


def test_a_spread_norm_is_that_of_one_cell():
    model, _, tokens, context = opened("rwkv7")
    targets = draw_targets(context, tokens, per_stratum=1, middle=(5, 15), seed=0)
    cells = ((0, 1), CELL, (0, 0), (0, 2)) * len(targets)
    trials = _Trials.of(context, targets, cells, (1.5, 6.0))
    native = torch.stack([context.native_norms(layer)[:, head] for layer, head in trials.cells])
    times = (trials.norms / native).view(2 * len(targets), 4, PLACES).norm(dim=1)
    assert torch.allclose(times, trials.magnitude[:, None].expand(-1, PLACES))


def test_one_token_into_many_heads():
    model, _, tokens, _ = opened("gated_delta_net")
    edits = install_token(model, tokens[:1, :8], 3, spread=4, new_tokens=3, rounds=2)
    assert len(edits) == 4 * PLACES and len({(edit.layer, edit.head) for edit in edits}) == 4
    with pytest.raises(ValueError, match="a cell or a spread"):
        install_token(model, tokens[:1, :8], 3, spread=4, cell=CELL)
