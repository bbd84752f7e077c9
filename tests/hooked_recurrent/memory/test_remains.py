"""Retention against explicit products of transitions, for every rule."""

import math

import pytest
import torch
from hypothesis import given

from hooked_recurrent import Factors, WriteEdit
from hooked_recurrent.memory import retention
from tests.hooked_recurrent.memory.runs import EXACT, LAYER, cache_of, product, runs, vectors
from tests.hooked_recurrent.models import RULES, distance, random_factors

pytestmark = pytest.mark.shapes_on_one_rule


def by_hand(factors, positions):
    """remaining and cosine from T(t<-s) k_s, [batch, head, pos, write_pos, (term)]."""
    terms = tuple(factors.write_key.shape[3:-1])
    batch, length, heads, _ = factors.query.shape
    remaining = torch.zeros(batch, heads, length, len(positions), *terms, dtype=torch.float64)
    cosine = remaining.clone()
    for column, s in enumerate(positions):
        key = factors.write_key[:, s]
        for t in range(s, length):
            left = torch.einsum("bhij,bh...j->bh...i", product(factors, t, s), key)
            remaining[:, :, t, column] = (left.norm(dim=-1) / key.norm(dim=-1)).nan_to_num()
            cosine[:, :, t, column] = torch.cosine_similarity(left, key, dim=-1, eps=1e-300)
    return remaining, cosine


def check(source, layer, factors, positions):
    result = retention(source, layer, positions=positions)
    chosen = [position % factors.length for position in positions]
    assert result.positions == tuple(chosen)
    for got, expected in zip((result.remaining, result.cosine), by_hand(factors, chosen), strict=True):
        assert got.shape == expected.shape
        assert distance(got, expected) <= EXACT


@pytest.mark.parametrize("rule", RULES)
@given(runs)
def test_what_is_left_is_the_product_of_the_transitions(rule, values):
    cache = cache_of(rule, **(values | {"length": min(values["length"], 10)}))
    factors = cache.factors(LAYER)
    check(cache, LAYER, factors, list(range(0, factors.length, 3)) + [-1])


@pytest.mark.parametrize("edit", ["delete", "net delete", "replace", "add"])
@pytest.mark.parametrize("rule", RULES)
def test_edited_runs(rule, edit):
    sides = vectors(7) if edit in ("replace", "add") else {}
    form = "net" if edit == "net delete" else "additive"
    change = WriteEdit(LAYER, 1, slice(2, 5), edit.split()[-1], form=form, **sides)
    cache = cache_of(rule, edits=[change], before=3)
    check(cache, LAYER, cache.factors(LAYER), [0, 4, 1])


@pytest.mark.parametrize("terms", [None, 2])
@pytest.mark.parametrize("erase", ["none", "decoupled"])
@pytest.mark.parametrize("vector_decay", [False, True])
def test_bare_factors(erase, vector_decay, terms):
    factors = random_factors(6, erase=erase, vector_decay=vector_decay, terms=terms)
    check(factors, None, factors, [0, 3])


@pytest.mark.parametrize("rule", RULES)
def test_a_write_starts_whole_and_is_nothing_before(rule):
    result = retention(cache_of(rule), LAYER)
    for values in (result.remaining, result.cosine):
        assert (values.triu(1) == 0).all()
        assert distance(values.diagonal(dim1=2, dim2=3), torch.ones(2, 4, 9, dtype=torch.float64)) <= 1e-12


def test_a_write_may_be_asked_for_twice():
    factors = random_factors(5, erase="decoupled", terms=2)
    once, twice = retention(factors, positions=2), retention(factors, positions=[2, 2, -3])
    assert torch.equal(twice.remaining, once.remaining.expand(-1, -1, -1, 3, -1))


def test_decay_alone_shortens_and_an_erase_of_the_same_key_takes_all():
    """Two positions by hand: a half is left after one decay of 1/2; a full delta step on the same key leaves nothing."""
    key = torch.tensor([3.0, 4.0]).double()
    unit = key / 5
    keys = torch.stack([key, key])[None, :, None]
    half = torch.full((1, 2, 1), math.log(0.5), dtype=torch.float64)
    value = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    decaying = Factors(half, keys, value, keys)
    result = retention(decaying, positions=0)
    assert result.remaining[0, 0, :, 0].tolist() == pytest.approx([1.0, 0.5])
    assert result.cosine[0, 0, :, 0].tolist() == pytest.approx([1.0, 1.0])
    probe = torch.stack([unit, unit])[None, :, None]
    erasing = Factors(half * 0, keys, value, keys, erase=-probe, probe=probe)
    assert retention(erasing, positions=0).remaining[0, 0, 1, 0].item() == pytest.approx(0.0, abs=1e-15)


def test_what_is_left_is_measured_where_its_square_would_be_lost():
    """Fifty steps of e^-1.5 leave 1e-32: in float32 its square is 0, its length is not."""
    key = torch.tensor([0.6, 0.8]).expand(1, 51, 1, 2).contiguous()
    factors = Factors(torch.full((1, 51, 1), -1.5), key, torch.ones(1, 51, 1, 1), key)
    result = retention(factors, positions=0)
    expected = torch.exp(-1.5 * torch.arange(51).double())
    assert ((result.remaining[0, 0, :, 0].double() / expected - 1).abs() <= 1e-5).all()
    assert ((result.cosine - 1).abs() <= 1e-6).all()


def test_a_write_without_a_key_leaves_nothing():
    factors = random_factors(4)
    factors.write_key[:, 1] = 0.0
    result = retention(factors, positions=[1, 2])
    for values in (result.remaining, result.cosine):
        assert (values[..., 0] == 0).all() and (values[:, :, 3, 1] != 0).all()


def test_the_table_has_a_row_per_write_and_later_position():
    result = retention(cache_of("rwkv7", length=5), LAYER, 2, positions=[3, 1])
    table = result.to_dataframe()
    assert list(table) == ["batch", "head", "pos", "write_pos", "remaining", "cosine"]
    assert len(table) == 2 * (2 + 4) and set(table["head"]) == {2}
    row = table.query("batch == 0 and pos == 4 and write_pos == 1")
    assert row.remaining.item() == result.remaining[0, 0, 4, 1] and row.cosine.item() == result.cosine[0, 0, 4, 1]
