"""Factors: what fits together, what does not, and the small conveniences."""

from dataclasses import replace

import pytest
import torch

from hooked_recurrent import Factors
from hooked_recurrent.factors import state_dtype
from tests.hooked_recurrent.models import distance, random_factors


def test_erase_and_probe_come_together():
    factors = random_factors(erase="decoupled")
    with pytest.raises(ValueError, match="erase and probe come together"):
        replace(factors, erase=None)
    with pytest.raises(ValueError, match="erase and probe come together"):
        replace(factors, probe=None)


def test_erase_and_strength_exclude_each_other():
    factors = random_factors(erase="decoupled")
    with pytest.raises(ValueError, match="not both"):
        replace(factors, erase_strength=factors.log_decay)


def test_strength_needs_a_single_write():
    factors = random_factors(terms=2)
    with pytest.raises(ValueError, match="ties the erase to a single write"):
        replace(factors, erase_strength=factors.log_decay)


@pytest.mark.parametrize("role", ["log_decay", "write_key", "write_value", "erase", "probe"])
def test_every_role_covers_the_same_positions(role, as_users_run):
    factors = random_factors(length=7, erase="decoupled")
    with pytest.raises(ValueError, match=rf"{role} has \[batch, pos, head\] = \(2, 6, 2\), but query has \(2, 7, 2\)"):
        replace(factors, **{role: getattr(factors, role)[:, :6]})


@pytest.mark.parametrize(("role", "width"), [("write_key", 4), ("erase", 4), ("probe", 4), ("log_decay", 4)])
def test_key_sides_have_the_key_width(role, width, as_users_run):
    factors = random_factors(d_k=3, erase="decoupled", vector_decay=True)
    wrong = torch.zeros(2, 7, 2, width, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"{role} has width {width}, but query has d_k = 3"):
        replace(factors, **{role: wrong})


def test_write_key_and_value_have_the_same_terms(as_users_run):
    two, three = random_factors(terms=2), random_factors(terms=3)
    with pytest.raises(ValueError, match="as many write terms"):
        replace(two, write_value=three.write_value)
    with pytest.raises(ValueError, match="as many write terms"):
        replace(two, write_value=random_factors().write_value)


def test_decoupled_writes_the_tied_erase_out():
    tied = random_factors(erase="tied")
    apart = tied.decoupled()
    assert apart.erase_strength is None
    assert torch.equal(apart.probe, tied.write_key)
    assert torch.equal(apart.erase, tied.erase_strength[..., None] * tied.write_key)
    assert apart.decoupled() is apart
    assert tied.erases and apart.erases and not random_factors().erases


def test_write_matrix_is_the_sum_of_outer_products():
    one, three = random_factors(), random_factors(terms=3)
    assert one.write_matrix().shape == three.write_matrix().shape == (2, 7, 2, 3, 5)
    expected = sum(
        torch.einsum("bphk,bphv->bphkv", three.write_key[..., m, :], three.write_value[..., m, :]) for m in range(3)
    )
    assert distance(three.write_matrix(), expected) <= 1e-15
    by_hand = torch.outer(one.write_key[1, 4, 0], one.write_value[1, 4, 0])
    assert torch.equal(one.write_matrix()[1, 4, 0], by_hand)


def test_slices_of_positions_and_heads():
    factors = random_factors(7, heads=3, erase="tied")
    assert factors.at(slice(2, 5)).length == 3
    assert torch.equal(factors.at(slice(2, 5)).query, factors.query[:, 2:5])
    assert torch.equal(factors.heads(slice(1, 2)).erase_strength, factors.erase_strength[:, :, 1:2])
    assert (factors.d_k, factors.d_v, factors.vector_decay) == (3, 5, False)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_states_are_never_narrower_than_float32(dtype, expected):
    assert state_dtype(dtype) == expected
    zero = random_factors(dtype=dtype).zero_state()
    assert zero.dtype == expected and zero.shape == (2, 2, 3, 5) and not zero.any()
    assert random_factors(dtype=dtype).write_matrix().dtype == expected


def test_factors_are_frozen():
    factors = random_factors()
    with pytest.raises(AttributeError):
        factors.query = factors.query
    assert isinstance(factors, Factors)
