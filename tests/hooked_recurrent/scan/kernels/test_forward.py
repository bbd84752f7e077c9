"""The kernels of the forward scan, interpreted, against the step reference in float64 on the same (rounded) inputs."""

from dataclasses import replace

import pytest
import torch

from hooked_recurrent.scan.kernels.forward import carry
from hooked_recurrent.scan.kernels.layout import Precision, Sequences
from hooked_recurrent.scan.kernels.prepare import prepare
from hooked_recurrent.scan.kernels.scan import triton_scan
from hooked_recurrent.scan.step import step_scan
from tests.hooked_recurrent.models import random_factors, random_state

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
FORMS = [("none", None), ("none", 2), ("tied", None), ("decoupled", None), ("decoupled", 2)]


def error(out, reference):
    assert out.shape == reference.shape
    return ((out.double() - reference).norm() / reference.norm()).item()


def reference(factors, initial):
    return step_scan(factors.map(lambda tensor: tensor.double()), None if initial is None else initial.double())


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch):
    """Every kernel meets NaN wherever nobody has written."""
    fresh = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: fresh(*a, **k).fill_(float("nan")))


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize(("erase", "terms"), FORMS)
@pytest.mark.parametrize("vector_decay", [False, True])
def test_equals_the_step_reference(vector_decay, erase, terms, strong):
    sizes = {"length": 70 if not vector_decay else 20, "batch": 1, "heads": 2, "d_k": 16, "d_v": 32}
    factors = random_factors(
        **sizes, erase=erase, terms=terms, vector_decay=vector_decay, strong=strong, dtype=torch.float32
    )
    initial = random_state(factors)
    result = triton_scan(factors, initial)
    for out, expected in zip(result[:2], reference(factors, initial), strict=True):
        assert error(out, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("vector_decay", [False, True])
@pytest.mark.parametrize(("erase", "terms"), [("none", 2), ("tied", None), ("decoupled", 2)])
def test_snapshots_are_states_of_the_step_reference(erase, terms, vector_decay):
    length, positions = (70, [0, 1, 40, 64, 65, 70]) if not vector_decay else (18, [0, 7, 16, 18])
    factors = random_factors(
        length,
        batch=2,
        heads=1,
        d_k=16,
        d_v=16,
        erase=erase,
        terms=terms,
        vector_decay=vector_decay,
        dtype=torch.float32,
    )
    initial = random_state(factors)
    snapshots = triton_scan(factors, initial, snapshots=positions).snapshots
    for position, snapshot in zip(positions, snapshots, strict=True):
        _, expected = reference(factors.at(slice(0, position)), initial) if position else (None, initial.double())
        assert error(snapshot, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("vector_decay", [False, True])
@pytest.mark.parametrize("erase", ["none", "tied", "decoupled"])
def test_packed_sequences_do_not_see_each_other(erase, vector_decay):
    bounds = [0, 5, 5, 71, 90] if not vector_decay else [0, 3, 3, 20]
    factors = random_factors(
        bounds[-1], batch=1, heads=2, d_k=16, d_v=16, erase=erase, vector_decay=vector_decay, dtype=torch.float32
    )
    each = [factors.at(slice(start, stop)) for start, stop in zip(bounds, bounds[1:], strict=False)]
    initial = torch.cat([random_state(factors, seed=seed) for seed in range(len(each))])
    result = triton_scan(factors, initial, cu_lengths=torch.tensor(bounds))
    for index, one in enumerate(each):
        start, stop = bounds[index : index + 2]
        if start == stop:  # nothing happens in a sequence without positions
            assert torch.equal(result.state[index], initial[index])
            continue
        read, state = reference(one, initial[index : index + 1])
        assert error(result.read[:, start:stop], read) < TOLERANCE[torch.float32]
        assert error(result.state[index : index + 1], state) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("d_k", "d_v"), [(48, 80), (80, 48), (256, 16), (17, 250), (128, 64)])
@pytest.mark.parametrize("vector_decay", [False, True])
def test_any_width_up_to_256(d_k, d_v, vector_decay):
    erase = "tied" if vector_decay else "decoupled"
    factors = random_factors(
        18, batch=1, heads=1, d_k=d_k, d_v=d_v, erase=erase, vector_decay=vector_decay, dtype=torch.float32
    )
    initial = random_state(factors)
    result = triton_scan(factors, initial, snapshots=[17])
    read, state = reference(factors, initial)
    assert error(result.read, read) < TOLERANCE[torch.float32]
    assert error(result.state, state) < TOLERANCE[torch.float32]
    assert error(result.snapshots[0], reference(factors.at(slice(0, 17)), initial)[1]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("erase", ["none", "tied", "decoupled"])
def test_16_bit_inputs_are_rounded_once(dtype, erase):
    """Decay and strength often stay in float32 while the rest is narrow; the state is float32 throughout."""
    factors = random_factors(37, batch=1, heads=2, d_k=32, d_v=16, erase=erase, dtype=torch.float32)
    kept = {"log_decay": factors.log_decay, "erase_strength": factors.erase_strength}
    factors = replace(factors.map(lambda tensor: tensor.to(dtype)), **kept)
    initial = random_state(factors)
    result = triton_scan(factors, initial)
    assert result.read.dtype == result.state.dtype == torch.float32
    for out, expected in zip(result[:2], reference(factors, initial), strict=True):
        assert error(out, expected) < TOLERANCE[torch.float32]  # products are interpreted in float32


@pytest.mark.parametrize("vector_decay", [False, True])
def test_strides_and_a_state_that_serves_every_row(vector_decay):
    sizes = {"d_k": 16, "d_v": 16, "erase": "decoupled", "terms": 2, "vector_decay": vector_decay}
    factors = random_factors(5, batch=2, heads=2, **sizes, dtype=torch.float32)
    initial = random_state(factors)[:1]

    def strided(tensor):
        """[head, pos, batch] in memory, the last axis in every second number for the rows whose copy is made."""
        apart = torch.stack([tensor, torch.full_like(tensor, float("nan"))], dim=-1)
        return (
            apart.permute(2, 1, 0, *range(3, apart.ndim)).contiguous().permute(2, 1, 0, *range(3, apart.ndim))[..., 0]
        )

    def shared(tensor):
        """The last row for all, with a stride of 0."""
        return tensor[-1:].expand(2, *tensor.shape[1:])

    for change in (strided, shared):
        changed = factors.map(change)
        result = triton_scan(changed, initial.mT.contiguous().mT)
        read, state = reference(changed, initial.expand(2, -1, -1, -1))
        assert error(result.read, read) < TOLERANCE[torch.float32]
        assert error(result.state, state) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("vector_decay", [False, True])
def test_a_strong_decay_leaves_later_weak_ones_their_precision(vector_decay):
    """Sums of log decays pass -3000, where float32 tells only every 2e-4; what decays after that is still exact."""
    factors = random_factors(16, batch=1, heads=1, d_k=16, d_v=16, vector_decay=vector_decay, dtype=torch.float32)
    factors.log_decay[:, 2] = -3e3
    for out, expected in zip(triton_scan(factors)[:2], reference(factors, None), strict=True):
        assert error(out, expected) < 1e-6


@pytest.mark.parametrize("vector_decay", [False, True])
def test_everything_may_be_forgotten_at_once(vector_decay):
    sizes = {"d_k": 16, "d_v": 16, "vector_decay": vector_decay}
    factors = random_factors(9, batch=1, heads=2, **sizes, erase="tied", dtype=torch.float32)
    factors.log_decay[:, 3, 1] = -torch.inf
    initial = random_state(factors)
    result = triton_scan(factors, initial, snapshots=[5])
    for out, expected in zip(result[:2], reference(factors, initial), strict=True):
        assert error(out, expected) < TOLERANCE[torch.float32]
    assert error(result.snapshots[0], reference(factors.at(slice(0, 5)), initial)[1]) < TOLERANCE[torch.float32]


def test_an_empty_start_and_no_final_state():
    factors = random_factors(1, batch=2, heads=1, d_k=16, d_v=16, erase="tied", dtype=torch.float32)
    result = triton_scan(factors, want_state=False)
    assert result.state is None and result.snapshots == []
    assert error(result.read, reference(factors, None)[0]) < TOLERANCE[torch.float32]


def test_what_cannot_be_asked_for():
    factors = random_factors(4, batch=2, heads=1, d_k=16, d_v=16, dtype=torch.float32)
    with pytest.raises(ValueError, match="one batch row"):
        triton_scan(factors, cu_lengths=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="from 0 to 4, got \\[5\\]"):
        triton_scan(factors, snapshots=[5])


@pytest.mark.parametrize("vector_decay", [False, True])
@pytest.mark.parametrize(("erase", "terms"), [("none", None), ("tied", None), ("decoupled", 2)])
def test_prepared_rows_without_a_position_are_zero(erase, terms, vector_decay):
    """The adjoint multiplies whole blocks, so nothing may be left as it was."""
    sizes = {"d_k": 16, "d_v": 16, "erase": erase, "terms": terms, "vector_decay": vector_decay}
    factors = random_factors(5, batch=1, heads=1, **sizes, dtype=torch.float32)
    prepared = prepare(factors, Sequences.of_batch(1, 5, 16, torch.device("cpu")), keep_prober=True)
    kept = {name: value for name, value in vars(prepared).items() if value is not None}
    assert ("prober" in kept) == (erase != "none")
    for name, value in kept.items():
        assert torch.isfinite(value).all(), name
        if name == "solver":  # the inverse of I
            assert torch.equal(value[..., 5:, :], torch.eye(16)[5:].expand_as(value[..., 5:, :]))
        elif name != "whole":
            assert (value[..., 5:, :] == 0).all(), name


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_carry_in_either_direction(per_channel, reverse):
    """The map of every chunk, y = given + asks S and S' = whole S + carrier^T y + injector^T values, written out in torch."""
    bounds, size, heads, d_k, d_v = [0, 35, 41], 16, 2, 24, 40
    sequences = Sequences.packed(torch.tensor(bounds), size, torch.device("cpu"))
    whole = torch.rand(4, heads, d_k if per_channel else 1)
    asks, carrier, injector = 0.2 * torch.randn(3, 4, heads, size, d_k)
    given, value = torch.randn(4, heads, size, d_v), torch.randn(1, 41, heads, d_v)
    initial = torch.randn(2, heads, d_k, d_v)
    y, states, final = carry(
        sequences,
        whole=whole,
        solved_prober=asks,
        solved_given=given,
        carrier=carrier,
        injector=injector[:, :, None],
        value=value,
        initial_state=initial,
        d_k=d_k,
        precision=Precision.of(torch.float32),
        reverse=reverse,
    )
    for sequence, chunks in enumerate([[0, 1, 2], [3]]):
        state = initial[sequence].double()
        for chunk in reversed(chunks) if reverse else chunks:
            assert error(states[chunk], state) < 1e-6
            found = given[chunk] + asks[chunk].double() @ state
            assert error(y[chunk], found) < 1e-6
            _, start, count = sequences.chunks[chunk].tolist()
            values = torch.zeros(heads, size, d_v, dtype=torch.float64)
            values[:, :count] = value[0, start : start + count].transpose(0, 1)
            state = whole[chunk][..., None] * state + carrier[chunk].double().mT @ found
            state = state + injector[chunk].double().mT @ values
        assert error(final[sequence], state) < 1e-6
