"""What a dictionary is trained on: a hook name, a head, and for writes which form of the write.

    hook_write   the rank-1 writes k v^T of one head ("additive"), or all that a token changed, erase included ("net")
    hook_state   the states of one head
    any other    its vectors: [batch, pos, d], or [batch, pos, head, d] of one head

`collect` reads any number of sources off one forward pass, as factors: no matrix of a write or a state is formed. Its records
hold tensors [passage, pos, ...]:

    vector   x [.., d]
    write    key [.., d_k] and value [.., d_v]; of net writes with an axis of terms before the width
    state    log_decay [..] or [.., d_k]; the net writes key and value; and under one decay per head squared_norm [..], |S_t|^2
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.cache import RecurrentCache
from hooked_recurrent.config import StrictConfig
from hooked_recurrent.memory.changes import Changes, changes
from hooked_recurrent.memory.source import ROLES
from writesae.config import require_one_of
from writesae.sae.samples import Factored, Samples, Vectors

FORMS = ("additive", "net")
WRITE, STATE, VECTOR = "write", "state", "vector"
_MATRIX = re.compile(r"blocks\.(\d+)\.mixer\.hook_(write|state)")
_LAYER = re.compile(r"blocks\.(\d+)\.")
_SQUARE = ("hook_pattern", "hook_attn_scores")
Record = dict[str, Tensor]
"""Tensors of one source, each [passage, pos, ...]; see the module's docstring."""
_SHAPES: WeakKeyDictionary[HookedRecurrentModel, dict[str, torch.Size]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Source(StrictConfig):
    """Where samples come from; hashable, so that it can name them."""

    hook: str
    """Name of a hook point of the model."""
    head: int | None = None
    """Head, for hooks that have an axis of heads."""
    form: str = "additive"
    """For hook_write: "additive", the write k v^T; "net", all that the token changed in the memory, its erase included."""

    def __post_init__(self) -> None:
        require_one_of("Source", "form", self.form, FORMS)

    def __str__(self) -> str:
        head = "" if self.head is None else f", head {self.head}"
        return f"{self.hook}{head}{', net' if self.form == 'net' else ''}"


@dataclass(frozen=True)
class Described:
    """What a source is in one model."""

    kind: str
    """"write", "state" or "vector"."""
    layer: int | None
    """Block that the hook is in; None outside the blocks."""
    d_k: int
    """Width of the samples' key side; for vectors their whole width."""
    d_v: int
    """Width of the value side; 1 for vectors."""
    vector_decay: bool = False
    """For states: whether every key channel decays at its own rate, so that states have to be formed one by one."""


def describe(model: HookedRecurrentModel, source: Source) -> Described:
    """Check a source against a model and say what it is.

    Raises `ValueError` for a hook that the model does not have (with the nearest one), for one without vectors or
    matrices, and for a head that is missing, out of range, or one too many.
    """
    if source.hook not in model.hook_dict:
        raise ValueError(_no_such_hook(model, source.hook))
    layer = _LAYER.match(source.hook)
    number = int(layer.group(1)) if layer else None
    if match := _MATRIX.fullmatch(source.hook):
        _check_head(source, model.cfg.n_heads)
        decay = number is not None and match.group(2) == STATE and _decays_by_channel(model, number)
        if source.form == "net" and match.group(2) == STATE:
            raise ValueError(f"form 'net' is for hook_write, not for {source.hook!r}")
        return Described(match.group(2), number, model.cfg.d_k, model.cfg.d_v, decay)
    if source.form != "additive":
        raise ValueError(f"form {source.form!r} is for hook_write, not for {source.hook!r}")
    shape = _shape_of(model, source.hook)
    if source.hook.endswith(_SQUARE) or len(shape) not in (3, 4):
        raise ValueError(f"{source.hook!r} holds {tuple(shape)} numbers on two tokens, which is no vector per token")
    if len(shape) == 4:
        _check_head(source, shape[2])
    elif source.head is not None:
        raise ValueError(f"{source.hook!r} has no heads, but head {source.head} was asked for")
    return Described(VECTOR, number, shape[-1], 1)


def _check_head(source: Source, n_heads: int) -> None:
    if source.head is None:
        raise ValueError(f"{source.hook!r} has {n_heads} heads: say which head, 0..{n_heads - 1}")
    if not 0 <= source.head < n_heads:
        raise ValueError(f"head must be 0..{n_heads - 1}, got {source.head}")


def _no_such_hook(model: HookedRecurrentModel, hook: str) -> str:
    if match := _MATRIX.fullmatch(hook):
        found = (_MATRIX.fullmatch(name) for name in model.hook_dict)
        layers = sorted({int(other.group(1)) for other in found if other})
        return f"layer {match.group(1)} has no writes; the recurrent layers of this model are {layers}"
    near = get_close_matches(hook, model.hook_dict, n=1, cutoff=0.0)
    return f"this model has no hook {hook!r}{f'; did you mean {near[0]!r}?' if near else ''}"


@torch.no_grad()
def _shape_of(model: HookedRecurrentModel, hook: str) -> torch.Size:
    """Shape of what a hook sees of two tokens; one short run per model tells those of all hooks, whatever its rule."""
    if model not in _SHAPES:
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
        _, cache = model.run_with_cache(tokens, return_type=None, return_cache_object=False)
        _SHAPES[model] = {name: tensor.shape for name, tensor in cache.items()}
    return _SHAPES[model].get(hook, torch.Size())


def _decays_by_channel(model: HookedRecurrentModel, layer: int) -> bool:
    return len(_shape_of(model, f"blocks.{layer}.mixer.hook_log_decay")) == 4


def expand(
    model: HookedRecurrentModel, pattern: str, heads: Sequence[int] | None = None, **fields: str
) -> list[Source]:
    """Every source whose hook fits `pattern`, in which * stands for any layer; of all heads, or those given.

    Raises `ValueError` when no hook fits.
    """
    fitting = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    names = [name for name in model.hook_dict if fitting.fullmatch(name)]
    if not names:
        raise ValueError(_no_such_hook(model, pattern))
    found = []
    for name in names:
        if _MATRIX.fullmatch(name):
            every: Iterable[int | None] = range(model.cfg.n_heads)
        else:
            shape = _shape_of(model, name)
            every = range(shape[2]) if len(shape) == 4 else [None]
        found += [Source(name, head, **fields) for head in (every if heads is None else heads)]
    for source in found:
        describe(model, source)
    return found


@torch.no_grad()
def collect(
    model: HookedRecurrentModel,
    tokens: Int[Tensor, "passage pos"],
    sources: Iterable[Source],
    *,
    dtype: torch.dtype | None = None,
    numbers: Int[Tensor, " passage"] | None = None,
) -> dict[Source, Record]:
    """Records of all sources at every position of these passages: one forward pass, no further than the last layer needed.

    Args:
        model: the language model.
        tokens: passages.
        sources: what to read.
        dtype: of keys, values and vectors, None for what they come in; decays and norms, whose errors add up, stay as they are.
        numbers: what an error calls the passages; by default they are counted from 0.

    Raises:
        ValueError: as `describe` says, and for NaN or infinity, naming hook, head, passage and position.
    """
    described = {source: describe(model, source) for source in sources}
    names = sorted({name for source, about in described.items() for name in _names(model, source, about)})
    layers = [-1 if about.layer is None else about.layer for about in described.values()]
    behind = any(source.hook.startswith("ln_final.") for source in described)
    stop = None if behind else max(layers) + 1
    options: dict[str, Any] = {"names_filter": names, "heads": _heads(described), "stop_at_layer": stop}
    try:
        _, cache = model.run_with_cache(tokens, return_type=None, **options)
    except ValueError as error:  # the model itself looks at what it ends with, and counts rows
        if numbers is None:
            raise
        raise ValueError(f"{error} (the rows are passages {', '.join(map(str, numbers.tolist()))})") from error
    for name in names:
        _check_finite(name, cache, numbers)
    found: dict[Source, Record] = {}
    for source, about in described.items():
        if about.kind == VECTOR:
            found[source] = {"x": _copy(_head_of(cache[source.hook], source), dtype)}
        elif about.kind == WRITE and source.form == "additive":
            sides = {side: cache[f"blocks.{about.layer}.mixer.hook_write_{side}"] for side in ("key", "value")}
            place = cache.kept.heads.index(source.head)
            found[source] = {side: _copy(tensor[:, :, place], dtype) for side, tensor in sides.items()}
    for layer in sorted({about.layer or 0 for source, about in described.items() if source not in found}):
        rest = {s: about for s, about in described.items() if s not in found and about.layer == layer}
        found.update(_net(cache, layer, rest, dtype))
    return {source: found[source] for source in described}


def joined(parts: Sequence[Record]) -> Record:
    """The passages of several records in one. Where some of them needed more terms, the others get terms of zeros."""
    return {name: torch.cat(with_terms([part[name] for part in parts])) for name in parts[0]}


def with_terms(tensors: Sequence[Tensor], least: int = 0) -> list[Tensor]:
    """Tensors of one name with as many terms each, `least` or more: those [passage, pos, term, d] get zeros behind their own.

    How many terms net writes have follows from the numbers: an erase that leaves the write key by more than rounding at a
    single position is a term of its own.
    """
    if tensors[0].ndim != 4:
        return list(tensors)
    terms = max(least, *(tensor.shape[2] for tensor in tensors))
    return [torch.nn.functional.pad(tensor, (0, 0, 0, terms - tensor.shape[2])) for tensor in tensors]


def _names(model: HookedRecurrentModel, source: Source, about: Described) -> list[str]:
    """The hooks that a source is read from."""
    if about.kind == VECTOR:
        return [source.hook]
    roles = ("write_key", "write_value") if about.kind == WRITE and source.form == "additive" else ROLES
    names = [f"blocks.{about.layer}.mixer.hook_{role}" for role in roles]
    return [name for name in names if name in model.hook_dict]


def _heads(described: Mapping[Source, Described]) -> list[int] | None:
    """The heads that the cache has to keep; all of them beside a vector of a mixer, whose hooks may have other heads."""
    if any(about.kind == VECTOR and ".mixer." in source.hook for source, about in described.items()):
        return None
    return (
        sorted({source.head for source in described if source.hook.count(".mixer.") and source.head is not None})
        or None
    )


def _head_of(tensor: Tensor, source: Source) -> Tensor:
    return tensor if source.head is None else tensor[:, :, source.head]


def _copy(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy, so that the activations of the other heads can be freed."""
    return tensor.to(dtype=dtype or tensor.dtype, copy=True, memory_format=torch.contiguous_format)


def _net(
    cache: RecurrentCache, layer: int, described: Mapping[Source, Described], dtype: torch.dtype | None
) -> dict[Source, Record]:
    """Net writes and states of one layer, all heads of it at once."""
    heads = sorted({source.head for source in described if source.head is not None})
    net: Changes = changes(cache, layer, heads)
    if dtype is not None:
        net = replace(net, key=net.key.to(dtype), value=net.value.to(dtype))
    scalar = any(about.kind == STATE and not about.vector_decay for about in described.values())
    # Of the rounded factors: norms of other states than those that the factors make would spoil every error.
    norms = net.squared_norms() if scalar else None
    found: dict[Source, Record] = {}
    for source, about in described.items():
        place = heads.index(source.head or 0)
        found[source] = {side: _copy(getattr(net, side)[:, :, place], None) for side in ("key", "value")}
        if about.kind == STATE:
            found[source]["log_decay"] = _copy(net.log_decay[:, :, place], None)
            if norms is not None:
                found[source]["squared_norm"] = _copy(norms[:, :, place], None)
    return found


def _check_finite(name: str, cache: RecurrentCache, numbers: Tensor | None) -> None:
    activation = cache[name]
    bad = ~torch.isfinite(activation)
    if name.endswith("hook_log_decay"):
        bad &= activation != -torch.inf  # a state may be forgotten altogether
    if bad.any():
        first = bad.nonzero()[0].tolist()
        passage = first[0] if numbers is None else int(numbers[first[0]])
        head = ""
        if activation.ndim == 4:
            head = f", head {cache.kept.heads[first[2]] if '.mixer.' in name else first[2]}"
        raise ValueError(f"NaN or infinity in {name}{head}, at position {first[1]} of passage {passage}")


def samples_of(kind: str, rows: Record) -> Samples:
    """Samples from records whose axes passage and pos have become one, [sample, ...]; for writes and vectors."""
    return Vectors(rows["x"]) if kind == VECTOR else Factored(rows["key"], rows["value"])
