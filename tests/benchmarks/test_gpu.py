"""What can be tested of the GPU script without one: that it refuses, that its checks check, and that every side is given the
same recurrence."""

import inspect
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gpu
import pytest
import torch
from rich.console import Console
from roofline import SHAPES
from support import gpu_checks
from support.gpu_checks import Check, check_conv, check_packed, check_scan, check_step
from support.gpu_routes import PROBLEMS, Draw, Route
from support.traffic import Shape

from hooked_recurrent.scan.kernels.variants import RULES, Case
from hooked_recurrent.scan.step import step_scan
from tests.hooked_recurrent.models import distance

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_refuses_without_a_gpu():
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--checks"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.splitlines() == [gpu.NO_GPU]


def problem(form, *, length=5, dtype=torch.float32):
    return PROBLEMS[form](Draw(2, length, 3, dtype, CPU), 16, 24)


def reference(form, factors, state):
    read, after = step_scan(factors.map(torch.Tensor.double), state.double())
    return read, after


@pytest.mark.parametrize("form", PROBLEMS)
@pytest.mark.parametrize("kind", ["scans", "steps"])
def test_arguments_fit_the_functions_of_other_libraries(form, kind):
    for route in getattr(problem(form), kind):
        if route.module.startswith("mamba_ssm"):  # not on PyPI as a wheel; its signature, from its source, is
            names = [
                "x",
                "dt",
                "A",
                "B",
                "C",
                "chunk_size",
                "D",
                "z",
                "dt_bias",
                "initial_states",
                "seq_idx",
                "cu_seqlens",
            ]
            assert set(route.arguments) <= {*names, "dt_softplus", "dt_limit", "return_final_states"}
            continue
        pytest.importorskip("fla")
        function = route.load()
        inspect.signature(function).bind(**route.arguments)
        parameters = inspect.signature(function).parameters
        assert set(route.arguments) <= set(parameters)  # not one of them vanishes in **kwargs
        assert {name for name in gpu.STATES if name in route.arguments} == {"initial_state"}


def test_gated_delta_arguments_are_the_same_recurrence():
    naive = pytest.importorskip("fla.ops.gated_delta_rule.naive").naive_recurrent_gated_delta_rule
    asked = problem("tied")
    for route in (*asked.scans, *asked.steps):
        found = naive(**route.arguments)
        for got, expected in zip(found, reference("tied", asked.factors, asked.state), strict=True):
            assert distance(got.double(), expected) < 1e-5


def test_simple_gla_arguments_are_the_same_recurrence():
    naive = pytest.importorskip("fla.ops.simple_gla.naive").naive_recurrent_simple_gla
    asked = problem("plain")
    for route in (asked.scans[0], *asked.steps):
        found = naive(**route.arguments)
        for got, expected in zip(found, reference("plain", asked.factors, asked.state), strict=True):
            assert distance(got.double(), expected) < 1e-5


def test_rwkv7_arguments_are_the_same_recurrence():
    naive = pytest.importorskip("fla.ops.generalized_delta_rule.dplr.naive").dplr_recurrence
    asked = problem("decoupled")
    scan, step = asked.scans[0].arguments, asked.steps[0].arguments
    assert torch.equal(scan["a"], -step["kk"]) and torch.equal(scan["b"], step["kk"] * step["a"])
    assert scan["lower_bound"] <= scan["w"].min() and scan["w"].max() < 0
    rows = {name: scan[name].transpose(1, 2) for name in ("r", "k", "v", "a", "b", "w")}
    query = rows["r"] * rows["r"].shape[-1] ** 0.5  # that reference scales by 1 / sqrt(d_k)
    read, after = naive(query, rows["k"], rows["v"], rows["a"], rows["b"], rows["w"], scan["initial_state"])
    expected_read, expected_state = reference("decoupled", asked.factors, asked.state)
    assert distance(read.transpose(1, 2).double(), expected_read) < 1e-5
    assert distance(after.double(), expected_state) < 1e-5


