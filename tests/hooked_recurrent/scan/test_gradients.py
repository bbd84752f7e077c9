"""gradcheck of both scans for every input, the initial state and the decay included."""

from dataclasses import replace

import pytest
import torch

from hooked_recurrent.scan.chunked import chunked_scan
from hooked_recurrent.scan.step import step_scan
from tests.hooked_recurrent.models import distance, random_factors, random_state

FORMS = {
    "no erase": {"erase": "none"},
    "tied": {"erase": "tied"},
    "decoupled": {"erase": "decoupled"},
    "two writes": {"erase": "decoupled", "terms": 2},
    "two writes, no erase": {"erase": "none", "terms": 2},
}


def as_function(scan, factors):
    """The scan as a function of plain tensors, the present roles in order and then the initial state."""
    names = [name for name, tensor in vars(factors).items() if tensor is not None]
    tensors = [getattr(factors, name) for name in names] + [random_state(factors)]

    def function(*inputs):
        return scan(replace(factors, **dict(zip(names, inputs[:-1], strict=True))), inputs[-1])

    return function, [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("vector_decay", [False, True], ids=["scalar", "vector"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["step", "chunked"])
def test_gradcheck(name, form, vector_decay, as_users_run):
    # 5 positions in chunks of 2: a whole chunk, another, and a remainder
    scan = step_scan if name == "step" else (lambda factors, state: chunked_scan(factors, state, chunk_size=2))
    factors = random_factors(5, batch=1, heads=1, d_k=2, d_v=3, vector_decay=vector_decay, **FORMS[form])
    function, inputs = as_function(scan, factors)
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_under_strong_decay_equal_those_of_the_step_reference(form):
    """exp(-20) a step for 40 steps: a scan that divided by a decay would give Inf or NaN gradients here."""
    for vector_decay in (False, True):
        factors = random_factors(40, strong=True, vector_decay=vector_decay, **FORMS[form])
        gradients = []
        for scan in (step_scan, lambda f, s: chunked_scan(f, s, chunk_size=16)):
            function, inputs = as_function(scan, factors)
            read, state = function(*inputs)
            gradients.append(torch.autograd.grad(read.sin().sum() + state.cos().sum(), inputs))
        for reference, chunked in zip(*gradients, strict=True):
            assert torch.isfinite(chunked).all()
            assert distance(chunked, reference) <= 1e-9


def test_gradients_of_a_very_strong_vector_decay_leave_the_factored_path():
    """A half-chunk that decays by more than e^60 takes the path that never writes exp(+c)."""
    factors = random_factors(32, vector_decay=True, erase="decoupled")
    factors = replace(factors, log_decay=factors.log_decay.clone().sub(15.0))
    gradients = []
    for scan in (step_scan, lambda f, s: chunked_scan(f, s, chunk_size=16)):
        function, inputs = as_function(scan, factors)
        read, state = function(*inputs)
        gradients.append(torch.autograd.grad(read.sin().sum() + state.cos().sum(), inputs))
    for reference, chunked in zip(*gradients, strict=True):
        # the gradient of a decay of e^-15 is itself 1e-7, a difference of numbers near 1: hence the absolute part
        torch.testing.assert_close(chunked, reference, rtol=1e-9, atol=1e-13)
