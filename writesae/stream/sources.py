"""What a dictionary is trained on: a hook name, a head, and for writes which form of the write.

    hook_write   the rank-1 writes k v^T of one head ("additive"), or all that a token changed, erase included ("net")
    hook_state   the states of one head
    any other    its vectors: [batch, pos, d], or [batch, pos, head, d] of one head

`collect` reads any number of sources off one forward pass, as factors: no matrix of a write or a state is formed.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.config import StrictConfig
from hooked_recurrent.memory.changes import changes
from hooked_recurrent.memory.source import ROLES
from writesae.config import require_one_of
from writesae.sae.samples import Factored, Samples, Vectors

FORMS = ("additive", "net")
WRITE, STATE, VECTOR = "write", "state", "vector"
_MATRIX = re.compile(r"blocks\.(\d+)\.mixer\.hook_(write|state)")
_LAYER = re.compile(r"blocks\.(\d+)\.")
_SQUARE = ("hook_pattern", "hook_attn_scores")
Record = dict[str, Tensor]
"""Tensors of one source, each [passage, pos, ...]: x; or key and value; for states also log_decay and squared_norm."""


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


def _shape_of(model: HookedRecurrentModel, hook: str) -> torch.Size:
    """Shape of what a hook sees of two tokens."""
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, return_type=None, names_filter=[hook])
    return cache[hook].shape


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
    model: HookedRecurrentModel, tokens: Int[Tensor, "passage pos"], sources: Iterable[Source]
) -> dict[Source, Record]:
    """Records of all sources at every position of these passages: one forward pass, no further than the last layer needed.

    Raises `ValueError` as `describe` does, and for NaN or infinity, naming hook, head, passage and position.
    """
    described = {source: describe(model, source) for source in sources}
    names = {name for source, about in described.items() for name in _names(model, source, about)}
    layers = [about.layer for about in described.values()]
    deepest = [layer for layer in layers if layer is not None]
    stop = max(deepest) + 1 if len(deepest) == len(layers) else None
    _, cache = model.run_with_cache(tokens, return_type=None, names_filter=sorted(names), stop_at_layer=stop)
    for name in sorted(names):
        _check_finite(name, cache[name])
    return {source: _record(cache, source, about) for source, about in described.items()}


def _names(model: HookedRecurrentModel, source: Source, about: Described) -> list[str]:
    """The hooks that a source is read from."""
    if about.kind == VECTOR:
        return [source.hook]
    roles = ("write_key", "write_value") if about.kind == WRITE and source.form == "additive" else ROLES
    names = [f"blocks.{about.layer}.mixer.hook_{role}" for role in roles]
    return [name for name in names if name in model.hook_dict]


def _record(cache, source: Source, about: Described) -> Record:
    """Copies, so that the activations of the other heads can be freed."""
    if about.kind == VECTOR:
        x = cache[source.hook]
        return {"x": (x if source.head is None else x[:, :, source.head]).clone()}
    if about.kind == WRITE and source.form == "additive":
        sides = {side: cache[f"blocks.{about.layer}.mixer.hook_write_{side}"] for side in ("key", "value")}
        return {side: tensor[:, :, source.head].clone() for side, tensor in sides.items()}
    net = changes(cache, about.layer, source.head)
    record = {"key": net.key[:, :, 0].clone(), "value": net.value[:, :, 0].clone()}
    if about.kind == STATE:
        record["log_decay"] = net.log_decay[:, :, 0].clone()
        if not about.vector_decay:
            record["squared_norm"] = net.squared_norms()[:, :, 0].clone()
    return record


def _check_finite(name: str, activation: Tensor) -> None:
    bad = ~torch.isfinite(activation)
    if name.endswith("hook_log_decay"):
        bad &= activation != -torch.inf  # a state may be forgotten altogether
    if bad.any():
        passage, position = bad.nonzero()[0, :2].tolist()
        head = f", head {bad.nonzero()[0, 2].item()}" if activation.ndim == 4 else ""
        raise ValueError(f"NaN or infinity in {name}{head}, at position {position} of passage {passage}")


def samples_of(kind: str, rows: Record) -> Samples:
    """Samples from records whose axes passage and pos have become one, [sample, ...]; for writes and vectors."""
    return Vectors(rows["x"]) if kind == VECTOR else Factored(rows["key"], rows["value"])
