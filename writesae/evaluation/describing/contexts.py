"""The texts in which an atom fires most strongly, with its coefficient at every token around."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.display import Stack, stack, tokens_html
from writesae.evaluation.firings import CellWrites


def atom_coefficients(writes: CellWrites, atom: int) -> Tensor:
    """The atom's coefficient at every token, [passage, pos]; 0 where it is silent."""
    return writes.codes.of(atom)


def top_contexts(
    model: HookedRecurrentModel,
    writes: CellWrites,
    tokens: Int[Tensor, "passage pos"],
    atom: int,
    *,
    files: tuple[str, ...] | None = None,
    count: int = 5,
    before: int = 24,
    after: int = 8,
) -> list[dict[str, Any]]:
    """The strongest firings of an atom, one per passage: tokens as text, a weight per token, the index that fires.

    Each entry holds tokens (list of str), weights (the coefficients of these tokens), firing_index, coefficient, position
    and file (where `files` names the file of every passage).
    """
    coefficients = atom_coefficients(writes, atom)
    strongest, places = coefficients.max(dim=1)
    contexts = []
    for passage in strongest.argsort(descending=True, stable=True)[:count].tolist():
        if strongest[passage] <= 0:
            break
        t = int(places[passage])
        window = slice(max(0, t - before), t + after + 1)
        contexts.append(
            {
                "tokens": model.to_str_tokens(tokens[passage, window]),
                "weights": coefficients[passage, window].tolist(),
                "firing_index": t - window.start,
                "file": files[passage] if files is not None else f"passage {passage}",
                "coefficient": float(strongest[passage]),
                "position": t,
            }
        )
    return contexts


def contexts_html(contexts: Sequence[Mapping[str, Any]], title: str = "") -> Stack:
    """What `top_contexts` gave, one text below the other, shaded on one scale; the firing token is framed."""
    scale = max((float(max(context["weights"])) for context in contexts), default=0.0)
    views = [
        tokens_html(
            context["tokens"],
            context["weights"],
            names=[f"{context['file']}, token {context['position']}: {context['coefficient']:.4g}"],
            scale=scale if scale > 0 else None,
            first=context["position"] - context["firing_index"],
            mark=context["firing_index"],
        )
        for context in contexts
    ]
    return stack(*views, title=title)
