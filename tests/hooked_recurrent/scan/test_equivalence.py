"""The chunked scan against the step reference, in float64, over everything that a rule may bring."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_recurrent.scan.chunked import chunked_scan
from hooked_recurrent.scan.dispatch import scan
from hooked_recurrent.scan.step import step_scan
from tests.hooked_recurrent.models import distance, random_factors, random_state

forms = st.one_of(
    st.tuples(st.just("tied"), st.none()),
    st.tuples(st.sampled_from(["none", "decoupled"]), st.sampled_from([None, 1, 2, 3])),
)
inputs = st.fixed_dictionaries(
    {
        "length": st.integers(1, 200),
        "batch": st.integers(1, 2),
        "heads": st.integers(1, 3),
        "d_k": st.integers(1, 8),
        "d_v": st.integers(1, 8),
        "vector_decay": st.booleans(),
        "strong": st.booleans(),
        "full_beta": st.booleans(),
        "seed": st.integers(0, 10_000),
    }
)


def check_equal(values, form, chunk_size, with_state):
    factors = random_factors(erase=form[0], terms=form[1], **values)
    initial = random_state(factors, seed=values["seed"]) if with_state else None
    expected_read, expected_state = step_scan(factors, initial)
    read, state = chunked_scan(factors, initial, chunk_size=chunk_size)
    assert distance(read, expected_read) <= 1e-10
    assert distance(state, expected_state) <= 1e-10


@settings(max_examples=60)
@given(inputs, forms, st.integers(1, 80), st.booleans())
def test_chunked_equals_step(values, form, chunk_size, with_state):
    check_equal(values, form, chunk_size, with_state)


@pytest.mark.slow
@settings(max_examples=1000)
@given(inputs, forms, st.integers(1, 80), st.booleans())
def test_chunked_equals_step_over_many_draws(values, form, chunk_size, with_state):
    check_equal(values, form, chunk_size, with_state)


@pytest.mark.parametrize("erase", ["none", "tied", "decoupled"])
@pytest.mark.parametrize("vector_decay", [False, True])
def test_the_default_chunk_size_serves_every_form(erase, vector_decay):
    factors = random_factors(150, d_k=6, d_v=4, erase=erase, vector_decay=vector_decay)
    initial = random_state(factors)
    for got, expected in zip(chunked_scan(factors, initial), step_scan(factors, initial), strict=True):
        assert distance(got, expected) <= 1e-10


@pytest.mark.parametrize("vector_decay", [False, True])
@pytest.mark.parametrize("erase", ["none", "tied", "decoupled"])
def test_the_strongest_decay_at_every_step_stays_finite(erase, vector_decay):
    factors = random_factors(130, d_k=4, d_v=6, erase=erase, vector_decay=vector_decay, full_beta=True)
    factors = type(factors)(**{**vars(factors), "log_decay": torch.full_like(factors.log_decay, -20.0)})
    initial = random_state(factors, size=1e3)
    for got, expected in zip(chunked_scan(factors, initial), step_scan(factors, initial), strict=True):
        assert torch.isfinite(got).all()
        assert distance(got, expected) <= 1e-10


@pytest.mark.parametrize("vector_decay", [False, True])
def test_beta_one_without_decay_replaces_what_the_key_finds(vector_decay):
    """With alpha = 1 and beta = 1 a delta rule stores exactly: asking for the last key gives the last value."""
    factors = random_factors(90, d_k=4, d_v=6, erase="tied", full_beta=True)
    decay = torch.zeros_like(factors.query) if vector_decay else torch.zeros_like(factors.log_decay)
    values = {**vars(factors), "log_decay": decay, "erase_strength": -torch.ones_like(factors.log_decay)}
    factors = type(factors)(**{**values, "query": factors.write_key})
    read, _ = chunked_scan(factors, random_state(factors))
    assert distance(read, factors.write_value) <= 1e-10


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("vector_decay", [False, True])
@pytest.mark.parametrize("erase", ["none", "tied", "decoupled"])
def test_float32_stays_near_float64(erase, vector_decay, strong):
    narrow = random_factors(
        200, d_k=8, d_v=6, erase=erase, vector_decay=vector_decay, strong=strong, dtype=torch.float32
    )
    wide = narrow.map(torch.Tensor.double)
    initial = random_state(narrow)
    expected = step_scan(wide, initial.double())
    for backend in ("step", "chunked"):
        read, state = scan(narrow, initial, backend=backend)
        assert read.dtype == state.dtype == torch.float32
        assert distance(read.double(), expected[0]) <= 2e-5
        assert distance(state.double(), expected[1]) <= 2e-5


@pytest.mark.parametrize("backend", ["step", "chunked"])
def test_bfloat16_factors_keep_a_float32_state(backend):
    narrow = random_factors(40, erase="tied", dtype=torch.bfloat16)
    read, state = scan(narrow, backend=backend)
    assert read.dtype == state.dtype == torch.float32
    expected = step_scan(narrow.map(torch.Tensor.double))
    assert distance(read.double(), expected[0]) <= 2e-5
    assert distance(state.double(), expected[1]) <= 2e-5


@pytest.mark.parametrize("length", [1, 30])
def test_every_backend_gives_the_same_dtype_whatever_the_initial_state(length):
    factors = random_factors(length, erase="tied")
    initial = random_state(factors).float()
    for backend in ("step", "chunked", "auto"):
        read, state = scan(factors, initial, backend=backend)
        assert read.dtype == state.dtype == torch.float64


@given(st.integers(2, 60), st.integers(1, 59), st.integers(1, 20), st.booleans(), st.integers(0, 999))
def test_a_scan_can_stop_and_go_on(length, cut, chunk_size, vector_decay, seed):
    cut = min(cut, length - 1)
    factors = random_factors(length, erase="decoupled", terms=2, vector_decay=vector_decay, seed=seed)
    initial = random_state(factors, seed=seed)
    expected_read, expected_state = chunked_scan(factors, initial, chunk_size=chunk_size)
    first, middle = chunked_scan(factors.at(slice(0, cut)), initial, chunk_size=chunk_size)
    second, last = chunked_scan(factors.at(slice(cut, length)), middle, chunk_size=chunk_size)
    assert distance(torch.cat([first, second], dim=1), expected_read) <= 1e-10
    assert distance(last, expected_state) <= 1e-10


@pytest.mark.parametrize("backend", ["step", "chunked"])
@pytest.mark.parametrize("vector_decay", [False, True])
@pytest.mark.parametrize("erase", ["none", "tied", "decoupled"])
def test_later_positions_reach_no_earlier_one_not_even_its_rounding(erase, vector_decay, backend):
    one, other = (random_factors(70, erase=erase, vector_decay=vector_decay, seed=seed) for seed in (0, 1))
    expected, _ = scan(one, backend=backend)
    for cut in (1, 7, 9, 15, 16, 40, 69):
        pairs = {name: (tensor, getattr(other, name)) for name, tensor in vars(one).items() if tensor is not None}
        spliced = {name: torch.cat([here[:, :cut], there[:, cut:]], dim=1) for name, (here, there) in pairs.items()}
        read, _ = scan(type(one)(**spliced), backend=backend)
        assert torch.equal(read[:, :cut], expected[:, :cut])
        assert not torch.equal(read[:, cut:], expected[:, cut:])


@pytest.mark.parametrize("backend", ["step", "chunked"])
def test_inputs_are_left_as_they_were(backend):
    factors = random_factors(20, erase="decoupled", terms=2)
    initial = random_state(factors)
    kept, kept_initial = factors.map(torch.clone), initial.clone()
    scan(factors, initial, backend=backend)
    assert torch.equal(initial, kept_initial)
    for name, tensor in vars(kept).items():
        assert tensor is None or torch.equal(getattr(factors, name), tensor)
