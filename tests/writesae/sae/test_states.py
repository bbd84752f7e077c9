"""Running-sum samples against the same states formed as matrices: values, gradients, and what is never formed."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.hooked_recurrent.models import RULES, tiny_model, tokens_of
from tests.writesae.sae.states_for_tests import (
    Largest,
    random,
    record_of,
    record_of_run,
    sequences_of,
    states_by_hand,
)
from writesae.sae.samples import Matrices
from writesae.sae.states import StateSequences, formed_states, state_samples

SCALAR = ("gated_delta_net", "delta_net", "mamba2")
EXACT = {"rtol": 1e-10, "atol": 1e-10}
passages = st.fixed_dictionaries(
    {
        "passages": st.integers(1, 3),
        "length": st.integers(1, 70),
        "terms": st.sampled_from([None, 1, 2]),
        "strong": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


def both(record, skip=0):
    """The same samples twice: by running sums, and formed."""
    return sequences_of(record, skip), Matrices(states_by_hand(record)[:, skip:].flatten(0, 1))


def rows_of(samples, rows=7, seed=0):
    return random(rows, samples.d_k, seed=seed), random(rows, samples.d_v, seed=seed + 1)


def chosen_of(samples, rows=7, chosen=3):
    return torch.stack([random(rows, seed=number).argsort()[:chosen] for number in range(len(samples))])


def check_answers(sums, dense):
    """Every question of `Samples`, and the gradient of inner_at, of both ways."""
    assert (len(sums), sums.d_k, sums.d_v) == (len(dense), dense.d_k, dense.d_v)
    left, right = rows_of(dense)
    torch.testing.assert_close(sums.inner(left, right).scores, dense.inner(left, right).scores, **EXACT)
    indices, weights = chosen_of(dense), random(len(dense), 3, seed=9)
    found = []
    for samples in (sums, dense):
        sides = left.clone().requires_grad_(), right.clone().requires_grad_()
        at = samples.inner_at(*sides, samples.inner(*sides), indices)
        found.append((at.detach(), *torch.autograd.grad((at * weights).sum(), sides)))
    torch.testing.assert_close(*found, **EXACT)
    for ask in ("squared_norms", "matrices", "mean"):
        torch.testing.assert_close(getattr(sums, ask)(), getattr(dense, ask)(), **EXACT)
    matrix = random(dense.d_k, dense.d_v, seed=3)
    torch.testing.assert_close(sums.inner_with_matrix(matrix), dense.inner_with_matrix(matrix), **EXACT)


@given(values=passages, share=st.floats(0, 0.99))
def test_all_answers_are_those_of_the_states(values, share):
    check_answers(*both(record_of(**values), skip=int(share * values["length"])))


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("rule", SCALAR)
def test_states_of_runs(rule, skip):
    """The states that a model's run went through, from its own roles."""
    model = tiny_model((rule, rule), seed=1).requires_grad_(False)
    _, cache = model.run_with_cache(tokens_of(model, length=37))
    record = record_of_run(cache, 1, 2)
    states = cache.state(1, 2, slice(None))
    assert isinstance(state_samples(record), StateSequences)
    check_answers(state_samples(record, skip=skip), Matrices(states[:, skip:].flatten(0, 1)))


def test_nothing_of_the_size_of_a_state_per_position_is_made():
    """Nor [pos, chosen, d]: the largest tensors are [pos, row]."""
    record = record_of(2, 128, d_k=40, d_v=40)
    samples, rows, chosen = sequences_of(record, skip=1), 64, 8
    left, right = (side.requires_grad_() for side in (random(rows, 40), random(rows, 40, seed=1)))
    indices = torch.stack([random(rows, seed=number).argsort()[:chosen] for number in range(len(samples))])
    with Largest() as made:
        scaled = samples.to(dtype=torch.float64).scaled(torch.tensor(0.5, dtype=torch.float64))
        at = scaled.inner_at(left, right, scaled.inner(left, right), indices)
        at.sum().backward()
        scaled.inner_with_matrix(random(40, 40))
        scaled.squared_norms()
        scaled.mean()
    assert made.numel <= 2 * 128 * rows < 2 * 128 * 40 * 40 / 8
    with Largest() as made:
        samples.leading(torch.arange(0, 250, 7))
    assert made.numel <= 16 * 40 * 40


