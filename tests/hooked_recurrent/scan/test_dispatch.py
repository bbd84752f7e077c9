"""Which backend runs, and what it refuses."""

import pytest
import torch

from hooked_recurrent.scan import dispatch
from hooked_recurrent.scan.chunked import chunked_scan, default_chunk_size
from hooked_recurrent.scan.dispatch import scan
from hooked_recurrent.scan.step import step_scan
from tests.hooked_recurrent.models import distance, random_factors, random_state


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="unknown scan backend 'fast'; expected one of auto, step, chunked, triton"):
        scan(random_factors(), backend="fast")


@pytest.mark.parametrize("matrices", ["writes", "on_state"])
def test_the_chunked_scan_refuses_matrices(matrices):
    factors = random_factors()
    given = {"writes": factors.write_matrix()} if matrices == "writes" else {"on_state": lambda state, index: state}
    with pytest.raises(ValueError, match="holds no per-token matrices"):
        scan(factors, backend="chunked", **given)


def test_a_chunk_has_at_least_one_position():
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        chunked_scan(random_factors(), chunk_size=0)


@pytest.mark.parametrize(
    ("length", "asked", "expected"),
    [
        (1, {}, "decode_step"),
        (1, {"want_state": False}, "chunked_scan"),
        (2, {}, "chunked_scan"),
        (9, {"backend": "step"}, "step_scan"),
        (1, {"backend": "chunked"}, "chunked_scan"),
    ],
)
def test_auto_decodes_single_tokens_and_chunks_the_rest(monkeypatch, length, asked, expected):
    ran = []
    for name in ("step_scan", "decode_step", "chunked_scan"):
        original = getattr(dispatch, name)
        monkeypatch.setattr(dispatch, name, lambda *a, n=name, o=original, **k: (ran.append(n), o(*a, **k))[1])
    scan(random_factors(length), **asked)
    assert ran == [expected]


def test_matrices_written_and_states_hooked_make_auto_step():
    factors = random_factors(9, erase="tied")
    initial = random_state(factors)
    seen = []

    def double(state, index):
        seen.append((index, state.shape))
        return 2 * state if index == 3 else state

    read, state = scan(factors, initial, writes=factors.write_matrix(), on_state=double)
    assert seen == [(index, (2, 1, 2, 3, 5)) for index in range(9)]
    # by hand: the state that the hook returns is read at once and carried on
    first, middle = step_scan(factors.at(slice(0, 4)), initial)
    second, last = step_scan(factors.at(slice(4, 9)), 2 * middle)
    assert distance(read[:, 4:], second) <= 1e-12 and distance(state, last) <= 1e-12
    assert distance(read[:, 3], 2 * first[:, 3]) <= 1e-12
    assert torch.equal(read[:, :3], first[:, :3])


def test_written_matrices_take_the_place_of_the_factors():
    factors = random_factors(9, erase="tied")
    other = torch.randn_like(factors.write_matrix())
    _, state = scan(factors, writes=other)
    _, without = scan(factors, writes=torch.zeros_like(other))
    _, native = scan(factors)
    _, also_native = scan(factors, writes=factors.write_matrix())
    assert distance(native, also_native) <= 1e-12
    assert torch.count_nonzero(without) == 0
    assert distance(state, native) > 0.1


@pytest.mark.parametrize(("d_k", "vector", "size"), [(8, False, 32), (63, True, 32), (64, False, 16)])
def test_default_chunk_size(d_k, vector, size):
    assert default_chunk_size(random_factors(2, d_k=d_k, vector_decay=vector)) == size


def test_why_triton_cannot_run_is_said_where_it_is_asked_for_by_name():
    wide = random_factors(9)
    with pytest.raises(ValueError, match="float64"):
        scan(wide, backend="triton")
    with pytest.raises(ValueError, match="the triton scan holds no per-token matrices"):
        scan(wide.map(torch.Tensor.float), backend="triton", on_state=lambda state, index: state)


@pytest.mark.parametrize("length", [1, 9])
def test_triton_by_name_runs_its_kernels(length):
    factors = random_factors(length, batch=1, heads=1, d_k=16, d_v=16, erase="tied", dtype=torch.float32)
    initial = random_state(factors)
    expected = step_scan(factors.map(torch.Tensor.double), initial.double())
    for got, reference in zip(scan(factors, initial, backend="triton"), expected, strict=True):
        assert distance(got.double(), reference) <= 1e-4


def test_on_a_gpu_auto_takes_triton_or_says_once_why_not(monkeypatch, recwarn):
    wide = random_factors(9)
    narrow = wide.map(torch.Tensor.float)
    monkeypatch.setattr(dispatch, "on_gpu", lambda factors: True)
    dispatch._warn_once.cache_clear()
    assert dispatch.choose(narrow, None, matrices=False, backend="auto") == "triton"
    assert [dispatch.choose(wide, None, matrices=False, backend="auto") for _ in range(3)] == ["chunked"] * 3
    assert len(recwarn) == 1 and "float64" in str(recwarn[0].message)
