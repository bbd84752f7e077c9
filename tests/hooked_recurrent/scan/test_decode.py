"""The decode step against the step reference, in float64: every form, its gradients, and what it refuses."""

from dataclasses import replace

import pytest
import torch

from hooked_recurrent.scan.decode import decode_step
from hooked_recurrent.scan.step import step_scan
from tests.hooked_recurrent.models import distance, random_factors, random_state

FORMS = [("none", None), ("none", 2), ("tied", None), ("decoupled", None), ("decoupled", 3)]


@pytest.mark.parametrize(("erase", "terms"), FORMS)
@pytest.mark.parametrize("vector_decay", [False, True], ids=["scalar", "vector"])
@pytest.mark.parametrize("start", ["none", "one", "all"])
def test_it_is_one_step_of_the_reference_gradients_included(erase, terms, vector_decay, start):
    factors = random_factors(1, batch=3, erase=erase, terms=terms, vector_decay=vector_decay)
    state = {"none": None, "one": random_state(factors)[:1], "all": random_state(factors)}[start]
    names = [name for name, tensor in vars(factors).items() if tensor is not None]
    found = []
    for run in (step_scan, decode_step):
        inputs = [getattr(factors, name).clone().requires_grad_() for name in names]
        before = None if state is None else state.clone().requires_grad_()
        read, after = run(replace(factors, **dict(zip(names, inputs, strict=True))), before)
        wanted = inputs if before is None else [*inputs, before]
        grads = torch.autograd.grad(read.sin().sum() + after.cos().sum(), wanted, allow_unused=True)
        found.append([read, after, *(torch.zeros(1) if grad is None else grad for grad in grads)])
    for got, expected in zip(found[1], found[0], strict=True):
        assert got.shape == expected.shape or got.numel() == 1
        assert (got - expected).abs().max() <= 1e-12 or distance(got, expected) <= 1e-12


def test_the_state_that_came_in_is_left_as_it_was():
    factors = random_factors(1, erase="tied")
    state = random_state(factors)
    kept = state.clone()
    decode_step(factors, state)
    assert torch.equal(state, kept)


def test_narrow_factors_keep_a_float32_state():
    read, state = decode_step(random_factors(1, erase="tied", dtype=torch.bfloat16))
    assert read.dtype == state.dtype == torch.float32


def test_several_positions_are_refused():
    with pytest.raises(ValueError, match="one position, got 2"):
        decode_step(random_factors(2))