def test_taking_whole_passages_keeps_the_running_sums_and_single_states_are_formed():
    record = record_of(4, 9)
    samples, dense = both(record, skip=2)
    for rows in (slice(7, 21), slice(-14, None), slice(None)):
        taken = samples.take(rows)
        assert isinstance(taken, StateSequences)
        check_answers(taken, dense.take(rows))
    for rows in (
        slice(6, 21),
        slice(0, 14, 2),
        slice(3, 3),
        torch.tensor([5, 27, 0, 5, -1, 6]),
        torch.tensor([]).long(),
    ):
        taken = samples.take(rows)
        assert isinstance(taken, Matrices)
        torch.testing.assert_close(taken.x, dense.take(rows).x, **EXACT)
    assert isinstance(samples.passages(slice(1, 2)), StateSequences)
    with pytest.raises(IndexError, match="state 28 is out of range: there are 28"):
        samples.take(torch.tensor([28]))


@given(strong=st.booleans(), terms=st.sampled_from([None, 2]), seed=st.integers(0, 99))
def test_single_states_in_any_order(strong, terms, seed):
    samples, dense = both(record_of(3, 20, strong=strong, terms=terms, seed=seed), skip=1)
    rows = torch.randint(len(dense), (12,), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(samples.take(rows).matrices(), dense.x[rows], **EXACT)


def test_blocks_are_whole_passages():
    samples, dense = both(record_of(5, 6), skip=1)
    for size, expected in ((1, [5] * 5), (9, [5] * 5), (10, [10, 10, 5]), (99, [25])):
        parts = list(samples.blocks(size))
        assert [len(part) for part in parts] == expected
        torch.testing.assert_close(torch.cat([part.matrices() for part in parts]), dense.x, **EXACT)


def test_leading_vectors_are_those_of_the_singular_value_decomposition():
    record = record_of(3, 30)
    record["value"][1, :4] = 0.0
    samples, dense = both(record)
    rows = torch.arange(0, len(dense), 2)
    for got, expected in zip(samples.leading(rows), dense.leading(rows), strict=True):
        sign = (got * expected).sum(-1, keepdim=True).sign()
        torch.testing.assert_close(got * sign, expected, rtol=1e-6, atol=1e-6)
    empty = samples.leading(torch.tensor([30]))
    assert (empty[0] == 0).all() and (empty[1] == 0).all()
    assert [tuple(side.shape) for side in samples.leading(torch.tensor([]).long())] == [(0, 3), (0, 5)]


@pytest.mark.parametrize("given_norms", [False, True])
def test_scaled_moved_and_put_together(given_norms):
    record = record_of(2, 12)
    samples, dense = both(record, skip=1)
    if given_norms:
        record["squared_norm"] = states_by_hand(record).square().sum((2, 3))
        samples = sequences_of(record, skip=1)
    factor = torch.tensor(-0.3, dtype=torch.float64)
    check_answers(samples.scaled(factor), dense.scaled(factor))
    check_answers(samples.scaled(2.0).scaled(3.0), dense.scaled(6.0))
    narrow = samples.to(dtype=torch.float32)
    assert (
        narrow.dtype == narrow.squared_norms().dtype == narrow.inner(*(s.float() for s in rows_of(dense))).scores.dtype
    )
    assert narrow.dtype == torch.float32 and samples.to("cpu", torch.float64) is samples
    other = sequences_of(record_of(1, 12, seed=50), skip=1)
    check_answers(
        StateSequences.cat([samples, other, samples]),
        Matrices(torch.cat([dense.x, other.matrices(), dense.x])),
    )
    for unlike in (sequences_of(record_of(1, 12)), sequences_of(record_of(1, 11), skip=1)):
        with pytest.raises(ValueError, match="same .skip, pos, term, d_k, d_v."):
            StateSequences.cat([samples, unlike])


def test_norms_that_were_given_are_taken_and_decays_are_made_once():
    record = record_of(2, 12)
    record["squared_norm"] = torch.arange(24.0).view(2, 12)
    samples = sequences_of(record, skip=2)
    assert samples.squared_norms().tolist() == [*range(2, 12), *range(14, 24)]
    assert samples.scaled(2.0).squared_norms()[0] == 8.0
    assert StateSequences.cat([samples, samples.passages(slice(1, 2))]).squared_norms()[-1] == 23.0
    first, second = samples.scaled(2.0), samples.scaled(3.0)
    first.inner(*rows_of(first))
    assert second._decays_of(torch.float64) is first._decays_of(torch.float64)


def test_a_narrow_type_for_scores_is_not_taken():
    samples = sequences_of(record_of(1, 20)).to(dtype=torch.float32)
    sides = [side.float() for side in rows_of(samples)]
    with torch.autocast("cpu", torch.bfloat16):
        inner = samples.inner(*sides)
    assert torch.equal(inner.scores, samples.inner(*sides).scores) and inner.kept[0].dtype == torch.float32


def test_float32_keeps_its_precision_over_a_long_passage():
    record = record_of(1, 600)
    record["log_decay"] = record["log_decay"] / 100
    exact = sequences_of(record)
    narrow = StateSequences(record["log_decay"].float(), record["key"].float(), record["value"].float())
    left, right = rows_of(exact)
    scores = exact.inner(left, right).scores
    assert (narrow.inner(left.float(), right.float()).scores - scores).abs().max() <= 1e-5 * scores.abs().max()
    assert (narrow.squared_norms() / exact.squared_norms() - 1).abs().max() <= 1e-5


# --- any rule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_the_way_follows_the_decay_and_the_dense_one_says_so_once(rule, recwarn):
    """RWKV-7's states (and those of every rule whose key channels decay by themselves) are formed, with one warning."""
    model = tiny_model((rule, rule), seed=1).requires_grad_(False)
    _, cache = model.run_with_cache(tokens_of(model, length=13))
    record, states = record_of_run(cache, 1, 0), cache.state(1, 0, slice(None))
    source = f"states of {rule}"
    if rule in SCALAR:
        samples = state_samples(record, skip=2, source=source)
        assert isinstance(samples, StateSequences) and not recwarn.list
        return
    with pytest.warns(UserWarning, match=rf"{source}: every key channel .* each one is formed: 3 x 5 = 15 numbers"):
        samples = state_samples(record, skip=2, source=source)
    assert isinstance(samples, Matrices)
    torch.testing.assert_close(samples.x, states[:, 2:].flatten(0, 1), **EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state_samples(record, source=source)
    with pytest.warns(UserWarning, match="another head"):
        state_samples(record, source=f"another head of {rule}")


@pytest.mark.filterwarnings("ignore:.*every key channel")
@pytest.mark.parametrize("terms", [None, 2])
@pytest.mark.parametrize("vector_decay", [False, True])
def test_only_the_wanted_positions_are_formed(vector_decay, terms):
    record = record_of(2, 9, terms=terms, vector_decay=vector_decay)
    positions = torch.tensor([[7, 2, 3], [1, 7, 7]])
    samples = state_samples(record, skip=1, positions=positions)
    assert isinstance(samples, Matrices)
    expected = states_by_hand(record)[torch.arange(2)[:, None], positions].flatten(0, 1)
    torch.testing.assert_close(samples.x, expected, **EXACT)
    for wrong in (0, 9):
        positions[1, 1] = wrong
        with pytest.raises(ValueError, match=r"positions of states must lie in 1..8, got"):
            state_samples(record, skip=1, positions=positions)


def test_forming_stops_with_the_last_wanted_position():
    record, steps = record_of(1, 9, terms=1, vector_decay=True), []

    class Steps(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            steps.extend([func] if func is torch.ops.aten.baddbmm_.default else [])
            return func(*args, **(kwargs or {}))

    with Steps():
        formed_states(record["log_decay"], record["key"], record["value"], positions=torch.tensor([[3, 0]]))
    assert len(steps) == 4


def test_what_does_not_fit_is_refused():
    record = record_of(2, 6)
    log_decay, key, value = record["log_decay"], record["key"], record["value"]
    with pytest.raises(ValueError, match=r"one decay per position.*state_samples takes a decay per key channel"):
        StateSequences(record_of(2, 6, vector_decay=True)["log_decay"], key, value)
    for sides in ((key[:, :5], value), (key, value[:, :, None]), (key[0], value[0]), (key[:1], value[:1])):
        with pytest.raises(ValueError, match=r"key and value must be \[passage, pos, d\]"):
            StateSequences(log_decay, *sides)
    with pytest.raises(ValueError, match=r"squared_norms must be \[passage, pos\] = \(2, 6\), got \(2, 5\)"):
        StateSequences(log_decay, key, value, log_decay[:, :5])
    for skip in (-1, 6):
        with pytest.raises(ValueError, match=f"skip must leave some of the 6 positions of a passage, got {skip}"):
            StateSequences(log_decay, key, value, skip=skip)
    with pytest.raises(ValueError, match="lacks key, value"):
        state_samples({"log_decay": log_decay})
    with pytest.raises(ValueError, match="do not fit each other"):
        state_samples({**record, "log_decay": value})
