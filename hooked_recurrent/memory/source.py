"""Where every look at a memory starts: the six roles of some heads of one layer, and the state that they met."""

from typing import NamedTuple

import torch
from torch import Tensor

from hooked_recurrent.cache import RecurrentCache
from hooked_recurrent.cache.saving import Indices, indices
from hooked_recurrent.factors import Factors, State

ROLES = ("log_decay", "erase", "probe", "write_key", "write_value", "query")

Source = Factors | RecurrentCache
"""The cache of a run (which has many layers, and knows the state it started from), or the factors of one layer."""


class Memory(NamedTuple):
    """The chosen heads of one layer."""

    factors: Factors
    initial_state: State | None
    heads: tuple[int, ...]
    """The layer's number of each head that is left."""


def open_memory(source: Source, layer: int | None, heads: Indices, initial_state: State | None = None) -> Memory:
    """The factors of these heads, and the state [batch, head, d_k, d_v] that the first position met.

    Raises:
        ValueError: a layer without matrix memory; one whose writes or states a function replaced by matrices; a cache
            without a layer, or one that left positions out; factors with a layer; an initial state beside a cache, which
            has its own.
        KeyError: roles that the cache did not keep, with the names_filter that keeps them.
        IndexError: a head that the layer does not have or the cache did not keep.
    """
    if isinstance(source, RecurrentCache):
        if initial_state is not None:
            raise ValueError("a cache knows the state that its run started from: give initial_state with factors only")
        number = _recurrent(source, layer)
        factors = _cached_factors(source, number)
        before = source.initial_state
        matrix = None if before is None else before.layers[number].matrix
        places, numbers = source.kept.head_places("head", heads)
        kept = None if matrix is None else matrix.detach().to(factors.query.device)[:, list(numbers)]
        return Memory(factors.map(lambda tensor: tensor[:, :, places]), kept, numbers)
    if not isinstance(source, Factors):
        raise TypeError(f"expected the cache of a run (run_with_cache) or Factors, got {type(source).__name__}")
    if layer is not None:
        raise ValueError(f"factors are of one layer already: layer {layer} can only be asked of a cache")
    chosen = indices("head", heads, source.query.shape[2])
    kept = None if initial_state is None else initial_state.detach()[:, chosen]
    return Memory(source.map(lambda tensor: tensor[:, :, chosen]), kept, tuple(chosen))


def kept_role(cache: RecurrentCache, layer: int | None, role: str) -> Tensor:
    """One role of a layer, [batch, pos, head, ...]; raises as `open_memory` does."""
    (name,) = _kept_names(cache, _recurrent(cache, layer), (role,))
    tensor = cache.cache_dict[name]
    return tensor if cache.has_batch_dim else tensor[None]


def one_hot_writes(factors: Factors, positions: list[int]) -> Factors:
    """The same recurrence, writing column j of the identity as the value of the j-th asked write and nothing elsewhere.

    Column j of its state is then T(t<-s) k_s, what that write's key has become: nothing in the recurrence depends on the
    value that is written, so this is exact, erase included. With several terms per position, its columns are
    (position, term) in this order.
    """
    batch, length, heads = factors.query.shape[:3]
    terms = tuple(factors.write_key.shape[3:-1])
    columns = len(positions) * (terms[0] if terms else 1)
    like = factors.write_value
    value = torch.zeros(length, *terms, columns, dtype=like.dtype, device=like.device)
    identity = torch.eye(columns, dtype=like.dtype, device=like.device).view(len(positions), *terms, columns)
    # added, not put: a position that is asked for twice has two columns
    value.index_add_(0, torch.tensor(positions, device=like.device), identity)
    return Factors(**{**vars(factors), "write_value": value[None, :, None].expand(batch, -1, heads, *value.shape[1:])})


def _cached_factors(cache: RecurrentCache, layer: int) -> Factors:
    """The factors of a layer, if the cache kept them all and they tell its memory."""
    _kept_names(cache, layer, ROLES)
    if layer in cache.stepped_layers:
        raise ValueError(f"a function on blocks.{layer}.mixer.hook_state changed states, so no factors tell its memory")
    for edit in cache.state_edits(layer):
        raise ValueError(f"{edit} changed states of layer {layer}, so no factors tell its memory")
    if not cache.kept.begins:
        raise ValueError(
            "a memory takes every position from the first one of the run on, and this cache left some out: "
            f"run_with_cache(..., positions=slice({cache.kept.start}, {cache.kept.positions[-1] + 1})) keeps them"
        )
    return cache.factors(layer)


def _recurrent(cache: RecurrentCache, layer: int | None) -> int:
    recurrent = cache.model.cfg.recurrent_layers
    if layer is None:
        raise ValueError(f"a cache holds several layers, so say which; the recurrent ones are {recurrent}")
    if layer not in recurrent:
        raise ValueError(f"layer {layer} has no matrix memory; the recurrent ones are {recurrent}")
    return layer


def _kept_names(cache: RecurrentCache, layer: int, roles: tuple[str, ...]) -> list[str]:
    """The hook names of those roles that the layer has, all of them in the cache."""
    names = [f"blocks.{layer}.mixer.hook_{role}" for role in roles]
    names = [name for name in names if name in cache.model.hook_dict]
    missing = [name for name in names if name not in cache.cache_dict]
    if missing:
        raise KeyError(
            f"the cache lacks {', '.join(missing)}: run_with_cache(..., names_filter={names}) keeps what it takes"
        )
    return names
