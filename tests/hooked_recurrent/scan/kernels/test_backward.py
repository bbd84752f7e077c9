"""Gradients of the Triton scan, interpreted, against those of the step reference in float64 on the same (rounded) inputs."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hooked_recurrent.scan.kernels import operators
from hooked_recurrent.scan.kernels.scan import triton_scan
from hooked_recurrent.scan.step import step_scan
from tests.hooked_recurrent.models import random_factors, random_state

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
FORMS = {
    "plain": {"erase": "none"},
    "plain, two writes": {"erase": "none", "terms": 2},
    "tied": {"erase": "tied"},
    "decoupled": {"erase": "decoupled"},
    "decoupled, two writes": {"erase": "decoupled", "terms": 2},
}
DECAYS = {"weak": 1e-4, "strong": 5.0, "mixed up to e^-20": None}


def small(length=21, *, batch=1, heads=1, d_k=16, d_v=16, dtype=torch.float32, level=None, **form):
    """Factors rounded to a dtype. Log decays are about -level, or from nearly 0 to -20 within a sequence."""
    sizes = {"batch": batch, "heads": heads, "d_k": d_k, "d_v": d_v}
    factors = random_factors(length, strong=level is None, **sizes, **form)
    if level is not None:
        factors = replace(factors, log_decay=-level * (0.5 + torch.rand_like(factors.log_decay)))
    return factors.map(lambda tensor: tensor.to(dtype))


def leaves_of(factors, initial, dtype=None):
    """The same with every tensor a leaf that wants a gradient; the leaves by name."""
    present = {name: tensor for name, tensor in {**vars(factors), "initial": initial}.items() if tensor is not None}
    leaves = {name: tensor.detach().to(dtype or tensor.dtype).requires_grad_() for name, tensor in present.items()}
    roles = {name: leaf for name, leaf in leaves.items() if name != "initial"}
    return replace(factors, **roles), leaves.get("initial"), leaves


def gradients(scan, factors, initial, dtype=None):
    """Of a sum over what the scan returns, each weighted by numbers that depend on its shape alone."""
    factors, initial, leaves = leaves_of(factors, initial, dtype)
    loss = 0.0
    for seed, out in enumerate(scan(factors, initial)):
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        loss = loss + (out.double() * weight).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def assert_equal_gradients(factors, initial, scan=lambda f, s: triton_scan(f, s)[:2], reference=step_scan):
    expected = gradients(reference, factors, initial, torch.float64)
    found = gradients(scan, factors, initial)
    tolerance = TOLERANCE[factors.query.dtype]
    for name, gradient in found.items():
        wanted, given = expected[name], initial if name == "initial" else getattr(factors, name)
        assert gradient.dtype == given.dtype and gradient.shape == given.shape
        assert (gradient.double() - wanted).norm() <= tolerance * wanted.norm(), name


@pytest.fixture
def poisoned(monkeypatch):
    """Every kernel meets NaN wherever nobody has written."""
    fresh = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: fresh(*a, **k).fill_(float("nan")))


# Interpreted kernels take seconds, those of vector decays most: every form with mixed decays, a few with each of the others.
CASES = [(form, "mixed up to e^-20") for form in FORMS] + [("tied", "weak"), ("tied", "strong")]


@pytest.mark.parametrize(("form", "decay"), CASES)
@pytest.mark.parametrize("vector_decay", [False, True], ids=["scalar", "vector"])
def test_gradients_equal_those_of_the_step_reference(vector_decay, form, decay, poisoned):
    # A whole chunk and a remainder; 16 and 32 are the sizes of chunks.
    factors = small(18 if vector_decay else 35, vector_decay=vector_decay, level=DECAYS[decay], **FORMS[form])
    assert_equal_gradients(factors, random_state(factors).float())


@pytest.mark.parametrize("vector_decay", [False, True], ids=["scalar", "vector"])
def test_gradients_where_everything_is_forgotten_at_once(vector_decay, poisoned):
    factors = small(9, vector_decay=vector_decay, level=0.1, erase="tied")
    factors.log_decay[:, 3] = -torch.inf
    assert_equal_gradients(factors, random_state(factors).float())


@pytest.mark.parametrize(
    ("vector_decay", "dtype"), [(False, torch.bfloat16), (False, torch.float16), (True, torch.bfloat16)]
)
def test_gradients_of_half_precision(vector_decay, dtype, poisoned):
    factors = small(18 if vector_decay else 70, vector_decay=vector_decay, dtype=dtype, level=0.1, erase="tied")
    mixed = replace(factors, log_decay=factors.log_decay.float(), erase_strength=factors.erase_strength.float())
    assert_equal_gradients(mixed, random_state(factors).float())


@pytest.mark.parametrize(
    ("d_k", "d_v", "vector_decay", "form"),
    [
        (48, 80, False, "decoupled, two writes"),
        (80, 48, False, "tied"),
        (256, 20, False, "plain"),
        (48, 24, True, "tied"),
        (20, 80, True, "plain"),
    ],
)
def test_gradients_of_other_widths(d_k, d_v, vector_decay, form, poisoned):
    factors = small(9, d_k=d_k, d_v=d_v, vector_decay=vector_decay, level=0.1, **FORMS[form])
    assert_equal_gradients(factors, random_state(factors).float())


@pytest.mark.parametrize("form", ["plain, two writes", "decoupled"])
def test_any_strides_and_rows_and_heads(form, poisoned):
    """Views into wider tensors, tensors with heads outside of positions, and some whose last axis is not contiguous."""
    factors = small(6, batch=2, heads=2, level=0.1, **FORMS[form])
    layouts = [
        lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t.transpose(1, -1).contiguous().transpose(1, -1),
    ]

    def scan(plain, initial):
        views = [layouts[i % 3](t) if t is not None else None for i, t in enumerate(vars(plain).values())]
        assert not all(view.is_contiguous() for view in views if view is not None)
        return triton_scan(replace(plain, **dict(zip(vars(plain), views, strict=True))), initial)[:2]

    assert_equal_gradients(factors, random_state(factors).float(), scan)


def test_one_initial_state_for_all_rows_gets_the_sum_of_their_gradients(poisoned):
    factors = small(6, batch=3, level=0.1, erase="tied")
    assert_equal_gradients(factors, random_state(factors)[:1].float())


@pytest.mark.parametrize("used", ["read", "state"])
def test_only_one_of_the_results_is_used(used, poisoned):
    """Without an initial state, and with a loss that the other result does not reach."""
    factors, index = small(6, level=0.1, erase="decoupled"), ["read", "state"].index(used)
    one = [lambda f, s, scan=scan: (scan(f, s)[index],) for scan in (triton_scan, step_scan)]
    assert_equal_gradients(factors, None, *one)
    if used == "read":
        assert_equal_gradients(factors, None, lambda f, s: triton_scan(f, s, want_state=False)[:1], one[1])


@pytest.mark.parametrize(("vector_decay", "shared"), [(False, False), (False, True), (True, False)])
def test_packed_sequences_are_sequences_of_their_own(vector_decay, shared, poisoned):
    stops = [0, 2, 2, 19]  # one of them empty
    factors = small(19, vector_decay=vector_decay, level=0.1, erase="tied")
    initial = torch.randn(1 if shared else 3, 1, 16, 16)

    def one_by_one(factors, initial):
        reads, states = [], []
        for index, (start, stop) in enumerate(zip(stops, stops[1:], strict=False)):
            state = initial[[0 if shared else index]]
            if stop > start:
                read, state = step_scan(factors.at(slice(start, stop)), state)
                reads.append(read)
            states.append(state)
        return torch.cat(reads, dim=1), torch.cat(states)

    packed = torch.tensor(stops)
    assert_equal_gradients(factors, initial, lambda f, s: triton_scan(f, s, cu_lengths=packed)[:2], one_by_one)


def test_gradients_pass_through_snapshots(poisoned):
    factors, counts = small(9, batch=2, level=0.1, erase="tied"), [5, 0, 9, 5]

    def scan(factors, initial):
        result = triton_scan(factors, initial, snapshots=counts)
        return result.read, result.state, *result.snapshots

    def reference(factors, initial):
        states = {0: initial}
        read, final = step_scan(factors, initial, on_state=lambda s, at: states.setdefault(at + 1, s[:, 0])[:, None])
        return read, final, *(states[count] for count in counts)

    initial = random_state(factors).float()
    assert_equal_gradients(factors, initial, scan, reference)
    for kept, stretched in zip(scan(factors, initial), scan(*leaves_of(factors, initial)[:2]), strict=True):
        torch.testing.assert_close(kept, stretched.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["plain", "decoupled, two writes"])
def test_operators_keep_the_rules_of_torch(form):
    """Schema, fake tensors and autograd of both operators, as torch's own checker sees them."""
    factors, initial, _ = leaves_of(small(5, **FORMS[form]), torch.randn(1, 1, 16, 16))
    inputs = (*vars(factors).values(), initial, None)
    torch.library.opcheck(operators.scan, (*inputs, [], True))
    inputs = tuple(None if tensor is None else tensor.detach() for tensor in inputs)
    torch.library.opcheck(operators.scan, (*inputs, [2, 5], False))
    torch.library.opcheck(operators.scan_gradient, (*inputs, torch.randn(1, 5, 1, 16), None))


