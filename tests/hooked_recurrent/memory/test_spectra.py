"""The spectrum of the states, against the states themselves; ranks on matrices whose ranks are known."""

import math

import pytest
import torch
from hypothesis import given

from hooked_recurrent.memory import Spectrum, spectrum
from hooked_recurrent.scan.step import step_scan
from tests.hooked_recurrent.memory.runs import EXACT, LAYER, cache_of, model_of, runs
from tests.hooked_recurrent.models import RULES, distance, random_factors, random_state, tokens_of

pytestmark = pytest.mark.shapes_on_one_rule


def spectrum_of(*rows):
    values = torch.tensor(rows, dtype=torch.float64)[None, None]
    return Spectrum((0,), tuple(range(len(rows))), values)


@pytest.mark.parametrize("rule", RULES)
@given(runs)
def test_singular_values_are_those_of_the_states(rule, values):
    cache = cache_of(rule, **(values | {"length": min(values["length"], 12)}))
    states = cache.state(LAYER, slice(None), slice(None)).transpose(1, 2)
    result = spectrum(cache, LAYER)
    assert result.singular_values.shape == (2, 4, states.shape[2], 3)
    assert distance(result.singular_values, torch.linalg.svdvals(states)) <= EXACT
    assert distance(result.norm(), states.flatten(3).norm(dim=-1)) <= EXACT


@pytest.mark.parametrize("rule", RULES)
def test_singular_values_are_those_of_the_state_hook(rule):
    model = model_of(rule)
    tokens, name = tokens_of(model), f"blocks.{LAYER}.mixer.hook_state"
    _, states = model.run_with_cache(tokens, names_filter=name)
    _, cache = model.run_with_cache(tokens)
    result = spectrum(cache, LAYER, [2, 0], positions=[7, -1, 3])
    assert (result.heads, result.positions) == ((2, 0), (7, 11, 3))
    expected = states[name].transpose(1, 2)[:, [2, 0]][:, :, [7, 11, 3]]
    assert distance(result.singular_values, torch.linalg.svdvals(expected)) <= EXACT


def test_bare_factors_and_a_state_before_them():
    factors = random_factors(6, erase="tied")
    state = random_state(factors)
    result = spectrum(factors, heads=1, positions=-1, initial_state=state)
    _, last = step_scan(factors, state)
    assert distance(result.singular_values[:, 0, 0], torch.linalg.svdvals(last[:, 1])) <= EXACT


def test_ranks_of_known_spectra():
    """Three equal directions count as 3 by every measure; one direction as 1; nothing as 0."""
    found = spectrum_of([2.0, 2.0, 2.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1e-200, 1e-200, 0.0])
    for ranks in (found.effective_rank(), found.effective_rank(power=1.0), found.stable_rank()):
        assert ranks[0, 0].tolist() == pytest.approx([3.0, 1.0, 0.0, 2.0])


def test_ranks_follow_their_definitions():
    found = spectrum_of([3.0, 1.0, 0.0])
    assert found.stable_rank().item() == pytest.approx(10 / 9)
    squared = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    plain = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found.effective_rank().item() == pytest.approx(math.exp(squared))
    assert found.effective_rank(power=1.0).item() == pytest.approx(math.exp(plain))
    with pytest.raises(ValueError, match="power of the singular values must be above 0, got 0.0"):
        found.effective_rank(power=0.0)


@pytest.mark.parametrize("rule", RULES)
@given(runs)
def test_ranks_are_ordered(rule, values):
    """Stable rank <= effective rank of the squares <= Roy and Vetterli's <= min(d_k, d_v)."""
    result = spectrum(cache_of(rule, **(values | {"length": min(values["length"], 6)})), LAYER)
    ranks = [result.stable_rank(), result.effective_rank(), result.effective_rank(power=1.0)]
    for low, high in zip(ranks, [*ranks[1:], torch.full_like(ranks[0], 3.0)], strict=True):
        assert (low <= high + 1e-9).all()


def test_the_table_has_a_row_per_state():
    result = spectrum(cache_of("mamba2"), LAYER, [1, 3], positions=[8, 2])
    table = result.to_dataframe()
    assert list(table) == ["batch", "head", "pos", "norm", "effective_rank", "roy_vetterli_rank", "stable_rank"]
    assert len(table) == 2 * 2 * 2
    row = table.query("batch == 1 and head == 3 and pos == 2")
    assert row.norm.item() == result.norm()[1, 1, 1]
    assert row.stable_rank.item() == result.stable_rank()[1, 1, 1]
