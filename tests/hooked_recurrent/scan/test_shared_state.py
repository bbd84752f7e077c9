"""One state before many rows, and no state after: the numbers of a state per row, and of a scan that keeps it."""

from dataclasses import replace

import pytest
import torch

from hooked_recurrent.scan.chunked import chunked_scan
from hooked_recurrent.scan.dispatch import scan
from hooked_recurrent.scan.step import step_scan
from tests.hooked_recurrent.models import distance, random_factors, random_state

ROWS = 3
FORMS = [("none", None), ("none", 2), ("tied", None), ("decoupled", None), ("decoupled", 3)]
over_forms = pytest.mark.parametrize(("erase", "terms"), FORMS)
over_decays = pytest.mark.parametrize("vector_decay", [False, True], ids=["scalar", "vector"])


def chunks_of_four(factors, state, want_state=True):
    return chunked_scan(factors, state, chunk_size=4, want_state=want_state)


def both(erase, terms, vector_decay, length):
    factors = random_factors(length, batch=ROWS, erase=erase, terms=terms, vector_decay=vector_decay)
    return factors, random_state(factors)[:1]


@over_forms
@over_decays
@pytest.mark.parametrize("length", [1, 8, 11])
def test_one_state_serves_every_row(erase, terms, vector_decay, length):
    """The reads, the state after, and all gradients, that of the shared state being the sum over the rows."""
    factors, state = both(erase, terms, vector_decay, length)
    names = [name for name, tensor in vars(factors).items() if tensor is not None]
    expected = None
    for run, copied in ((step_scan, True), (step_scan, False), (chunks_of_four, False), (scan, False)):
        inputs = [getattr(factors, name).clone().requires_grad_() for name in names]
        shared = state.clone().requires_grad_()
        before = shared.expand(ROWS, -1, -1, -1).clone() if copied else shared
        read, after = run(replace(factors, **dict(zip(names, inputs, strict=True))), before)
        gradients = torch.autograd.grad(read.sin().sum() + after.cos().sum(), [*inputs, shared])
        found = (read, after, *gradients)
        expected = expected or found
        assert all(distance(a, b) <= 1e-11 for a, b in zip(found, expected, strict=True))


@over_forms
@over_decays
@pytest.mark.parametrize("length", [1, 3, 8, 11])
@pytest.mark.parametrize("start", ["none", "one", "all"])
def test_a_state_that_nobody_wants_changes_no_read(erase, terms, vector_decay, length, start):
    """A whole number of chunks, a remainder, and a single token; reads and their gradients."""
    factors, one = both(erase, terms, vector_decay, length)
    state = {"none": None, "one": one, "all": random_state(factors)}[start]
    value = factors.write_value.clone().requires_grad_()
    factors = replace(factors, write_value=value)
    expected, _ = step_scan(factors, state)
    (slope,) = torch.autograd.grad(expected.sin().sum(), value)
    for run in (chunks_of_four, scan):
        read, after = run(factors, state, want_state=False)
        assert distance(read, expected) <= 1e-11 and after is None
        assert distance(torch.autograd.grad(read.sin().sum(), value)[0], slope) <= 1e-11
