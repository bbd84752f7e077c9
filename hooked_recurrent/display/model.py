"""What a model, a state and a cache show of themselves. Duck-typed: they stand above this floor."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from hooked_recurrent.display.html import card, details, table
from hooked_recurrent.display.lines import brief

# What the rules' configs call the heads of their keys, where these may be fewer than the heads of their states.
KEY_HEADS = ("n_key_heads", "n_groups", "n_key_value_heads")


def ranges(numbers: Iterable[int]) -> str:
    """0–2, 4–6, 8 for ascending whole numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def split_name(name: str) -> tuple[str, int | None]:
    """A hook's name with {l} in the place of its layer, and the layer; None outside the blocks."""
    if not name.startswith("blocks."):
        return name, None
    _, layer, rest = name.split(".", 2)
    return f"blocks.{{l}}.{rest}", int(layer)


def by_layer(names: Iterable[str]) -> dict[str, list[int]]:
    """Per hook name with {l} in it the layers that have it, in the order in which they come; none for one outside."""
    found: dict[str, list[int]] = {}
    for name in names:
        pattern, layer = split_name(name)
        found.setdefault(pattern, []).extend([] if layer is None else [layer])
    return found


def layer_rows(model: Any) -> list[dict[str, Any]]:
    """A row per layer: rule, heads, widths, hooks and parameters; neighbours that are alike share one row."""
    rows: list[tuple[list[int], dict[str, Any]]] = []
    for layer, (kind, block) in enumerate(zip(model.cfg.layer_types, model.blocks, strict=True)):
        row = {
            "rule": kind,
            **_heads(model.cfg.mixer if block.recurrent else model.cfg.attention, block.recurrent),
            "hooks": sum(name.startswith(f"blocks.{layer}.") for name in model.hook_dict),
            "parameters": sum(weight.numel() for weight in block.parameters()),
        }
        if rows and rows[-1][1] == row:
            rows[-1][0].append(layer)
        else:
            rows.append(([layer], row))
    return [{"layers": ranges(layers), **row} for layers, row in rows]


def _heads(cfg: Any, recurrent: bool) -> dict[str, int]:
    keys = next((getattr(cfg, name) for name in KEY_HEADS if hasattr(cfg, name)), cfg.n_heads)
    widths = (cfg.d_k, cfg.d_v) if recurrent else (cfg.d_head, cfg.d_head)
    return {"heads": cfg.n_heads, "key heads": keys, "d_k": widths[0], "d_v": widths[1]}