def test_mamba2_arguments_are_the_same_recurrence():
    """By the definition in the paper: state <- exp(dt A) state + dt x B^T, read = state C, states as [d_v, d_k]."""
    asked = problem("plain")
    given = asked.scans[1].arguments
    assert asked.scans[1].value_first
    state, reads = given["initial_states"], []
    for t in range(given["x"].shape[1]):
        dt = given["dt"][:, t, :, None, None]
        write = given["x"][:, t, :, :, None] * given["B"][:, t, :, None, :]
        state = (dt * given["A"][:, None, None]).exp() * state + dt * write
        reads.append((state * given["C"][:, t, :, None, :]).sum(-1))
    expected_read, expected_state = reference("plain", asked.factors, asked.state)
    assert distance(torch.stack(reads, dim=1).double(), expected_read) < 1e-5
    assert distance(state.mT.double(), expected_state) < 1e-5


def test_a_missing_package_is_no_side():
    assert Route("no_such_package.ops", "scan", {}).load() is None


@pytest.mark.parametrize("rule", RULES)
def test_the_checks_pass_on_interpreted_steps(rule):
    case = Case(rule, 16, 16, "bfloat16", "cuda")
    checks = list(check_step(case, CPU))
    assert len(checks) == 4 and all(check.passed for check in checks)


def test_the_checks_pass_on_interpreted_convolutions():
    checks = list(check_conv("float32", CPU))
    assert len(checks) == 6 and all(check.passed for check in checks)


def test_the_checks_fail_where_a_kernel_is_wrong(monkeypatch):
    right = gpu_checks.triton_step

    def wrong(factors, state, **options):
        return right(replace(factors, query=1.001 * factors.query), state, **options)

    monkeypatch.setattr(gpu_checks, "triton_step", wrong)
    failed = {check.what for check in check_step(Case("mamba2", 16, 16, "float32", "cuda"), CPU) if not check.passed}
    assert failed == {"step: read", "step in place: read"}
    assert not Check("case", "NaN", float("nan"), 1.0).passed


@pytest.mark.parametrize("rule", RULES)
def test_the_scan_checks_pass_on_interpreted_kernels(rule):
    pytest.importorskip("hooked_recurrent.scan.kernels.scan")
    case = Case(rule, 16, 16, "float32", "cuda")
    # The interpreter runs program after program, one for every row, head and chunk. Two chunks; two rows there, two heads here.
    length = 18 if RULES[rule].vector_decay else 35
    checks = [*check_scan(case, length, CPU, heads=1), *check_packed(case, CPU, stops=(0, 2, 19, 20), heads=2)]
    assert [check for check in checks if not check.passed] == []
    assert {"read", "final state", "gradient of initial_state", "packed read"} <= {check.what for check in checks}


def test_gradients_leave_the_state_out():
    asked = problem("tied")
    leaves = gpu.as_leaves(dict(asked.scans[0].arguments))
    assert leaves["q"].requires_grad and leaves["scale"] == 1.0
    assert len(gpu.without_state(leaves)) == 5  # q, k, v, g, beta
    assert {shape.form for shape in SHAPES} == set(PROBLEMS)


def test_a_table_of_a_step_with_what_is_missing_and_what_fails(monkeypatch, capsys):
    """Everything but the clock: interpreted kernels, one library that is not there and one that refuses."""

    def refuse(**_):
        raise ValueError("not on this device")

    monkeypatch.setattr(Route, "load", lambda route: None if "gated" in route.name else refuse)
    taken = {"milliseconds": 2.0, "fast_fifth": 1.5, "slow_fifth": 2.5, "peak_megabytes": 1.0}
    monkeypatch.setattr(gpu, "run_time", lambda run, bench: run() and taken)
    found = []
    for form in ("tied", "plain"):
        found += gpu.timings(Shape(form, form, False, 2, 16, 16, 64), "step", 2, 1, torch.float32, CPU)
    assert [(one.layer, one.side, one.note) for one in found] == [
        ("tied", "ours", ""),
        ("tied", "ours, in place", ""),
        ("tied", "fla fused_recurrent_gated_delta_rule", "not installed"),
        ("plain", "ours", ""),
        ("plain", "ours, in place", ""),
        ("plain", "fla fused_recurrent_simple_gla", "failed: ValueError: not on this device"),
    ]
    assert [one.difference for one in found if not one.note] == [0.0] * 4
    gpu.show_timings(found, Console(width=200))
    shown = capsys.readouterr().out
    assert "2.0000 (1.5000 to 2.5000)" in shown and "1.00x" in shown and "not installed" in shown
