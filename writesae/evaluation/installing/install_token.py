"""The writes that make one prompt go on with a word: the install experiment's refined direction, as edits to use anywhere."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel, WriteEdit
from hooked_recurrent.config import require_positive
from writesae.evaluation.installing.install_context import PLACES, Context
from writesae.evaluation.installing.install_lambda import (
    Climb,
    at_cells,
    furthest_cells,
    promising,
    refine,
    slope,
    steepest,
)


def install_token(
    model: HookedRecurrentModel,
    tokens: Int[Tensor, "one pos"],
    target: int,
    *,
    magnitude: float = 3.0,
    cell: tuple[int, int] | None = None,
    spread: int = 1,
    new_tokens: int = 20,
    candidates: int = 16,
    rounds: int = 8,
) -> list[WriteEdit]:
    """Writes to add at the last three positions of a prompt so that a token appears in what the model says next.

    They start as the steepest rank-1 writes, the top singular pairs of the gradient with respect to the writes of one head,
    and are refined by some rounds of ascent. What is raised is the log of the sum, over the coming steps of the untouched
    continuation, of p(target) / p(the likeliest other token). Nothing promises that the token appears: run
    `model.generate(tokens, edits=...)` and see; `install` counts how often it does.

    Args:
        model: any HookedRecurrentModel.
        tokens: the prompt, of at least three tokens.
        target: the token that should appear.
        magnitude: norm of each added write in units of the native write's at its position.
        cell: (layer, head) that is written to. By default that of the `candidates` cells with the steepest gradient in which
            the refined writes get furthest.
        spread: into how many cells to write at once, the most promising ones, each with its share of the norm: a head whose
            read is normalised by itself can say only so much, many can say more.
        new_tokens: how many tokens of the continuation are looked at.
        candidates: how many cells are tried where none is given.
        rounds: rounds of ascent; half as many for a cell that is tried.

    Returns:
        `WriteEdit`s of op "add", one per position and cell.

    Raises:
        ValueError, IndexError: for a prompt that is too short or several, a target or cell that does not exist, and sizes
            that are not positive; a cell beside a spread.
    """
    _check(model, tokens, target, cell)
    require_positive("install_token", magnitude=magnitude, new_tokens=new_tokens, candidates=candidates, rounds=rounds)
    require_positive("install_token", spread=spread)
    if cell is not None and spread > 1:
        raise ValueError(
            f"install_token takes a cell or a spread over several, got cell={tuple(cell)} and spread={spread}"
        )
    context = Context.open(model, tokens, 0, tokens.shape[1] - 1, new_tokens)
    wanted = torch.tensor([target], device=context.text.device)
    climb = Climb("greedy", new_tokens, "in_recurrence", "native")
    layers: Sequence[int] = model.cfg.recurrent_layers if cell is None else [cell[0]]
    start = slope(model, context, wanted, [], climb, layers)
    cells: tuple[tuple[int, int], ...]
    if cell is not None:
        cells = ((int(cell[0]), int(cell[1])),)
    elif spread > 1:
        cells = tuple(promising(context, start.writes, spread)[0])
    else:
        options = {"candidates": candidates, "rounds": rounds // 2}
        cells = furthest_cells(model, context, wanted, start, climb, magnitude, **options)
    together = len(cells)
    native = torch.stack([context.native_norms(layer)[:, head] for layer, head in cells])
    norms = native * (magnitude / together**0.5)
    first = steepest(cells, at_cells(start.writes, cells, together), norms, climb.split, together)
    found, _ = refine(model, context, wanted, first, norms, climb, rounds)
    return [
        WriteEdit(layer, head, context.first + place, "add", found.key[row, place], found.value[row, place])
        for row, (layer, head) in enumerate(cells)
        for place in range(PLACES)
    ]


def _check(model: HookedRecurrentModel, tokens: Tensor, target: int, cell: tuple[int, int] | None) -> None:
    cfg = model.cfg
    if len(tokens) != 1 or tokens.shape[1] < PLACES:
        raise ValueError(
            f"an install takes one prompt of at least {PLACES} tokens, got {len(tokens)} of {tokens.shape[1]}"
        )
    if not 0 <= target < cfg.d_vocab:
        raise IndexError(f"target {target} is out of range: the vocabulary has {cfg.d_vocab} tokens")
    if cell is not None and (cell[0] not in cfg.recurrent_layers or not 0 <= cell[1] < cfg.n_heads):
        raise IndexError(
            f"there is no cell {tuple(cell)}: the recurrent layers are {cfg.recurrent_layers}, with heads 0 to "
            f"{cfg.n_heads - 1}"
        )
