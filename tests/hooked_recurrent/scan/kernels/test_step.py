"""The step kernel, interpreted, against the step reference in float64 on the same (rounded) inputs."""

from dataclasses import replace

import pytest
import torch

from hooked_recurrent.scan.kernels import device
from hooked_recurrent.scan.kernels import step as kernel
from hooked_recurrent.scan.kernels.step import triton_step
from hooked_recurrent.scan.step import step_scan
from tests.hooked_recurrent.models import random_factors, random_state

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
FORMS = [("none", None), ("tied", None), ("decoupled", None), ("none", 1), ("none", 2), ("decoupled", 3)]


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """A kernel that reads what nobody wrote, or leaves a gap in its output, gives NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def rounded(factors, dtype):
    """As a model gives them: decay and erase strength stay float32."""
    changed = {name: tensor.to(dtype) for name, tensor in vars(factors).items() if tensor is not None}
    kept = {name: vars(factors)[name].float() for name in ("log_decay", "erase_strength") if name in changed}
    return type(factors)(**changed | kept)


def error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def check(factors, state, bound, **options):
    """The kernel's read and state against the reference's; what it was given must not have changed."""
    given = state.clone()
    expected_read, expected_state = step_scan(factors.map(torch.Tensor.double), state.double())
    read, after = triton_step(factors, state, **options)
    assert read.dtype == after.dtype == torch.float32
    assert error(read, expected_read) < bound and error(after, expected_state) < bound
    if options.get("in_place"):
        assert after is state
    else:
        assert torch.equal(state, given) and after.is_contiguous()


@pytest.mark.parametrize("widths", [(16, 16), (48, 80)], ids=str)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("vector_decay", [False, True])
@pytest.mark.parametrize(("form", "terms"), FORMS)
def test_equals_the_reference(form, terms, vector_decay, dtype, widths):
    d_k, d_v = widths
    factors = random_factors(1, d_k=d_k, d_v=d_v, erase=form, terms=terms, vector_decay=vector_decay)
    factors = rounded(factors, dtype)
    check(factors, random_state(factors).float(), BOUNDS[dtype])


@pytest.mark.parametrize("widths", [(3, 5), (1, 1), (128, 64), (256, 16), (17, 256)], ids=str)
@pytest.mark.parametrize("few", [1, 10**6])
def test_any_width_in_either_block(widths, few, monkeypatch):
    monkeypatch.setattr(kernel, "FEW_PROGRAMS", few)
    factors = random_factors(1, heads=1, d_k=widths[0], d_v=widths[1], erase="tied", dtype=torch.float32)
    assert kernel._blocks(factors)["BLOCK_V"] == (32 if few == 1 else 16)
    check(factors, random_state(factors), 1e-4)


@pytest.mark.parametrize("vector_decay", [False, True])
@pytest.mark.parametrize("form", ["none", "tied", "decoupled"])
def test_strong_decay(form, vector_decay):
    factors = random_factors(1, d_k=16, d_v=16, erase=form, vector_decay=vector_decay, strong=True, dtype=torch.float32)
    check(factors, random_state(factors, size=100.0), 1e-4)
    nothing_kept = replace(factors, log_decay=torch.full_like(factors.log_decay, -torch.inf))
    check(nothing_kept, random_state(factors), 1e-4)


@pytest.mark.parametrize("in_place", [False, True])
def test_any_strides(in_place):
    """Slices of one projection, a position out of several, and a state that stands inside a larger one."""
    long = random_factors(3, d_k=24, d_v=20, erase="decoupled", terms=2, vector_decay=True, dtype=torch.float32)
    factors = long.map(lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2)).at(slice(1, 2))
    joined = torch.cat([factors.query, factors.erase, factors.probe], dim=-1)
    query, erase, probe = joined.split(24, dim=-1)
    factors = replace(factors, query=query, erase=erase, probe=probe)
    assert not factors.query.is_contiguous() and not factors.write_key.is_contiguous()
    state = random_state(factors)
    inside = torch.zeros(2, 2, 30, 50)[:, :, 2:26, 7:27].copy_(state)
    check(factors, inside, 1e-4, in_place=in_place)


def test_a_strided_last_axis_is_copied():
    factors = random_factors(1, d_k=24, d_v=20, erase="decoupled", dtype=torch.float32)
    strided = factors.map(lambda tensor: tensor.mT.contiguous().mT if tensor.ndim == 4 else tensor)
    assert strided.query.stride(-1) != 1
    check(strided, random_state(factors).mT.contiguous().mT, 1e-4)


def test_one_state_for_every_row_and_a_narrow_state():
    factors = random_factors(1, batch=3, d_k=16, d_v=16, erase="tied", dtype=torch.float32)
    check(factors, random_state(factors)[:1], 1e-4)
    check(factors, random_state(factors).bfloat16(), 1e-4)


@pytest.mark.parametrize("in_place", [False, True])
def test_steps_follow_each_other(in_place):
    factors = random_factors(6, d_k=16, d_v=32, erase="tied", dtype=torch.float32)
    state = random_state(factors)
    expected_read, expected_state = step_scan(factors.map(torch.Tensor.double), state.double())
    reads = []
    for index in range(6):
        read, state = triton_step(factors.at(slice(index, index + 1)), state, in_place=in_place)
        reads.append(read)
    assert error(torch.cat(reads, dim=1), expected_read) < 1e-4
    assert error(state, expected_state) < 1e-4


def test_in_place_writes_into_the_given_memory():
    factors = random_factors(1, d_k=16, d_v=16, erase="tied", dtype=torch.float32)
    state = random_state(factors)
    alias = state.view(-1)
    _, after = triton_step(factors, state, in_place=True)
    assert torch.equal(alias, after.flatten())


def test_an_empty_batch():
    factors = random_factors(1, d_k=16, d_v=16, dtype=torch.float32).map(lambda tensor: tensor[:0])
    read, state = triton_step(factors, torch.zeros(0, 2, 16, 16))
    assert read.shape == (0, 1, 2, 16) and state.shape == (0, 2, 16, 16)


def test_what_is_refused():
    factors = random_factors(1, d_k=16, d_v=16, dtype=torch.float32)
    state = random_state(factors)
    with pytest.raises(ValueError, match="takes one position, these factors have 2"):
        triton_step(random_factors(2, d_k=16, d_v=16, dtype=torch.float32), state)
    with pytest.raises(ValueError, match="computes in float32"):
        triton_step(factors.map(torch.Tensor.double), state)
    with pytest.raises(ValueError, match="computes in float32"):
        triton_step(factors, state.double())
    with pytest.raises(ValueError, match=r"expected a state \(2, 2, 16, 16\) or one row of it, got \(2, 2, 16, 17\)"):
        triton_step(factors, torch.zeros(2, 2, 16, 17))
    with pytest.raises(ValueError, match="widths up to 256, got d_k = 16 and d_v = 257"):
        triton_step(random_factors(1, d_k=16, d_v=257, dtype=torch.float32), torch.zeros(2, 2, 16, 257))
    for wrong in (state[:1], state[:1].expand(2, -1, -1, -1), state.bfloat16(), state.mT):
        with pytest.raises(ValueError, match="overwritten only when"):
            triton_step(factors, wrong, in_place=True)


def test_a_gradient_is_refused_and_not_zero():
    factors = random_factors(1, d_k=16, d_v=16, dtype=torch.float32)
    read, _ = triton_step(replace(factors, query=factors.query.requires_grad_()), random_state(factors))
    with pytest.raises(RuntimeError, match="no autograd formula"):
        read.sum().backward()


def test_without_a_gpu_it_says_so(monkeypatch):
    factors = random_factors(1, d_k=16, d_v=16, dtype=torch.float32)
    monkeypatch.setattr(device, "INTERPRETED", False)
    assert not device.runs_on(torch.device("cpu")) and device.runs_on(torch.device("cuda", 1))
    with pytest.raises(RuntimeError, match="run on a GPU, not on cpu; with TRITON_INTERPRET=1"):
        triton_step(factors, random_state(factors))


@pytest.mark.parametrize("form", ["none", "tied", "decoupled"])
def test_the_operators_are_what_they_say(form):
    """Schema, fake tensors and ahead-of-time dispatch, by torch's own checks."""
    factors = random_factors(1, d_k=16, d_v=20, erase=form, dtype=torch.float32)
    given = (random_state(factors), *(getattr(factors, name) for name in kernel.NAMES))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.hooked_recurrent.step.default, given, test_utils=checks)
    torch.library.opcheck(torch.ops.hooked_recurrent.step_in_place.default, given, test_utils=checks)
