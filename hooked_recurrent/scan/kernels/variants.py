"""Every kernel configuration that a launcher can ask for, so that all of them can be compiled where no GPU is.

A module with kernels registers one function. It is given a `Case` (rule, widths, dtype, backend) and yields the launches that
its launchers make for it, through the very functions that the launchers use to collect arguments and to choose warps:

    @register
    def variants(case: Case) -> Iterator[Variant]:
        yield from variants_of("step", step_kernel, arguments(case.factors(), ...), case, num_warps=4, num_stages=1)

`arguments` maps every parameter of the kernel to a value, or to a tuple of values, constexprs included; tensors may be on the
meta device. What a launch makes of them (types, what is divisible by 16 or equal to 1) is derived here by Triton's rules.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hooked_recurrent.factors import Factors


@dataclass(frozen=True)
class Rule:
    """The form that a rule's factors take."""

    vector_decay: bool
    """One decay per key channel instead of one per head."""
    form: str
    """"tied" (erase_strength), "decoupled" (erase and probe of their own) or "plain" (nothing is erased)."""
    terms: int = 1
    """Writes at a position."""


RULES = {
    "gated delta": Rule(vector_decay=False, form="tied"),
    "kimi delta": Rule(vector_decay=True, form="tied"),
    "rwkv7": Rule(vector_decay=True, form="decoupled"),
    "mamba2": Rule(vector_decay=False, form="plain"),
    "gated linear": Rule(vector_decay=True, form="plain"),
    "edited delta": Rule(vector_decay=False, form="decoupled", terms=2),
}
"""Every pair of decay and form, under the name of a rule that has it."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BACKENDS = ("cuda", "hip")


@dataclass(frozen=True)
class Case:
    """What a launcher may be asked to run."""

    rule: str
    """A name of RULES."""
    d_k: int
    d_v: int
    dtype: str
    """Of keys, values and queries, a name of DTYPES; decay and erase strength stay float32, as in the models."""
    backend: str
    """"cuda" or "hip": what a launcher chooses by vendor, such as the precision of products, depends on it."""

    def __str__(self) -> str:
        width = str(self.d_k) if self.d_k == self.d_v else f"{self.d_k}x{self.d_v}"
        return f"{self.rule}, {width}, {self.dtype}"

    def factors(self, length: int = 128, *, batch: int = 2, heads: int = 16) -> Factors:
        """Factors of this case on the meta device."""
        rule = RULES[self.rule]
        place = (batch, length, heads)
        terms = (rule.terms,) if rule.terms > 1 else ()

        def rows(*shape: int, dtype: str = self.dtype) -> Tensor:
            return torch.empty(*place, *shape, dtype=DTYPES[dtype], device="meta")

        return Factors(
            log_decay=rows(self.d_k, dtype="float32") if rule.vector_decay else rows(dtype="float32"),
            write_key=rows(*terms, self.d_k),
            write_value=rows(*terms, self.d_v),
            query=rows(self.d_k),
            erase=rows(self.d_k) if rule.form == "decoupled" else None,
            probe=rows(self.d_k) if rule.form == "decoupled" else None,
            erase_strength=rows(dtype="float32") if rule.form == "tied" else None,
        )


Path = tuple[int, ...]
"""Where an argument stands: the index of its parameter, and its place inside a tuple."""


@dataclass(frozen=True)
class Variant:
    """One compilation: a kernel with the types and constants of one launch."""

    name: str
    """For people: the launcher and what tells its configurations apart."""
    kernel: Any
    """The function under @triton.jit."""
    arguments: Mapping[str, Any] = field(repr=False)
    """A value for every parameter of the kernel, as a launch gives them."""
    case: Case
    """The first case that asks for it."""
    num_warps: int = 4
    num_stages: int = 1

    def __post_init__(self) -> None:
        known = inspect.signature(self.kernel.fn).parameters
        missing = [name for name in known if name not in self.arguments]
        unknown = [name for name in self.arguments if name not in known]
        if missing or unknown:
            raise ValueError(f"{self.name}: {self.kernel.__name__} misses {missing} and does not know {unknown}")

    def _leaves(self) -> Iterator[tuple[Path, Any, bool]]:
        """Of every value, those inside tuples too: its path (parameter, place in the tuple), itself, whether it is compiled in.

        Compiled in are parameters that say so, None, and integers that are 1.
        """
        for index, (name, parameter) in enumerate(inspect.signature(self.kernel.fn).parameters.items()):
            declared = "constexpr" in str(parameter.annotation)
            value = self.arguments[name]
            if isinstance(value, tuple) and not declared:
                inner: list[tuple[Path, Any]] = [((index, place), one) for place, one in enumerate(value)]
            else:
                inner = [((index,), value)]
            for path, one in inner:
                yield path, one, declared or one is None or (type(one) is int and one == 1)

    @property
    def constexprs(self) -> dict[Path, Any]:
        """The values that are compiled in, by path."""
        return {path: value for path, value, constant in self._leaves() if constant}

    @property
    def signature(self) -> dict[str, str | tuple[str, ...]]:
        """The type of every parameter, a tuple of types for a tuple, in the kernel's order."""
        kinds: dict[int, list[str]] = {}
        for path, value, constant in self._leaves():
            kinds.setdefault(path[0], []).append("constexpr" if constant else _type_of(value))
        names = list(inspect.signature(self.kernel.fn).parameters)
        return {
            name: tuple(kinds[index]) if isinstance(self.arguments[name], tuple) else kinds[index][0]
            for index, name in enumerate(names)
        }

    @property
    def attributes(self) -> dict[Path, list[list[Any]]]:
        """What is known of values: that pointers (allocations are aligned) and some integers are divisible by 16, and on AMD
        that a tensor is small enough for 32-bit offsets."""
        found: dict[Path, list[list[Any]]] = {}
        for path, value, constant in self._leaves():
            pointer = isinstance(value, Tensor)
            if not constant and (pointer or (type(value) is int and value % 16 == 0)):
                found[path] = [["tt.divisibility", 16]]
                if pointer and self.case.backend == "hip":
                    found[path].append(["tt.pointer_range", 32])
        return found

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told besides types and constants."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    @property
    def identity(self) -> str:
        """Equal for two launches that share one compilation."""
        parts = (self.signature, self.constexprs, self.attributes, self.num_warps, self.num_stages)
        return f"{self.kernel.fn.__module__}.{self.kernel.__name__} {parts}"


