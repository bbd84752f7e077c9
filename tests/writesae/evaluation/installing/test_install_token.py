"""The writes that install one token: where they stand, how long they are, and that full passes with them get further."""

import pytest
import torch

from hooked_recurrent.edits import WriteEdit
from tests.hooked_recurrent.models import HYBRID, RULES
from tests.writesae.evaluation.cells_for_tests import HEAD, LAYER, cell
from writesae.evaluate import install_token
from writesae.evaluation.installing.install_lambda import objective

pytestmark = pytest.mark.shapes_on_one_rule

TARGET, STEPS = 11, 4
SMALL = {"new_tokens": STEPS, "candidates": 3, "rounds": 4}
over_rules = pytest.mark.parametrize("rule", RULES)


def opened(layer_types, layer=LAYER):
    model, _, tokens = cell(layer_types, layer)
    return model, tokens[:1, :10]


@torch.no_grad()
def reached(model, prompt, edits):
    """The objective of a whole plain pass over prompt and untouched continuation, with the edits."""
    text = model.generate(prompt, STEPS, stop_at_eos=False)
    logits = model(text[:, :-1], edits=edits)[:, prompt.shape[1] - 1 :]
    return objective(logits, torch.tensor([TARGET]), "greedy").item()


def unrefined(model, prompt, magnitude):
    """The steepest writes of the cell by their definition: the top singular pairs of the gradient of the objective."""
    text = model.generate(prompt, STEPS, stop_at_eos=False)[:, :-1]
    end, wanted = prompt.shape[1], torch.tensor([TARGET])
    _, cache = model.run_with_cache(
        text, incl_bwd=True, metric=lambda made: objective(made[:, end - 1 :], wanted, "greedy").sum()
    )
    edits = []
    for place in range(end - 3, end):
        left, _, right = torch.linalg.svd(cache.write_grad(LAYER, HEAD, place)[0])
        norm = cache.write(LAYER, HEAD, place).AB[0].norm() * magnitude
        edits.append(WriteEdit(LAYER, HEAD, place, "add", left[:, 0], norm * right[0]))
    return edits


@over_rules
def test_installed_writes_get_further_than_the_steepest(rule):
    model, prompt = opened((rule, rule))
    given = install_token(model, prompt, TARGET, cell=(LAYER, HEAD), magnitude=2.0, **SMALL)
    start = unrefined(model, prompt, 2.0)
    assert [(edit.layer, edit.head, edit.position, edit.op) for edit in given] == [
        (edit.layer, edit.head, edit.position, "add") for edit in start
    ]
    norms = [[torch.outer(edit.key, edit.value).norm() for edit in edits] for edits in (given, start)]
    assert torch.allclose(*map(torch.tensor, norms))
    assert reached(model, prompt, given) > reached(model, prompt, start)


def test_the_cell_is_the_one_in_which_most_is_reached():
    model, prompt = opened(("gated_delta_net",) * 2)
    everywhere = {
        (layer, head): reached(
            model, prompt, install_token(model, prompt, TARGET, cell=(layer, head), new_tokens=STEPS, rounds=2)
        )
        for layer in model.cfg.recurrent_layers
        for head in range(model.cfg.n_heads)
    }
    found = install_token(model, prompt, TARGET, new_tokens=STEPS, candidates=len(everywhere), rounds=4)
    assert {(edit.layer, edit.head) for edit in found} == {max(everywhere, key=everywhere.get)}


def test_a_hybrid_is_written_to_where_it_recurs_and_a_little_more_gets_a_little_further():
    model, prompt = opened(HYBRID, layer=0)
    small, large = (install_token(model, prompt, TARGET, magnitude=size, **SMALL) for size in (0.01, 0.05))
    assert {edit.layer for edit in small + large} <= set(model.cfg.recurrent_layers)
    assert reached(model, prompt, large) > reached(model, prompt, small) > reached(model, prompt, [])


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (ValueError, "one prompt of at least 3 tokens, got 1 of 2", {"tokens": torch.zeros(1, 2, dtype=torch.long)}),
        (ValueError, "got 2 of 9", {"tokens": torch.zeros(2, 9, dtype=torch.long)}),
        (IndexError, "target 10000 is out of range: the vocabulary has", {"target": 10_000}),
        (IndexError, r"no cell \(0, 9\): the recurrent layers are .* with heads 0 to 3", {"cell": (0, 9)}),
        (IndexError, r"no cell \(7, 0\)", {"cell": (7, 0)}),
        (ValueError, "magnitude must be greater than 0", {"magnitude": 0.0}),
        (ValueError, "rounds must be greater than 0", {"rounds": 0}),
    ],
)
def test_wrong_input_is_refused_before_anything_runs(error, words, changes, monkeypatch):
    model, prompt = opened(("gated_delta_net",) * 2)
    monkeypatch.setattr(type(model), "generate", lambda *given, **more: pytest.fail("the model ran"))
    with pytest.raises(error, match=words):
        install_token(model, **{"tokens": prompt, "target": TARGET, **changes})
