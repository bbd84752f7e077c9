"""The three recurrences alone, ours and everyone else's plain-torch forms of them, on the same raw inputs.

Every side takes the inputs of `Recurrence.make` by name and returns the read [batch, pos, head, d_v], so that both do the same
work: what is normalised, scaled, expanded or transposed on the way is in everyone's time. The lengths of memory of the heads
are spread evenly on a logarithmic scale over one to a thousand tokens, so that an error in a carried state would be seen.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hooked_recurrent.factors import Factors
from hooked_recurrent.layers.norm import l2_normalize
from hooked_recurrent.scan.dispatch import scan

from .plain import mamba2, qwen3_5

Inputs = dict[str, Tensor]
Side = Callable[..., Tensor]


@dataclass(frozen=True)
class Recurrence:
    """One rule at one shape: what it takes, our scan of it, and theirs."""

    name: str
    """The rule."""
    shape: tuple[int, int, int]
    """Heads, d_k, d_v."""
    make: Callable[[int, tuple[int, int, int]], Inputs]
    """Raw inputs over a number of positions."""
    factors: Callable[..., Factors]
    """Our six roles of these inputs, in the native form."""
    theirs: Mapping[str, Side]
    """Other forms of it by name, the usual one first."""

    def inputs(self, length: int, seed: int = 0) -> Inputs:
        """Random raw inputs, the same for the same arguments."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.make(length, self.shape)

    def ours(self, **inputs: Tensor) -> Tensor:
        """Our native scan, without the final state."""
        return scan(self.factors(**inputs), want_state=False)[0]

    def ours_edited(self, **inputs: Tensor) -> Tensor:
        """Our scan in the form that an edit of writes needs."""
        return scan(as_edited(self.factors(**inputs)), want_state=False)[0]

    def trajectory_bytes(self, length: int) -> int:
        """What the states of every head at every position would take: [T, d_k, d_v] per head, float32."""
        heads, d_k, d_v = self.shape
        return 4 * length * heads * d_k * d_v


def as_edited(factors: Factors) -> Factors:
    """The form that the scan takes once writes are edited: erase and probe free of the write where the rule ties them.

    Where nothing is tied a replaced write costs nothing more, so the dearer edit stands for it: a second write term.
    """
    if factors.erase_strength is not None:
        return factors.decoupled()
    key, value = (torch.zeros_like(side)[:, :, :, None] for side in (factors.write_key, factors.write_value))
    return factors.with_terms(replace(factors, write_key=key, write_value=value))


def rates(heads: int) -> Tensor:
    """Negative log-decays per head, of memories between one and a thousand tokens."""
    return -(10 ** -torch.linspace(0, 3, heads))


def gdn_inputs(length: int, shape: tuple[int, int, int]) -> Inputs:
    """Query and key before their L2 norm, value, log-decay and write strength."""
    heads, d_k, d_v = shape
    query, key = torch.randn(2, 1, length, heads, d_k)
    return {
        "query": query,
        "key": key,
        "value": torch.randn(1, length, heads, d_v),
        "g": rates(heads) * torch.rand(1, length, heads),
        "beta": torch.rand(1, length, heads),
    }


