"""Half-lives from log-decays."""

import math

import numpy as np
import pytest
import torch

from hooked_recurrent.memory import HalfLives, half_life
from hooked_recurrent.memory.decay import COLUMNS, half_life_quartiles
from tests.hooked_recurrent.memory.runs import LAYER, cache_of, model_of
from tests.hooked_recurrent.models import RULES, random_factors, tokens_of

HALF = math.log(0.5)


def test_quartiles_of_known_rates():
    rates = HALF * np.array([[1.0, 4.0], [2.0, 4.0], [3.0, 4.0]])
    lower, median, upper, of_mean = half_life_quartiles(rates)
    assert lower == pytest.approx([1 / 2.5, 1 / 4]) and upper == pytest.approx([1 / 1.5, 1 / 4])
    assert median == pytest.approx([1 / 2, 1 / 4]) and of_mean == pytest.approx([1 / 2, 1 / 4])


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_no_decay_is_an_infinite_half_life(zero):
    assert (half_life_quartiles(np.full((3, 2), zero)) == np.inf).all()
    assert (HalfLives(None, (0,), torch.full((1, 3, 1), zero)).per_token() == torch.inf).all()


@pytest.mark.parametrize("rule", RULES)
def test_halves_are_left_after_a_half_life(rule):
    cache = cache_of(rule)
    result = half_life(cache, LAYER, [3, 1])
    log_decay = cache[f"blocks.{LAYER}.mixer.hook_log_decay"][:, :, [3, 1]]
    assert (result.layer, result.heads) == (LAYER, (3, 1))
    assert result.per_token().shape == log_decay.shape
    decays = log_decay < 0
    left = torch.exp(log_decay * result.per_token())[decays]
    assert torch.allclose(left, torch.full_like(left, 0.5), rtol=0, atol=1e-12)
    assert (result.per_token()[~decays] == torch.inf).all()


@pytest.mark.parametrize("vector_decay", [False, True])
def test_the_table_has_a_row_per_head_or_channel(vector_decay):
    factors = random_factors(6, vector_decay=vector_decay)
    table = half_life(factors, heads=[1, 0]).to_dataframe()
    assert list(table) == ["layer", "head", *(["channel"] if vector_decay else []), *COLUMNS]
    assert len(table) == (6 if vector_decay else 2)
    rates = factors.log_decay[:, :, 0, 2] if vector_decay else factors.log_decay[:, :, 0]
    row = table[(table["head"] == 0) & (table.channel == 2)] if vector_decay else table[table["head"] == 0]
    assert row["median"].item() == pytest.approx(HALF / rates.flatten().quantile(0.5).item())
    assert row.of_mean_log_decay.item() == pytest.approx(HALF / rates.mean().item())


def test_only_the_log_decay_need_be_kept():
    model = model_of("mamba2")
    name = f"blocks.{LAYER}.mixer.hook_log_decay"
    tokens = tokens_of(model, batch=1)
    _, cache = model.run_with_cache(tokens, names_filter=name, remove_batch_dim=True)
    assert half_life(cache, LAYER).log_decay.shape == (1, 12, 4)
