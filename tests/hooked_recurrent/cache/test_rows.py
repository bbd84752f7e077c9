"""A cache of some rows, some places: it tells what the whole one tells of them, edits of single rows included."""

from functools import lru_cache

import numpy as np
import pytest
import torch

from hooked_recurrent import StateEdit, WriteEdit
from hooked_recurrent.memory import effective_attention
from tests.hooked_recurrent.models import RULES, distance, over_stacks, tiny_model, tokens_of

pytestmark = pytest.mark.shapes_on_one_rule

EXACT = 1e-12
ROWS = ([2, 0], (1, 3), 1, [1, 1], torch.tensor([0, 2]), np.array([1]), slice(None, None, 2))


@lru_cache
def model_of(layer_types):
    return tiny_model(layer_types, seed=1).requires_grad_(False)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def edits_of_rows():
    """Edits of states and carried writes that differ from row to row, in what they change and in whom."""
    return [
        StateEdit(0, 1, slice(2, 5), "replace", matrix=draw(2, 3, 3, 5), batch=torch.tensor([2, 1])),
        StateEdit(0, 1, 6, "add", matrix=draw(3, 1, 3, 5, seed=1)),
        StateEdit(0, 2, 4, "scale", scale=0.5, batch=0),
        WriteEdit(0, 1, slice(6, 8), "replace", key=draw(3, 2, 3), value=draw(3, 2, 5), reading="cache"),
        WriteEdit(0, 0, 3, "delete", form="net", reading="cache", batch=torch.tensor([1])),
    ]


@pytest.mark.parametrize("rows", ROWS, ids=str)
@over_stacks
def test_states_of_rows_know_which_edits_are_theirs(layer_types, rows):
    model = model_of(layer_types)
    _, cache = model.run_with_cache(tokens_of(model, batch=3), edits=edits_of_rows())
    kept = np.atleast_1d(np.arange(3)[slice(*rows) if isinstance(rows, tuple) else rows])
    part = cache.apply_slice_to_batch_dim(rows)
    for carried in (False, True):
        whole = cache.state(0, slice(None), slice(None), carried=carried)
        mine = part.state(0, slice(None), slice(None), carried=carried)
        assert distance(mine, whole[kept]) <= EXACT
    assert len(cache.state_edits(0)) == 5  # the whole one is as it was
    again = part if isinstance(rows, int) else part.apply_slice_to_batch_dim([-1])
    assert distance(again.state(0, 1, -1), cache.state(0, 1, -1)[kept[-1:]]) <= EXACT


def test_rows_without_edits_are_read_as_a_plain_run():
    model = model_of(("rwkv7", "rwkv7"))
    tokens = tokens_of(model, batch=3)
    _, cache = model.run_with_cache(tokens, edits=[StateEdit(0, 1, 4, "delete", batch=2)])
    _, plain = model.run_with_cache(tokens)
    with pytest.raises(ValueError, match="StateEdit.*changed states of layer 0"):
        effective_attention(cache, 0)
    part = cache.apply_slice_to_batch_dim([0, 1])
    assert part.state_edits(0) == []
    assert torch.equal(effective_attention(part, 0).coefficient, effective_attention(plain, 0).coefficient[:2])


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_rows(rule):
    model = model_of((rule, rule))
    _, cache = model.run_with_cache(tokens_of(model, batch=3), incl_bwd=True, return_type="loss")
    part = cache.apply_slice_to_batch_dim([2, 0])
    assert distance(part.write_grad(0, slice(None), 4), cache.write_grad(0, slice(None), 4)[[2, 0]]) <= EXACT
    key, value = draw(3), draw(5)
    assert distance(part.write_effect(0, key, value), cache.write_effect(0, key, value)[[2, 0]]) <= EXACT
    one = cache.apply_slice_to_batch_dim(1)
    assert distance(one.write_grad(0, 1, 4), cache.write_grad(0, 1, 4)[[1]]) <= EXACT


def test_a_cache_of_nothing_has_rows_too():
    model = model_of(("mamba2", "mamba2"))
    _, cache = model.run_with_cache(tokens_of(model, batch=1), names_filter=lambda name: False)
    assert len(cache.apply_slice_to_batch_dim([0])) == 0


MANY = [[4, 0, -1], torch.tensor([3, 3]), np.array([2]), (1, 0), range(2)]
ONE = [torch.tensor(3), np.int64(-1)]