def test_packed_operator_keeps_the_rules_of_torch():
    factors = small(5, erase="tied")
    torch.library.opcheck(operators.scan, (*vars(factors).values(), None, torch.tensor([0, 2, 5]), [], True))


def test_fake_tensors_run_no_kernel(monkeypatch):
    monkeypatch.setattr(operators, "scan_chunks", None)
    with FakeTensorMode() as mode:
        factors, initial, leaves = leaves_of(small(21, batch=2, erase="tied"), torch.randn(1, 1, 16, 16))
        result = triton_scan(factors, initial)
        found = torch.autograd.grad(result.read.sum() + result.state.sum(), list(leaves.values()))
    assert result.read.shape == (2, 21, 1, 16) and result.read.fake_mode is mode
    assert [gradient.shape for gradient in found] == [leaf.shape for leaf in leaves.values()]


def test_compiles_without_a_break_and_gives_the_same(as_users_run):
    factors = small(9, erase="tied", level=0.1)
    initial = random_state(factors).float()
    compiled = torch.compile(lambda f, s: triton_scan(f, s)[:2], backend="aot_eager", fullgraph=True)
    found = gradients(compiled, factors, initial)
    for name, gradient in gradients(lambda f, s: triton_scan(f, s)[:2], factors, initial).items():
        assert torch.equal(found[name], gradient), name


