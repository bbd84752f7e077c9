"""Effective attention: it puts every read together again, and equals the product of the transitions, for every rule."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given

from hooked_recurrent import WriteEdit
from hooked_recurrent.memory import attention, effective_attention
from hooked_recurrent.scan.step import step_scan
from tests.hooked_recurrent.memory.runs import EXACT, LAYER, cache_of, model_of, product, runs, vectors
from tests.hooked_recurrent.models import RULES, distance, random_factors, random_state, tokens_of

pytestmark = pytest.mark.shapes_on_one_rule

READ = f"blocks.{LAYER}.mixer.hook_read"
EDITS = {
    "native": [],
    "deleted": [WriteEdit(LAYER, 1, 4, "delete", form="net")],
    "replaced": [WriteEdit(LAYER, 2, slice(2, 7), **vectors(3))],
    "added": [WriteEdit(LAYER, 0, 3, "add", **vectors(4)), WriteEdit(LAYER, 3, slice(1, 7), "add", **vectors(5))],
}
over_rules = pytest.mark.parametrize("rule", RULES)


def by_hand(factors):
    """q_t^T T(t<-s) k_s from explicit products, [batch, head, query_pos, write_pos, (term)]."""
    terms = tuple(factors.write_key.shape[3:-1])
    batch, length, heads, _ = factors.query.shape
    out = torch.zeros(batch, heads, length, length, *terms, dtype=torch.float64)
    for t in range(length):
        for s in range(t + 1):
            asked = torch.einsum("bhk,bhkj->bhj", factors.query[:, t], product(factors, t, s))
            out[:, :, t, s] = torch.einsum("bhj,bh...j->bh...", asked, factors.write_key[:, s])
    return out


@over_rules
@given(runs)
def test_the_reads_are_put_together_again(rule, values):
    cache = cache_of(rule, **values)
    result = effective_attention(cache, LAYER)
    assert distance(result.read(), cache[READ]) <= EXACT
    assert (result.from_initial_state is None) == (values["before"] == 0)
    length = values["length"]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    assert (result.coefficient[:, :, future] == 0).all()


@pytest.mark.parametrize("before", [0, 5], ids=["fresh", "continued"])
@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS)
@over_rules
def test_coefficients_are_products_of_transitions(rule, edits, before):
    cache = cache_of(rule, before=before, edits=edits)
    factors = cache.factors(LAYER)
    result = effective_attention(cache, LAYER)
    expected = by_hand(factors)
    assert result.coefficient.shape == expected.shape
    assert distance(result.coefficient, expected) <= EXACT
    if before:
        state = cache.initial_state.layers[LAYER].matrix
        carried = [product(factors, t, -1) @ state for t in range(factors.length)]
        from_initial = torch.einsum("bthk,tbhkv->bthv", factors.query, torch.stack(carried))
        assert distance(result.from_initial_state, from_initial) <= EXACT


@pytest.mark.parametrize("terms", [None, 1, 3])
@pytest.mark.parametrize("erase", ["none", "tied", "decoupled"])
@pytest.mark.parametrize("vector_decay", [False, True])
def test_bare_factors_of_every_form(erase, vector_decay, terms):
    if erase == "tied" and terms is not None:
        terms = None  # a tied erase belongs to one write
    factors = random_factors(7, erase=erase, vector_decay=vector_decay, terms=terms)
    state = random_state(factors)
    result = effective_attention(factors, initial_state=state)
    assert distance(result.coefficient, by_hand(factors)) <= EXACT
    assert distance(result.read(), step_scan(factors, state)[0]) <= EXACT
    half = effective_attention(factors, heads=1, initial_state=state)
    assert distance(half.read(), step_scan(factors, state)[0][:, :, 1:]) <= EXACT


@pytest.mark.parametrize("terms", [None, 2])
def test_blocks_of_writes_change_nothing(monkeypatch, terms):
    factors = random_factors(23, erase="decoupled", terms=terms)
    whole = effective_attention(factors).coefficient
    monkeypatch.setattr(attention, "BLOCK", 5)
    assert distance(effective_attention(factors).coefficient, whole) <= 1e-12


@over_rules
def test_a_continued_run_has_the_lower_right_corner_of_the_whole(rule):
    """What was written before the cut comes from the state: the rest of the columns, weighed by their values."""
    whole, later = cache_of(rule, length=11), cache_of(rule, length=7, before=4)
    all_of_it, part = effective_attention(whole, LAYER), effective_attention(later, LAYER)
    assert distance(part.coefficient, all_of_it.coefficient[:, :, 4:, 4:]) <= EXACT
    early = replace(
        all_of_it,
        coefficient=all_of_it.coefficient[:, :, :, :4],
        write_value=all_of_it.write_value[:, :4],
    )
    assert distance(part.from_initial_state, early.read()[:, 4:]) <= EXACT


@over_rules
def test_an_edited_write_keeps_its_column_when_the_erase_stays(rule):
    """A deleted write is weighed as before; only its value is gone. Taking the erase away as well changes other columns."""
    native = effective_attention(cache_of(rule), LAYER)
    gone = effective_attention(cache_of(rule, edits=[WriteEdit(LAYER, 1, 4, "delete")]), LAYER)
    assert torch.equal(gone.coefficient, native.coefficient)
    assert (gone.contribution_norm()[:, 1, :, 4] == 0).all()
    net = effective_attention(cache_of(rule, edits=EDITS["deleted"]), LAYER)
    changed = (net.coefficient - native.coefficient).abs().amax(dim=(0, 2, 3)) > 1e-6
    assert changed.tolist() == [False, model_of(rule).blocks[LAYER].mixer.erases, False, False]


def test_heads_are_chosen_in_every_form():
    cache = cache_of("gated_delta_net")
    whole = effective_attention(cache, LAYER)
    for heads, numbers in [(2, [2]), (-1, [3]), (slice(1, 3), [1, 2]), ([3, 0], [3, 0]), (None, [0, 1, 2, 3])]:
        some = effective_attention(cache, LAYER, heads)
        assert some.heads == tuple(numbers)
        assert distance(some.coefficient, whole.coefficient[:, numbers]) <= 1e-12


def test_the_table_has_a_row_per_read_and_earlier_write():
    result = effective_attention(cache_of("mamba2", length=4), LAYER, [3, 1])
    table = result.to_dataframe()
    assert list(table) == ["batch", "head", "query_pos", "write_pos", "coefficient", "contribution_norm"]
    assert len(table) == 2 * 2 * 10
    row = table.query("batch == 1 and head == 1 and query_pos == 3 and write_pos == 2")
    assert row.coefficient.item() == result.coefficient[1, 1, 3, 2]
    length = result.write_value[1, 2, 1].norm()
    assert row.contribution_norm.item() == pytest.approx((result.coefficient[1, 1, 3, 2].abs() * length).item())
    several = effective_attention(cache_of("mamba2", edits=EDITS["added"]), LAYER).to_dataframe()
    assert set(several.term) == {0, 1, 2} and len(several) == 2 * 4 * 45 * 3


def test_gradients_reach_the_factors():
    factors = random_factors(4, erase="decoupled", batch=1, heads=1, d_k=2)
    names = ("log_decay", "erase", "probe", "write_key", "query")
    leaves = [getattr(factors, name).clone().requires_grad_() for name in names]

    def coefficient(*tensors):
        return effective_attention(replace(factors, **dict(zip(names, tensors, strict=True)))).coefficient

    assert torch.autograd.gradcheck(coefficient, leaves)


def test_a_cache_in_bfloat16_is_followed_in_float32():
    model = model_of("gated_delta_net")
    factors = cache_of("gated_delta_net").factors(LAYER).map(lambda tensor: tensor.bfloat16())
    assert effective_attention(factors).coefficient.dtype == torch.float32
    _, cache = model.run_with_cache(tokens_of(model, batch=1), remove_batch_dim=True)
    assert effective_attention(cache, LAYER).coefficient.shape == (1, 4, 12, 12)