@pytest.mark.parametrize("rule", RULES)
def test_heads_and_positions_by_lists_and_by_numbers_of_other_kinds(rule):
    model = model_of((rule, rule))
    _, cache = model.run_with_cache(tokens_of(model), incl_bwd=True, return_type="loss")
    for method in (lambda *at: cache.write(*at).AB, cache.state, cache.write_grad):
        whole = method(0, slice(None), slice(None))
        for pos in MANY:
            assert distance(method(0, 1, pos), whole[:, list(map(int, pos)), 1]) <= EXACT
            assert distance(method(0, [2, 0], pos), whole[:, list(map(int, pos))][:, :, [2, 0]]) <= EXACT
        for pos in ONE:
            assert distance(method(0, ONE[0], pos), whole[:, int(pos), 3]) <= EXACT
            assert distance(method(0, [2], pos), whole[:, int(pos), [2]]) <= EXACT


def test_bad_numbers_of_heads_and_positions(as_users_run):
    model = model_of(("mamba2", "mamba2"))
    _, cache = model.run_with_cache(tokens_of(model))
    for method in (cache.write, cache.state):
        with pytest.raises(IndexError, match="position 12 is out of range: the cache holds 12"):
            method(0, 0, [3, 12])
        with pytest.raises(TypeError, match="a head must be an integer, got torch.float"):
            method(0, [0.5], 0)
        with pytest.raises(TypeError, match="a position must be an integer, got torch.bool"):
            method(0, 0, torch.ones(12, dtype=torch.bool))


def test_what_is_not_kept_is_asked_for_by_the_call_that_gives_it(as_users_run):
    model = model_of(("mamba2", "mamba2"))
    _, cache = model.run_with_cache(tokens_of(model))
    with pytest.raises(KeyError, match=r"hook_state is not in the cache: cache.state\(1, head, pos\) makes it"):
        cache["state", 1]
    with pytest.raises(KeyError, match=r"blocks.0.mixer.hook_read_grad is not in the cache.*incl_bwd=True"):
        cache["read_grad", 0]
    with pytest.raises(TypeError, match="kept as floats, got dtype 'bfloat16'; give one of torch"):
        model.run_with_cache(tokens_of(model), dtype="bfloat16")
    with pytest.raises(KeyError, match="did you mean 'blocks.0.hook_resid_pre'"):
        model.run_with_cache(tokens_of(model), names_filter="resid_pre")


@pytest.mark.parametrize("rule", RULES)
def test_bfloat16(rule):
    """Everything that a cache gives, of a model in bfloat16: near float64's, and no dtypes that do not go together."""
    wide, narrow = (tiny_model((rule, rule), seed=1).to(dtype) for dtype in (torch.float64, torch.bfloat16))
    wide.load_state_dict({name: weight.double() for name, weight in narrow.state_dict().items()})
    tokens = tokens_of(wide)
    edits = [WriteEdit(0, 1, 3, "add", key=draw(3), value=draw(5)), StateEdit(1, 0, 2, "scale", scale=0.5)]
    run = {"edits": edits, "incl_bwd": True, "return_type": "both"}
    (_, cache), ((logits, _), mine) = (model.run_with_cache(tokens, **run) for model in (wide, narrow))
    for read in (
        lambda cache: cache.write(0, 1, slice(None)).AB,
        lambda cache: cache.state(0, slice(None), 5),
        lambda cache: effective_attention(cache, 0).coefficient,
    ):
        assert distance(read(mine).double(), read(cache)) <= 0.03
    assert mine.state(0, 0, 5).dtype == torch.float32
    assert distance(mine.layer_logits()[-1], logits) <= 0.03
    assert distance(mine.logit_contributions(3, unit="head")[0].sum(0), logits[:, :, 3]) <= 0.03
    assert mine.stack_head_results(apply_ln=True).shape[0] == 8
    name = "blocks.0.mixer.hook_write"  # rounding grows from layer to layer: gradients are this model's own, not the wide one's
    kept = narrow.run_with_cache(tokens, names_filter=name, **run)[1][f"{name}_grad"]
    assert distance(mine.write_grad(0, slice(None), slice(None)), kept) <= 0.03
    effect = torch.einsum("k,...kv,v->...", draw(3), kept.double(), draw(5))
    assert distance(mine.write_effect(0, draw(3), draw(5)), effect) <= 0.03
    assert narrow.generate(tokens, max_new_tokens=3, edits=edits).shape == (2, 15)