def gdn_factors(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Factors:
    """As the mixer makes them (`mixers/gated_delta_net.py`)."""
    return Factors(
        log_decay=g,
        write_key=l2_normalize(key),
        write_value=beta[..., None] * value,
        query=l2_normalize(query) * query.shape[-1] ** -0.5,
        erase_strength=-g.exp() * beta,
    )


def gdn_transformers(**inputs: Tensor) -> Tensor:
    """transformers' chunk rule, which Qwen3.5 runs without a GPU."""
    return qwen3_5.torch_chunk_gated_delta_rule(**inputs, use_qk_l2norm_in_kernel=True)[0]


def mamba2_inputs(length: int, shape: tuple[int, int, int]) -> Inputs:
    """x, step size, A per head, and B and C of the one group."""
    heads, d_k, d_v = shape
    key, query = torch.randn(2, 1, length, 1, d_k) * d_k**-0.5
    x, step_size = torch.randn(1, length, heads, d_v), torch.rand(1, length, heads)
    return {"x": x, "dt": step_size, "A": rates(heads), "B": key, "C": query}


def mamba2_factors(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Factors:
    """As the mixer makes them (`mixers/mamba2.py`)."""
    heads = x.shape[2]
    return Factors(
        log_decay=dt * A,
        write_key=B.expand(-1, -1, heads, -1),
        write_value=dt[..., None] * x,
        query=C.expand(-1, -1, heads, -1),
    )


def mamba2_transformers(chunk_size: int) -> Side:
    """transformers' scan: the part of its `Mamba2Mixer` between convolution and gate, without the skip D x."""

    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return mamba2.mamba2_chunk_scan(x, dt, A, B, C, chunk_size=chunk_size)

    return run


def rwkv7_inputs(length: int, shape: tuple[int, int, int]) -> Inputs:
    """Receptance, log-decay per channel, replacement key, value, removal key of length 1 and learning rate."""
    heads, d_k, d_v = shape
    receptance, key, removal = torch.randn(3, 1, length, heads, d_k) * d_k**-0.5
    return {
        "receptance": receptance,
        "log_decay": 0.6 * rates(heads * d_k).view(heads, d_k) * torch.rand(1, length, heads, d_k),
        "key": key,
        "value": torch.randn(1, length, heads, d_v),
        "removal": nn.functional.normalize(removal, dim=-1),
        "rate": torch.rand(1, length, heads, d_k),
    }


def rwkv7_factors(
    receptance: Tensor, log_decay: Tensor, key: Tensor, value: Tensor, removal: Tensor, rate: Tensor
) -> Factors:
    """As the mixer makes them (`mixers/rwkv7.py`)."""
    return Factors(
        log_decay=log_decay,
        write_key=key,
        write_value=value,
        query=receptance,
        erase=-removal * rate,
        probe=removal,
    )


def rwkv7_hf_loop(
    receptance: Tensor, log_decay: Tensor, key: Tensor, value: Tensor, removal: Tensor, rate: Tensor
) -> Tensor:
    """rwkv7-hf's recurrence, token by token; it has no other."""
    from rwkv7_hf.ops_rwkv7 import rwkv7_recurrent

    empty = value.new_zeros(len(value), *receptance.shape[2:], value.shape[-1])
    return rwkv7_recurrent(receptance, log_decay.exp(), key, value, -removal, removal * rate, empty)[0]


def fla_dplr(form: str) -> Side:
    """flash-linear-attention's references in plain torch, "recurrence" (token by token) or "chunkwise"."""

    def run(**inputs: Tensor) -> Tensor:
        from fla.ops.generalized_delta_rule.dplr import naive

        by_head: Any = {name: tensor.transpose(1, 2) for name, tensor in inputs.items()}
        read, _ = getattr(naive, f"dplr_{form}")(
            by_head["receptance"] * inputs["receptance"].shape[-1] ** 0.5,
            by_head["key"],
            by_head["value"],
            -by_head["removal"],
            by_head["removal"] * by_head["rate"],
            by_head["log_decay"],
        )
        return read.transpose(1, 2)

    return run


CHUNKS = (256, 128, 64, 32)
"""transformers' default chunk of Mamba-2 first, then those that its user might try."""
MAMBA2 = {f"transformers, chunk {size}": mamba2_transformers(size) for size in CHUNKS}
RWKV7 = {"rwkv7-hf": rwkv7_hf_loop, "fla, by token": fla_dplr("recurrence"), "fla, chunks": fla_dplr("chunkwise")}
RULES = {
    "gdn": Recurrence("Gated DeltaNet", (16, 128, 128), gdn_inputs, gdn_factors, {"transformers": gdn_transformers}),
    "mamba2": Recurrence("Mamba-2", (32, 128, 64), mamba2_inputs, mamba2_factors, MAMBA2),
    "rwkv7": Recurrence("RWKV-7", (12, 64, 64), rwkv7_inputs, rwkv7_factors, RWKV7),
}
"""At the shapes of a layer of Qwen3.5-0.8B, mamba2-370m and RWKV-7 0.1B."""
SMALL = {"gdn": (2, 16, 16), "mamba2": (4, 16, 8), "rwkv7": (2, 16, 16)}
"""Shapes of a quick run."""


def rule_of(name: str, quick: bool) -> Recurrence:
    """The rule at its real shape, or a tiny one."""
    return replace(RULES[name], shape=SMALL[name]) if quick else RULES[name]
