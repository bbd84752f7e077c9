"""Are the kernels right on this device? Each against the float64 step reference of the same inputs on the same device."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from support.gpu_routes import Draw
from torch import Tensor
from torch.nn.functional import logsigmoid

from hooked_recurrent.factors import Factors
from hooked_recurrent.layers.conv import ShortConv
from hooked_recurrent.layers.conv_kernel import triton_short_conv
from hooked_recurrent.scan.kernels.step import triton_step
from hooked_recurrent.scan.kernels.variants import DTYPES, RULES, Case
from hooked_recurrent.scan.step import step_scan

BOUNDS = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}
"""The largest ||result - reference|| / ||reference||."""


@dataclass(frozen=True)
class Check:
    """One comparison."""

    case: str
    what: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.error < self.bound


def random_factors(case: Case, length: int, device: torch.device, *, batch: int = 2, heads: int = 3) -> Factors:
    """Factors of a case whose states neither vanish nor grow: unit keys, an erase near the write or the probe."""
    rule, draw = RULES[case.rule], Draw(batch, length, heads, DTYPES[case.dtype], device)
    channels = (case.d_k,) if rule.vector_decay else ()
    log_decay = logsigmoid(draw.normal(*channels, dtype=torch.float32) + 2.0)
    roles = {"log_decay": log_decay, "write_key": draw.unit(case.d_k), "write_value": draw.normal(case.d_v)}
    if rule.terms > 1:
        for name, width in (("write_key", case.d_k), ("write_value", case.d_v)):
            terms = [draw.normal(width, dtype=torch.float32) * width**-0.5 for _ in range(rule.terms)]
            roles[name] = torch.stack(terms, dim=3).to(draw.dtype)
    roles["query"] = draw.normal(case.d_k)
    decay = log_decay.exp()
    if rule.form == "tied":
        roles["erase_strength"] = -(decay.mean(-1) if rule.vector_decay else decay) * draw.gate()
    elif rule.form == "decoupled":
        roles["probe"] = draw.unit(case.d_k)
        along = -(decay if rule.vector_decay else decay[..., None]) * draw.gate()[..., None]
        roles["erase"] = (along * roles["probe"]).to(draw.dtype)
    return Factors(**roles)


def error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||."""
    return float((got.double() - expected).norm() / expected.norm())


def leaves_of(factors: Factors, state: Tensor) -> dict[str, Tensor]:
    """Every tensor of a scan by name, ready for gradients."""
    present = {name: tensor for name, tensor in vars(factors).items() if tensor is not None}
    return {name: tensor.detach().requires_grad_() for name, tensor in (present | {"initial_state": state}).items()}


def check_scan(case: Case, length: int, device: torch.device, *, batch: int = 2, heads: int = 3) -> Iterator[Check]:
    """Reads, final state and every gradient of `triton_scan`."""
    from hooked_recurrent.scan.kernels.scan import triton_scan

    factors = random_factors(case, length, device, batch=batch, heads=heads)
    state = Draw(batch, 1, heads, torch.float32, device, seed=2).state(case.d_k, case.d_v)
    rows = torch.randn(batch, length, heads, case.d_v, generator=torch.Generator().manual_seed(3)).to(device)
    weight, bound = torch.randn_like(state), BOUNDS[case.dtype]

    ours, reference = leaves_of(factors, state), leaves_of(factors.map(torch.Tensor.double), state.double())
    result = triton_scan(Factors(**_without_state(ours)), ours["initial_state"])
    read, after = step_scan(Factors(**_without_state(reference)), reference["initial_state"])
    yield Check(str(case), "read", error(result.read.detach(), read.detach()), bound)
    yield Check(str(case), "final state", error(result.state.detach(), after.detach()), bound)
    found = torch.autograd.grad((result.read * rows).sum() + (result.state * weight).sum(), list(ours.values()))
    expected = torch.autograd.grad((read * rows).sum() + (after * weight).sum(), list(reference.values()))
    for name, got, wanted in zip(ours, found, expected, strict=True):
        yield Check(str(case), f"gradient of {name}", error(got, wanted), bound)


def _without_state(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in leaves.items() if name != "initial_state"}


def check_packed(
    case: Case, device: torch.device, stops: tuple[int, ...] = (0, 5, 70, 71, 200), *, heads: int = 3
) -> Iterator[Check]:
    """Packed sequences of several lengths, each against the reference by itself."""
    from hooked_recurrent.scan.kernels.scan import triton_scan

    factors = random_factors(case, stops[-1], device, batch=1, heads=heads)
    result = triton_scan(factors, cu_lengths=torch.tensor(stops, device=device))
    pieces = [slice(*ends) for ends in zip(stops, stops[1:], strict=False)]
    expected = [step_scan(factors.at(piece).map(torch.Tensor.double)) for piece in pieces]
    read, state = (torch.cat(parts, dim=dim) for parts, dim in zip(zip(*expected, strict=True), (1, 0), strict=True))
    yield Check(str(case), "packed read", error(result.read, read), BOUNDS[case.dtype])
    yield Check(str(case), "packed final states", error(result.state, state), BOUNDS[case.dtype])


def check_step(case: Case, device: torch.device) -> Iterator[Check]:
    """The decode step, with a new state and in place."""
    factors = random_factors(case, 1, device)
    batch, _, heads, _ = factors.query.shape
    state = Draw(batch, 1, heads, torch.float32, device, seed=2).state(case.d_k, case.d_v)
    expected = step_scan(factors.map(torch.Tensor.double), state.double())
    for in_place in (False, True):
        words = "step in place" if in_place else "step"
        found = triton_step(factors, state, in_place=in_place)
        for what, got, wanted in zip(("read", "state"), found, expected, strict=True):
            yield Check(str(case), f"{words}: {what}", error(got, wanted), BOUNDS[case.dtype])


def check_conv(dtype: str, device: torch.device) -> Iterator[Check]:
    """The short convolution on a stretch and on one position, its tail exactly."""
    conv, chosen = ShortConv(200, 4, bias=True).to(device).double().requires_grad_(False), DTYPES[dtype]
    for parameter in conv.parameters():
        parameter.data = parameter.data.to(chosen).double()
    tail = torch.randn(2, 3, 200, device=device).to(chosen)
    for length in (1, 2, 77):
        x = torch.randn(2, length, 200, device=device).to(chosen)
        out, new_tail = triton_short_conv(x, tail, conv.weight.to(chosen), conv.bias.to(chosen))
        expected, (expected_tail,) = conv(x.double(), tail.double(), (length,))
        what = f"short convolution, {length} positions"
        yield Check(dtype, what, error(out, expected), BOUNDS[dtype])
        exact = torch.equal(new_tail.double(), expected_tail)
        yield Check(dtype, f"{what}: tail", 0.0 if exact else float("nan"), BOUNDS[dtype])


def all_checks(device: torch.device, backend: str, *, widths=(64, 128, 80), length: int = 257) -> Iterator[Check]:
    """Everything, over rules, widths and dtypes."""
    for dtype in ("float32", "bfloat16"):
        yield from check_conv(dtype, device)
        for width in widths:
            for rule in RULES:
                case = Case(rule, width, width, dtype, backend)
                yield from check_step(case, device)
                yield from check_scan(case, length, device)
                yield from check_packed(replace(case, d_v=max(16, width // 2)), device)
