"""When kernels are taken, and that nothing else decides it."""

import ast
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from writesae.sae import kernels


@pytest.fixture
def on_gpu():
    """Makes tensors that claim to be on a GPU."""
    kernels._warn_once.cache_clear()
    mode = FakeTensorMode()

    def make(*shape, dtype=torch.float32):
        with mode:
            return torch.empty(*shape, dtype=dtype, device="cuda")

    return make


def test_never_on_a_cpu():
    assert not kernels.use_triton(torch.zeros(3, 4))
    assert not kernels.use_triton(torch.zeros(3, 2000).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(on_gpu, dtype):
    assert kernels.use_triton(on_gpu(3, 4, dtype=dtype))
    assert kernels.use_triton(on_gpu(3, 1024, dtype=dtype), on_gpu(3, 1, dtype=dtype))


def test_a_reason_against_it_is_given_once(on_gpu):
    wide, double = on_gpu(3, 1025), on_gpu(3, 4, dtype=torch.float64)
    with pytest.warns(UserWarning, match="plain torch runs .* widths up to 1024, got 1025"):
        assert not kernels.use_triton(on_gpu(3, 4), wide)
    with pytest.warns(UserWarning, match="cannot serve torch.float64"):
        assert not kernels.use_triton(double)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels.use_triton(wide) and not kernels.use_triton(double)
        assert kernels.use_triton(wide, widest=None)


def test_without_triton(on_gpu, monkeypatch):
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    with pytest.warns(UserWarning, match="the package triton, which is not installed"):
        assert not kernels.use_triton(on_gpu(3, 4))


@pytest.mark.parametrize(
    "name", ["kernels/__init__.py", "kernels/reference.py", "factored.py", "samples.py", "atoms.py"]
)
def test_the_choice_imports_no_triton(name):
    """Triton exists on Linux alone; everything else must work without it."""
    source = (Path(kernels.__file__).parents[1] / name).read_text(encoding="utf-8")
    imported = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {alias.name for node in imported if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in imported if isinstance(node, ast.ImportFrom)}
    assert modules
    assert not [module for module in modules if module.startswith("triton") or "kernels." in module]


def test_its_functions_are_its_attributes_and_nothing_else_is():
    from writesae.sae.kernels.decode import decode_at

    assert kernels.decode_at is decode_at
    with pytest.raises(AttributeError, match="no attribute 'decode_it'"):
        _ = kernels.decode_it
