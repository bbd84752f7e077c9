"""The texts in which an atom fires most strongly, with its coefficient at every token around."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from writesae.evaluation.firings import CellWrites


def atom_coefficients(writes: CellWrites, atom: int) -> Tensor:
    """The atom's coefficient at every token, [passage, pos]; 0 where it is silent."""
    codes = writes.codes
    return torch.where(codes.indices == atom, codes.values, 0).sum(-1)


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