def test_second_derivatives_are_refused():
    factors, initial, leaves = leaves_of(small(5, erase="tied"), None)
    (gradient,) = torch.autograd.grad(triton_scan(factors).read.sum(), leaves["query"], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "options", "word"),
    [
        ({"query": torch.zeros(1, 5, 1, 16, dtype=torch.float64)}, {}, "query of dtype torch.float64"),
        ({}, {"initial_state": torch.zeros(2, 1, 16, 16)}, "initial_state has shape"),
        ({}, {"initial_state": torch.zeros(1, 1, 16, 8)}, "initial_state has shape"),
        ({}, {"cu_lengths": torch.tensor([0, 5]), "snapshots": [2]}, "packed sequences"),
        ({}, {"cu_lengths": torch.tensor([0, 3])}, "cu_lengths"),
        ({}, {"cu_lengths": torch.tensor([0, 4, 3, 5])}, "cu_lengths"),
        ({}, {"snapshots": [6]}, "from 0 to 5"),
    ],
)
def test_wrong_inputs_are_named(change, options, word, as_users_run):
    with pytest.raises(ValueError, match=word):
        triton_scan(replace(small(5, erase="tied"), **change), **options)


def test_too_wide_keys_are_refused():
    with pytest.raises(ValueError, match="d_k = 272"):
        triton_scan(small(2, d_k=272))
