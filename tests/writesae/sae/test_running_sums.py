"""Decayed running sums and their gradient against the sums written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from tests.writesae.sae.states_for_tests import random, record_of
from writesae.sae import running_sums as module
from writesae.sae.running_sums import Decays, running_sums, sum_back_, sums_at

sizes = {
    "length": st.integers(1, 70),
    "chunk": st.integers(1, 40),
    "strong": st.booleans(),
    "seed": st.integers(0, 99),
}


def by_hand(log_decay):
    """D(t<-j) of whole passages [passage, pos, pos], step by step."""
    passages, length = log_decay.shape
    whole = torch.zeros(passages, length, length, dtype=torch.float64)
    for t in range(length):
        whole[:, t, :t] = whole[:, t - 1, :t] * log_decay[:, t, None].exp()
        whole[:, t, t] = 1.0
    return whole


@given(**sizes)
def test_sums_are_those_of_the_definition(length, chunk, strong, seed):
    log_decay = record_of(2, length, strong=strong, seed=seed)["log_decay"]
    x, whole = random(2, length, 3, seed=seed), by_hand(log_decay)
    decays = Decays(log_decay, torch.float64, chunk)
    parts = list(running_sums(decays, lambda start, stop: x[:, start:stop].clone()))
    assert [part[0] for part in parts] == list(range(0, length, chunk)) and parts[-1][1] == length
    torch.testing.assert_close(torch.cat([part[2] for part in parts], dim=1), whole @ x, rtol=1e-12, atol=1e-12)
    back = x.clone()
    sum_back_(decays, back, 0, None)
    torch.testing.assert_close(back, whole.mT @ x, rtol=1e-12, atol=1e-12)


@given(split=st.integers(1, 4), **sizes)
def test_the_sum_back_goes_on_from_one_stretch_to_the_one_before(split, length, chunk, strong, seed):
    log_decay = record_of(2, length, strong=strong, seed=seed)["log_decay"]
    decays, carried = Decays(log_decay, torch.float64, chunk), None
    whole, parts = random(2, length, 3, seed=seed), random(2, length, 3, seed=seed)
    sum_back_(decays, whole, 0, None)
    for start in reversed(range(0, length, split * chunk)):
        carried = sum_back_(decays, parts[:, start : start + split * chunk], start, carried)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_decays_of_narrow_factors_do_not_drift():
    """Over a thousand steps of a memory that hardly decays, float32 sums stay at float32's precision."""
    log_decay = -1e-3 * random(1, 1024).sigmoid()
    x = random(1, 1024, 4)
    decays = Decays(log_decay, torch.float32)
    sums = torch.cat([part for _, _, part in running_sums(decays, lambda a, b: x[:, a:b].float())], dim=1)
    expected = by_hand(log_decay) @ x
    assert (sums - expected).abs().max() <= 2e-5 * expected.abs().max()


def prepared(skip, terms=2, passages=2, length=11, rows=6, chunk=4):
    record = record_of(passages, length, terms=terms, strong=False)
    key, value = record["key"], record["value"]
    decays = Decays(record["log_decay"], torch.float64, chunk)
    indices = torch.stack([random(rows, seed=n).argsort()[:3] for n in range(passages * (length - skip))])
    left, right = random(rows, key.shape[-1], seed=5), random(rows, value.shape[-1], seed=6)

    def at(left, right):
        by_key, by_value = key @ left.T, value @ right.T
        x = (by_key * by_value).sum(2)
        sums = torch.cat([part for _, _, part in running_sums(decays, lambda a, b: x[:, a:b].clone())], dim=1)
        scores = sums[:, skip:].flatten(0, 1).detach()
        kept = (by_key.detach(), by_value.detach())
        return sums_at(left, right, scores, key, value, *kept, indices, decays)

    return at, left, right


@pytest.mark.parametrize("at_once", [1, 100, 1 << 22])
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("skip", [0, 1, 5])
def test_gradients_in_any_blocks(skip, terms, at_once, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    at, left, right = prepared(skip, terms)
    assert gradcheck(at, [left.clone().requires_grad_(), right.clone().requires_grad_()])
    assert gradcheck(at, [left, right.clone().requires_grad_()])
    assert gradcheck(at, [left.clone().requires_grad_(), right])


def test_a_row_may_be_chosen_twice_and_a_backward_run_twice():
    record = record_of(1, 6)
    key, value = record["key"][:, :, None], record["value"][:, :, None]
    left, right = random(2, 3).requires_grad_(), random(2, 5, seed=1).requires_grad_()
    decays = Decays(record["log_decay"], torch.float64)
    by_key, by_value = key @ left.detach().T, value @ right.detach().T
    scores = torch.cat([z for _, _, z in running_sums(decays, lambda a, b: (by_key * by_value)[:, a:b, 0].clone())])[0]
    once, twice = torch.zeros(6, 1, dtype=torch.long), torch.zeros(6, 2, dtype=torch.long)
    found = [sums_at(left, right, scores, key, value, by_key, by_value, rows, decays).sum() for rows in (once, twice)]
    first, second, again = (
        torch.autograd.grad(loss, (left, right), retain_graph=True) for loss in (found[0], found[1], found[0])
    )
    for a, b, c in zip(first, second, again, strict=True):
        torch.testing.assert_close(2 * a, b)
        assert torch.equal(a, c)