def _type_of(value: Any) -> str:
    """Triton's name for the type of an argument."""
    if isinstance(value, Tensor):
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}
        return "*" + {**names, torch.int64: "i64", torch.float64: "fp64", torch.bool: "i1"}[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"no kernel takes a {type(value).__name__} that is not a constexpr")


def variants_of(
    name: str, kernel: Any, arguments: Mapping[str, Any], case: Case, *, num_warps: int = 4, num_stages: int = 1
) -> Iterator[Variant]:
    """The variants of one launch: one, or one per configuration where the kernel is tuned at its first launch."""
    for config in getattr(kernel, "configs", [None]):
        if config is None:
            yield Variant(name, kernel, arguments, case, num_warps, num_stages)
        else:
            label = ", ".join(f"{key} {value}" for key, value in config.kwargs.items())
            label = f"{name} ({label}, {config.num_warps} warps)" if label else f"{name} ({config.num_warps} warps)"
            tuned = {**arguments, **config.kwargs}
            yield Variant(label, kernel.fn, tuned, case, config.num_warps, config.num_stages)


Source = Callable[[Case], Iterable[Variant]]
_SOURCES: list[Source] = []


def register(source: Source) -> Source:
    """Declare what a module's launchers ask for; a case that they refuse yields nothing."""
    _SOURCES.append(source)
    return source


def registered(cases: Iterable[Case]) -> list[Variant]:
    """What the imported modules would compile for these cases, every compilation once per backend."""
    found: dict[tuple[str, str], Variant] = {}
    for case in cases:
        for source in _SOURCES:
            for variant in source(case):
                found.setdefault((case.backend, variant.identity), variant)
    return list(found.values())
