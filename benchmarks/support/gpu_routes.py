"""The layers that `benchmarks/gpu.py` times: one recurrence each, as our factors and as the arguments of other libraries.

Every side gets the tensors that its kernels take, made before the clock starts: so flash-linear-attention scales values by beta
in its kernels, while our write_value is beta * value already.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from hooked_recurrent.factors import Factors, state_dtype

RWKV7_LEAST_LOG_DECAY = -0.6065306597126334
"""-exp(-1/2): what the model's own parametrisation keeps above."""


@dataclass(frozen=True)
class Route:
    """A function of another library, with the arguments under which it computes the same recurrence."""

    module: str
    name: str
    arguments: Mapping[str, Any]
    value_first: bool = False
    """Whether its states are [batch, head, d_v, d_k]."""

    def load(self) -> Callable[..., Any] | None:
        """The function, None where its package is not installed."""
        if importlib.util.find_spec(self.module.split(".")[0]) is None:
            return None
        return getattr(importlib.import_module(self.module), self.name)

    def leaves(self) -> list[Tensor]:
        """The tensors that a gradient may be asked for."""
        return [one for one in self.arguments.values() if isinstance(one, Tensor) and one.is_floating_point()]


@dataclass(frozen=True)
class Problem:
    """One recurrence over some positions."""

    factors: Factors
    state: Tensor
    scans: list[Route] = field(default_factory=list)
    """For a stretch of positions."""
    steps: list[Route] = field(default_factory=list)
    """For one position."""


class Draw:
    """Random rows [batch, pos, head, ...] of one problem."""

    def __init__(self, batch: int, length: int, heads: int, dtype: torch.dtype, device: torch.device, seed: int = 0):
        self.place, self.dtype, self.device = (batch, length, heads), dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal numbers."""
        drawn = torch.randn(*self.place, *shape, generator=self.generator)
        return drawn.to(device=self.device, dtype=dtype or self.dtype)

    def unit(self, width: int) -> Tensor:
        """Rows of length one."""
        return normalize(self.normal(width, dtype=torch.float32), dim=-1).to(self.dtype)

    def gate(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers between 0 and 1."""
        return self.normal(*shape, dtype=torch.float32).sigmoid().to(dtype)

    def state(self, d_k: int, d_v: int) -> Tensor:
        """A state to start from, float32 or wider."""
        batch, _, heads = self.place
        drawn = torch.randn(batch, heads, d_k, d_v, generator=self.generator)
        return drawn.to(device=self.device, dtype=state_dtype(self.dtype))


def gated_delta(draw: Draw, d_k: int, d_v: int) -> Problem:
    """Gated DeltaNet: S <- exp(g) S + key (beta (value - exp(g) S^T key))^T."""
    query, key, value = draw.unit(d_k) * d_k**-0.5, draw.unit(d_k), draw.normal(d_v)
    log_decay, beta = logsigmoid(draw.normal(dtype=torch.float32) + 3.0), draw.gate()
    state = draw.state(d_k, d_v)
    factors = Factors(
        log_decay=log_decay,
        write_key=key,
        write_value=(beta[..., None] * value).to(value.dtype),
        query=query,
        erase_strength=-log_decay.exp() * beta,
    )
    given = {"q": query, "k": key, "v": value, "g": log_decay, "beta": beta, "scale": 1.0}
    given |= {"initial_state": state, "output_final_state": True}
    module = "fla.ops.gated_delta_rule"
    return Problem(
        factors,
        state,
        [Route(module, "chunk_gated_delta_rule", given)],
        [Route(module, "fused_recurrent_gated_delta_rule", given)],
    )


def rwkv7(draw: Draw, d_k: int, d_v: int) -> Problem:
    """RWKV-7, called as flash-linear-attention's own layer calls it: what it names a is our probe, its b our erase."""
    query, key, value = draw.normal(d_k), draw.normal(d_k), draw.normal(d_v)
    removal, rate = draw.unit(d_k), draw.gate(d_k, dtype=draw.dtype)
    log_decay = RWKV7_LEAST_LOG_DECAY * draw.gate(d_k)
    state = draw.state(d_k, d_v)
    factors = Factors(log_decay, key, value, query, erase=removal * rate, probe=-removal)
    common = {"r": query, "w": log_decay, "k": key, "v": value, "scale": 1.0}
    common |= {"initial_state": state, "output_final_state": True}
    scan = common | {"a": factors.probe, "b": factors.erase}
    scan |= {"safe_gate": True, "lower_bound": RWKV7_LEAST_LOG_DECAY, "chunk_size": 64}
    module = "fla.ops.rwkv7"
    return Problem(
        factors,
        state,
        [Route(module, "chunk_rwkv7", scan)],
        [Route(module, "fused_mul_recurrent_rwkv7", common | {"kk": removal, "a": rate})],
    )


def mamba2(draw: Draw, d_k: int, d_v: int) -> Problem:
    """Mamba-2 with one group: B and C serve every head. mamba_ssm takes dt and x apart, and states as [d_v, d_k]."""
    batch, length, heads = draw.place
    shared = Draw(batch, length, 1, draw.dtype, draw.device, seed=1)
    key, query, x = shared.normal(d_k) * d_k**-0.5, shared.normal(d_k), draw.normal(d_v)
    dt = torch.nn.functional.softplus(draw.normal(dtype=torch.float32) - 3.0)
    rate = -torch.linspace(1.0, 16.0, heads, device=draw.device)
    state = draw.state(d_k, d_v)
    value = (dt[..., None] * x).to(x.dtype)
    wide = [rows.expand(-1, -1, heads, -1) for rows in (key, query)]
    factors = Factors(log_decay=dt * rate, write_key=wide[0], write_value=value, query=wide[1])
    given = {"q": wide[1].contiguous(), "k": wide[0].contiguous(), "v": value, "g": factors.log_decay, "scale": 1.0}
    given |= {"initial_state": state, "output_final_state": True}
    theirs = {"x": x, "dt": dt, "A": rate, "B": key, "C": query, "chunk_size": 256}
    theirs |= {"initial_states": state.mT.contiguous(), "return_final_states": True}
    module = "fla.ops.simple_gla"
    combined = Route("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", theirs, value_first=True)
    return Problem(
        factors,
        state,
        [Route(module, "chunk_simple_gla", given), combined],
        [Route(module, "fused_recurrent_simple_gla", given)],
    )


PROBLEMS = {"tied": gated_delta, "decoupled": rwkv7, "plain": mamba2}
"""By the form of a layer in roofline.SHAPES."""