class ShownModel:
    """Gives a model a repr of one line, a table of its layers, and `long_repr`, the tree of its modules."""

    cfg: Any
    hook_dict: dict[str, Any]
    tokenizer: Any

    def __repr__(self: Any) -> str:
        """One line: layers by rule, heads and widths, parameters, where they are, hooks. `long_repr()` has every module."""
        cfg = self.cfg
        kinds = {kind: cfg.layer_types.count(kind) for kind in dict.fromkeys(cfg.layer_types)}
        sizes = {kind: f"{cfg.n_heads} heads, d_k {cfg.d_k}, d_v {cfg.d_v}" for kind in kinds}
        if cfg.attention is not None:
            sizes["attention"] = f"{cfg.attention.n_heads} heads, d_head {cfg.attention.d_head}"
        layers = " + ".join(f"{count} {kind} layers ({sizes[kind]})" for kind, count in kinds.items())
        return (
            f"{type(self).__name__}({cfg.model_name!r}: {layers}; "
            f"d_model {cfg.d_model}, vocabulary {cfg.d_vocab:,}; {self.parameter_count():,} parameters, "
            f"{brief_dtype(self.dtype)} on {self.device}; {len(self.hook_dict)} hooks)"
        )

    def long_repr(self) -> str:
        """The tree of all modules and hook points, as torch shows any module."""
        return nn.Module.__repr__(self)  # type: ignore[arg-type]

    def hook_table(self) -> pd.DataFrame:
        """A row per kind of hook: its name with {l} for the layer, the layers that have it, how many functions are attached."""
        attached: dict[str, int] = {}
        for name, point in self.hook_dict.items():
            pattern = split_name(name)[0]
            attached[pattern] = attached.get(pattern, 0) + len(point.fwd_hooks) + len(point.bwd_hooks)
        rows = [(name, ranges(layers), attached[name]) for name, layers in by_layer(self.hook_dict).items()]
        return pd.DataFrame(rows, columns=["hook", "layers", "attached"])

    def _repr_html_(self: Any) -> str:
        """The model in numbers, a table of its layers, and its hooks behind a click."""
        cfg, tokenizer = self.cfg, self.tokenizer
        hooks = self.hook_table()
        memory = len(cfg.recurrent_layers) * cfg.n_heads * cfg.d_k * cfg.d_v
        facts = {
            "parameters": f"{self.parameter_count():,}, {brief_dtype(self.dtype)} on {self.device}",
            "d_model": cfg.d_model,
            "d_mlp": cfg.d_mlp,
            "vocabulary": cfg.d_vocab,
            "matrix memory": f"{memory:,} numbers per text, {len(cfg.recurrent_layers)} layers of {cfg.n_heads} [{cfg.d_k}, "
            f"{cfg.d_v}]",
            "tokenizer": "none" if tokenizer is None else _tokenizer(tokenizer),
            "functions attached": int(hooks["attached"].sum()) or None,
        }
        shown = hooks if hooks["attached"].any() else hooks.drop(columns="attached")
        listed = details(f"{len(self.hook_dict)} hooks", table(shown.to_dict("records"), most=len(hooks)))
        return card(type(self).__name__, facts, [table(layer_rows(self)), listed], note=cfg.model_name)


def _tokenizer(tokenizer: Any) -> str:
    """Its class, how many tokens it knows where it says so, and the token that starts a text."""
    size = f", {len(tokenizer):,} tokens" if hasattr(tokenizer, "__len__") else ""
    start = getattr(tokenizer, "bos_token", None)
    return f"{type(tokenizer).__name__}{size}, {'no start token' if start is None else f'start token {start!r}'}"


def brief_dtype(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def size_of(tensors: Iterable[Tensor]) -> str:
    """How much memory these take by themselves, in bytes, KiB, MiB or GiB."""
    size = float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def state_html(state: Any) -> str:
    """A row per layer of a RecurrentState: what it holds, its size, and how large its matrices are."""
    rows = []
    names = dict.fromkeys(name for entry in state.layers for name in entry.tensors())
    for layer, entry in enumerate(state.layers):
        tensors = entry.tensors()
        row: dict[str, Any] = {"layer": layer, "size": size_of(tensors.values())}
        if any(other.matrix is not None for other in state.layers):
            matrix = entry.matrix
            row["mean |S|"] = None if matrix is None else float(matrix.detach().double().norm(dim=(-2, -1)).mean())
        rows.append(row | {name: brief(tensors[name]) if name in tensors else "" for name in names})
    everything = [tensor for entry in state.layers for tensor in entry.tensors().values()]
    facts = {"tokens read": state.position, "texts": state.batch_size, "size": size_of(everything)}
    return card("RecurrentState", facts, [table(rows)] if rows else [])


def cache_html(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """A row per kind of activation that a cache holds: the layers, its shape and how much memory it takes."""
    kinds: dict[tuple[str, str], list[tuple[int | None, Tensor]]] = {}
    for name, tensor in tensors.items():
        pattern, layer = split_name(name)
        kinds.setdefault((pattern, brief(tensor)), []).append((layer, tensor))
    rows = [
        {
            "activation": pattern,
            "layers": ranges(layer for layer, _ in held if layer is not None),
            "holds": holds,
            "size": size_of(tensor for _, tensor in held),
        }
        for (pattern, holds), held in kinds.items()
    ]
    told = {"activations": len(tensors), "size": size_of(tensors.values()), **facts}
    return card("RecurrentCache", told, [table(rows, most=80)])
