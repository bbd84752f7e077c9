"""The predicted change of the logits against the "in_layer" predictor, firing by firing, and its extremes against sorting."""

import pytest
import torch

from hooked_recurrent.patching.forks import Trunk
from tests.hooked_recurrent.models import distance, over_stacks, tiny_model
from tests.writesae.evaluation.cells_for_tests import HEAD, cell
from writesae.browser.readout import Sampled, atoms_read, extreme_tokens, mean_change
from writesae.evaluation.predicting.logit_shift_context import Context
from writesae.evaluation.predicting.logit_shift_predictors import Added, predict

FIRINGS = [(0, 0, 5, 0.7), (3, 0, 9, 1.3), (3, 1, 2, 0.4), (3, 2, 11, 2.0)]  # atom, passage, position, coefficient


def sampled(rows):
    columns = zip(*rows, strict=True)
    atom, passage, position = (torch.tensor(next(columns)) for _ in range(3))
    return Sampled(atom, passage, position, torch.tensor(next(columns), dtype=torch.float64))


@over_stacks
def test_the_mean_change_is_that_of_the_in_layer_predictor(layer_types):
    layer = tiny_model(layer_types).cfg.recurrent_layers[-1]
    model, sae, tokens = cell(layer_types, layer=layer)
    model.requires_grad_(False)
    made = mean_change(model, sae, tokens, sampled(FIRINGS), layer=layer, head=HEAD) @ model.W_U.double()
    expected = {0: [], 3: []}
    for atom, passage, position, coefficient in FIRINGS:
        trunk = Trunk.grow(model, tokens[passage : passage + 1], [position])
        context = Context.run(model, trunk, position, [layer], horizons=(0,), top=28, tail_rank=29)
        added = Added(coefficient * sae.key_atoms[None, atom].detach(), sae.value_atoms[None, atom].detach())
        shift = torch.zeros(29, dtype=torch.float64)
        shift[context.targets.token] = predict(context, (layer, HEAD), added, ("in_layer",))["in_layer"][0]
        expected[atom].append(shift)
    for atom, shifts in expected.items():
        assert distance(made[atom], torch.stack(shifts).mean(0)) < 1e-9
    assert (made[[1, 2, *range(4, 12)]] == 0).all()


def test_more_firings_than_fit_at_once_give_the_same_mean(monkeypatch):
    model, sae, tokens = cell()
    whole = mean_change(model, sae, tokens, sampled(FIRINGS), layer=1, head=HEAD)
    told = []
    monkeypatch.setattr("writesae.browser.readout._FIRINGS", 1)
    monkeypatch.setattr("writesae.browser.readout._PASSAGES", 2)
    parts = mean_change(
        model, sae, tokens, sampled(FIRINGS), layer=1, head=HEAD, on_progress=lambda *of: told.append(of)
    )
    assert distance(parts, whole) < 1e-12 and told == [(2, 3), (3, 3)]


@pytest.mark.parametrize("kind", [{"rank": 2}, {"decoder": "dense"}, {}])
def test_a_query_reads_the_atom_as_the_matrix_that_it_is(kind):
    _, sae, _ = cell(**kind)
    query = torch.randn(4, 3, dtype=torch.float64)
    atoms = torch.tensor([0, 3, 3, 7])
    expected = torch.stack([sae.decoder.matrices()[atom].T @ one for atom, one in zip(atoms, query, strict=True)])
    assert distance(atoms_read(sae, atoms, query), expected) < 1e-12


def test_extremes_are_relative_to_the_mean_token_and_sorted(monkeypatch):
    monkeypatch.setattr("writesae.browser.readout._LOGITS_AT_ONCE", 100)
    change, unembedding = torch.randn(7, 12, dtype=torch.float64), torch.randn(12, 29, dtype=torch.float64)
    logits = change @ unembedding
    logits = logits - logits.mean(1, keepdim=True)
    blocks = list(extreme_tokens(change, unembedding, 4))
    up, by, down, less = (torch.cat(part) for part in zip(*blocks, strict=True))
    order = logits.argsort(dim=1)
    assert len(blocks) == 3 and torch.equal(up, order.flip(1)[:, :4]) and torch.equal(down, order[:, :4])
    assert torch.allclose(by, logits.gather(1, up)) and torch.allclose(less, logits.gather(1, down))
