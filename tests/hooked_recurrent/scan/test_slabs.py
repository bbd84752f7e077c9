"""How the chunked scan cuts its work: slabs of chunks, groups of rows, and the gradient that makes both again."""

from dataclasses import replace

import pytest
import torch

from hooked_recurrent.scan import chunked
from hooked_recurrent.scan.chunked import chunked_scan, slabs
from hooked_recurrent.scan.slab import stack, unstack
from hooked_recurrent.scan.step import step_scan
from tests.hooked_recurrent.models import distance, random_factors, random_state

FORMS = [("none", None), ("tied", None), ("decoupled", None), ("decoupled", 2)]
over_forms = pytest.mark.parametrize(("erase", "terms"), FORMS)
over_decays = pytest.mark.parametrize("vector_decay", [False, True], ids=["scalar", "vector"])


def gradients(scan, factors, state, loss, **options):
    """Read, final state, and the gradient of a loss of both for every input."""
    names = [name for name, tensor in vars(factors).items() if tensor is not None]
    inputs = [getattr(factors, name).clone().requires_grad_() for name in names]
    before = state.clone().requires_grad_()
    read, after = scan(replace(factors, **dict(zip(names, inputs, strict=True))), before, **options)
    made = torch.autograd.grad(loss(read, after), [*inputs, before], allow_unused=True)
    return [read, after, *(torch.zeros(()) if grad is None else grad for grad in made)]


def small(monkeypatch, factors, chunk_size, chunks=2, rows=1):
    """Limits that leave `chunks` chunks to a slab and `rows` rows to a group."""
    heads, d_k, d_v = factors.query.shape[2], factors.d_k, factors.d_v
    monkeypatch.setattr(chunked, "STATE_BYTES", rows * heads * d_k * d_v * 4)
    terms = factors.write_key.shape[3] if factors.write_key.ndim == 5 else 1
    per_row = heads * ((3 + terms) * d_k + (1 + terms) * d_v) * 4
    monkeypatch.setattr(chunked, "SLAB_BYTES", chunks * chunk_size * rows * per_row)


def test_slabs_cover_every_position_once(monkeypatch):
    factors = random_factors(23, batch=1, erase="tied")
    small(monkeypatch, factors, chunk_size=4)
    assert slabs(factors, 4) == [(0, 8, 4), (8, 16, 4), (16, 20, 4), (20, 23, 3)]
    monkeypatch.setattr(chunked, "SLAB_BYTES", 1)
    assert slabs(factors, 4) == [(0, 4, 4), (4, 8, 4), (8, 12, 4), (12, 16, 4), (16, 20, 4), (20, 23, 3)]


def test_stacks_come_apart_again():
    parts = list(torch.randn(3, 2, 12, 3, 5))
    stacked = stack(parts, 4)
    assert stacked.shape == (3, 6, 3, 4, 5)
    assert all(torch.equal(one, other) for one, other in zip(unstack(stacked, 2), parts, strict=True))


@over_forms
@over_decays
@pytest.mark.parametrize("shared", [False, True], ids=["a state per row", "one state"])
def test_slabs_and_groups_change_no_number(monkeypatch, erase, terms, vector_decay, shared):
    """Three rows in groups of two, 23 positions in slabs of two chunks of four: reads, state and all gradients."""
    factors = random_factors(23, batch=3, erase=erase, terms=terms, vector_decay=vector_decay)
    state = random_state(factors)[: 1 if shared else 3]

    def loss(read, after):
        return read.sin().sum() + after.cos().sum()

    expected = gradients(step_scan, factors, state, loss)
    small(monkeypatch, factors, chunk_size=4, rows=2)
    found = gradients(chunked_scan, factors, state, loss, chunk_size=4)
    assert all(distance(a, b) <= 1e-11 for a, b in zip(found, expected, strict=True))
    read, after = chunked_scan(factors, state, chunk_size=4)
    assert distance(read, expected[0]) <= 1e-11 and distance(after, expected[1]) <= 1e-11


@over_forms
@over_decays
@pytest.mark.parametrize("of", ["read", "state"])
def test_a_loss_of_one_output_alone(monkeypatch, erase, terms, vector_decay, of):
    factors = random_factors(23, batch=1, erase=erase, terms=terms, vector_decay=vector_decay)
    state = random_state(factors)

    def loss(read, after):
        return (read if of == "read" else after).sin().sum()

    small(monkeypatch, factors, chunk_size=4)
    expected = gradients(step_scan, factors, state, loss)
    found = gradients(chunked_scan, factors, state, loss, chunk_size=4)
    assert all((a - b).abs().max() <= 1e-10 for a, b in zip(found, expected, strict=True))


@over_forms
def test_the_gradient_of_a_gradient_is_that_of_the_reference(erase, terms):
    factors = random_factors(7, batch=1, erase=erase, terms=terms)
    state = random_state(factors)
    found = []
    for scan in (step_scan, lambda f, s: chunked_scan(f, s, chunk_size=2)):
        key, before = factors.write_key.clone().requires_grad_(), state.clone().requires_grad_()
        read, _ = scan(replace(factors, write_key=key), before)
        (slope,) = torch.autograd.grad(read.sin().sum(), key, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [key, before]))
    assert all(distance(a, b) <= 1e-11 for a, b in zip(*found, strict=True))


def test_gradients_have_the_dtype_of_their_inputs():
    narrow = random_factors(20, erase="tied", dtype=torch.bfloat16)
    names = [name for name, tensor in vars(narrow).items() if tensor is not None]
    inputs = [getattr(narrow, name).clone().requires_grad_() for name in names]
    read, _ = chunked_scan(replace(narrow, **dict(zip(names, inputs, strict=True))))
    expected = gradients(
        step_scan, narrow.map(torch.Tensor.double), random_state(narrow).double() * 0, lambda r, s: r.sum()
    )
    made = torch.autograd.grad(read.sum(), inputs)
    assert {grad.dtype for grad in made} == {torch.bfloat16}
    assert all(distance(a.double(), b) <= 1e-2 for a, b in zip(made, expected[2:-1], strict=True))


def test_nothing_of_the_size_of_a_state_per_position_is_made():
    """The largest tensor that autograd keeps, or that a pass makes, is far from [pos, d_k, d_v]."""
    factors = random_factors(512, batch=1, heads=1, d_k=64, d_v=64, dtype=torch.float32)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                t.untyped_storage().nbytes()
                for t in torch.utils._pytree.tree_leaves(out)
                if isinstance(t, torch.Tensor)
            )
            return out

    value = factors.write_value.clone().requires_grad_()
    with Watch():
        read, after = chunked_scan(replace(factors, write_value=value))
        (read.sum() + after.sum()).backward()
    assert max(sizes) < 512 * 64 * 64 * 4 / 8


@over_forms
def test_transforms_of_torch_func_pass_through(erase, terms):
    """grad, and forward mode through jvp."""
    factors = random_factors(5, batch=1, heads=1, d_k=2, d_v=3, erase=erase, terms=terms)

    def loss(key):
        return chunked_scan(replace(factors, write_key=key), chunk_size=2)[0].sin().sum()

    key = factors.write_key.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(key), key)
    assert distance(torch.func.grad(loss)(factors.write_key), expected) <= 1e-12
    along = torch.randn_like(factors.write_key)
    _, slope = torch.func.jvp(loss, (factors.write_key,), (along,))
    assert abs(slope - (expected * along).sum()) <= 1e-12
