"""How kernels declare what can be compiled, and that none is forgotten."""

import importlib
import inspect
import pkgutil
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.amd.compiler import HIPBackend
from triton.backends.nvidia.compiler import CUDABackend

from hooked_recurrent.scan.kernels.variants import BACKENDS, RULES, Case, Variant, registered, variants_of

PACKAGES = ("hooked_recurrent.scan.kernels", "hooked_recurrent.layers", "writesae.sae.kernels")
CASE = Case("mamba2", 16, 32, "bfloat16", "cuda")


@triton.jit
def scaled_kernel(x, y, bias, count, stride, factor, BLOCK: tl.constexpr, SQUARED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at * stride, mask=at < count) * factor, mask=at < count)


def arguments(**change):
    x = torch.empty(64, dtype=torch.bfloat16, device="meta")
    given = dict(
        x=x, y=torch.empty(64, device="meta"), bias=None, count=48, stride=1, factor=0.5, BLOCK=16, SQUARED=True
    )
    return given | change


def test_a_launch_is_typed_as_triton_types_it():
    variant = Variant("scaled", scaled_kernel, arguments(), CASE)
    assert variant.signature == {
        **{"x": "*bf16", "y": "*fp32", "bias": "constexpr", "count": "i32", "stride": "constexpr", "factor": "fp32"},
        **{"BLOCK": "constexpr", "SQUARED": "constexpr"},
    }
    assert variant.constexprs == {(2,): None, (4,): 1, (6,): 16, (7,): True}
    assert list(variant.attributes) == [(0,), (1,), (3,)]  # the pointers, and 48


VALUES = [torch.empty(64), torch.empty(3, dtype=torch.float16), None, 1, 16, 3, 0, 2**40, True, 0.5]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [*VALUES, tuple(VALUES)], ids=lambda value: type(value).__name__)
def test_triton_specialises_a_value_alike(value, backend):
    jit = pytest.importorskip("triton.runtime.jit")
    vendor = {"cuda": CUDABackend, "hip": HIPBackend}[backend]
    kind, known = jit.native_specialize_impl(vendor, value, False, True, True)
    variant = Variant("scaled", scaled_kernel, arguments(count=value), replace(CASE, backend=backend))
    assert variant.signature["count"] == kind
    for place, one in enumerate(known) if isinstance(value, tuple) else [(None, known)]:
        path = (3,) if place is None else (3, place)
        is_constant = (kind if place is None else kind[place]) == "constexpr"
        assert (path in variant.constexprs) == is_constant
        if not is_constant:
            assert variant.attributes.get(path, []) == vendor.parse_attr(one or "")


def test_what_does_not_fit_the_kernel_is_refused():
    with pytest.raises(ValueError, match=r"misses \['stride'\] and does not know \['strides'\]"):
        Variant("scaled", scaled_kernel, {k.replace("stride", "strides"): v for k, v in arguments().items()}, CASE)
    with pytest.raises(TypeError, match="no kernel takes a str"):
        _ = Variant("scaled", scaled_kernel, arguments(factor="half"), CASE).signature


def test_launches_that_share_a_compilation_are_one():
    one = Variant("scaled", scaled_kernel, arguments(count=32), CASE)
    assert one.identity == Variant("again", scaled_kernel, arguments(count=48), CASE).identity
    for change in (dict(count=33), dict(stride=2), dict(x=torch.empty(1, device="meta")), dict(BLOCK=32)):
        assert one.identity != Variant("other", scaled_kernel, arguments(**change), CASE).identity
    assert one.identity != Variant("other", scaled_kernel, arguments(count=32), CASE, num_warps=8).identity


def test_a_tuned_kernel_has_a_variant_for_each_configuration():
    class Tuned:
        fn = scaled_kernel
        configs = [triton.Config({"BLOCK": 16}, num_warps=2), triton.Config({"BLOCK": 32}, num_warps=4)]

    given = arguments()
    del given["BLOCK"]
    found = list(variants_of("scaled", Tuned, given, CASE))
    assert [(one.name, one.num_warps, one.arguments["BLOCK"]) for one in found] == [
        ("scaled (BLOCK 16, 2 warps)", 2, 16),
        ("scaled (BLOCK 32, 4 warps)", 4, 32),
    ]


@pytest.mark.parametrize("rule", RULES)
def test_factors_of_a_case(rule):
    factors = Case(rule, 16, 32, "bfloat16", "cuda").factors(5, batch=3)
    assert (factors.d_k, factors.d_v, factors.length) == (16, 32, 5)
    assert factors.vector_decay == RULES[rule].vector_decay
    assert factors.erases == (RULES[rule].form != "plain")
    assert (factors.erase_strength is not None) == (RULES[rule].form == "tied")
    assert (factors.write_key.ndim == 5) == (RULES[rule].terms > 1)
    assert factors.log_decay.dtype == torch.float32 and factors.query.dtype == torch.bfloat16


def test_every_kernel_declares_its_variants():
    kernels = set()
    for package in PACKAGES:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
            for thing in vars(importlib.import_module(module.name)).values():
                function = getattr(thing, "fn", None)  # a program knows its place in the grid; helpers are told
                if inspect.isfunction(function) and "program_id" in inspect.getsource(function):
                    kernels.add(f"{function.__module__}.{function.__name__}")
    cases = [
        Case(rule, 64, 64, dtype, backend)
        for rule in RULES
        for dtype in ("float32", "bfloat16")
        for backend in BACKENDS
    ]
    declared = {f"{one.kernel.fn.__module__}.{one.kernel.fn.__name__}" for one in registered(cases)}
    assert kernels and kernels - declared == set()
