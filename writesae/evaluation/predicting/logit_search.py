"""Which atom, added to which earlier write, moves a token's logit most: from one backward pass, then measured.

To first order, adding eps A_i at position s of a cell (layer, head) moves the logit by eps v_i^T Lambda_s w_i, and one
backward pass of that logit gives Lambda of every cell and position. So all atoms, at all positions, in all cells are compared
without a run for any of them; the best are then run.
"""

from collections.abc import Collection, Iterator

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel, WriteEdit
from hooked_recurrent.cache import RecurrentCache
from hooked_recurrent.patching.forks import run_edits
from writesae.evaluation.predicting.logit_shift_context import Cell
from writesae.sae.write_sae import WriteSAE

# So many positions have their Lambda in memory at once.
POSITIONS_AT_ONCE = 32


def strongest_edits(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    tokens: Int[Tensor, "one pos"],
    target: int,
    *,
    position: int | None = None,
    cells: Collection[Cell] | None = None,
    first_position: int = 1,
    count: int = 20,
    amplitude: float = 0.01,
) -> pd.DataFrame:
    """The edits that move a token's logit most per unit of their Frobenius norm, either way.

    Args:
        model: any HookedRecurrentModel.
        sae: a WriteSAE with outer products for atoms, in the shape of the model's writes.
        tokens: one text.
        target: the token whose logit is to move.
        position: where; by default at the text's last token. Later tokens are not looked at.
        cells: (layer, head) to search; all recurrent ones by default. An atom means something as a direction in every cell, but
            fires in the one that the dictionary was trained on.
        first_position: earliest edited position.
        count: how many edits are returned, at most one per atom, position and cell.
        amplitude: Frobenius norm of the edits that are run, of the sign that the table gives.

    Returns:
        One row per edit, strongest first: layer, head, position, atom, sign (that raises the logit), per_unit (predicted
        shift in logits per unit norm, of the atom as it is), predicted and measured (shift of the logit when the atom is
        added with norm `amplitude` and that sign).

    Raises:
        ValueError, IndexError: for a target, position or cell that does not exist, several texts, dense atoms or atoms of
            another shape.
    """
    position = tokens.shape[1] - 1 if position is None else position
    cells = _cells(model, cells)
    _check(model, sae, tokens, target, position, first_position)
    text = tokens[:, : position + 1].to(model.device)
    roles = ("log_decay", "erase", "probe", "query", "read")
    names = [f"blocks.{layer}.mixer.hook_{role}" for layer in {layer for layer, _ in cells} for role in roles]
    logits, cache = model.run_with_cache(
        text,
        incl_bwd=True,
        metric=lambda made: made[0, position, target],
        names_filter=[name for name in names if name in model.hook_dict],
    )
    key, value = sae.key_atoms.detach(), sae.value_atoms.detach() / sae.atom_norms().detach()[:, None, None]
    found: list[tuple[float, float, int, int, int, int]] = []
    for cell in cells:
        for start, effects in _effects(cache, cell, key, value, first_position, position + 1):
            best = effects.abs().flatten().topk(min(count, effects.numel()))
            for size, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                at, atom = divmod(place, effects.shape[1])
                found.append((size, float(effects[at, atom]), *cell, start + at, atom))
    found = sorted(found, key=lambda entry: (-entry[0], entry[2:]))[:count]
    table = pd.DataFrame([entry[2:] for entry in found], columns=["layer", "head", "position", "atom"])
    table["sign"] = [1 if entry[1] >= 0 else -1 for entry in found]
    table["per_unit"] = [entry[1] for entry in found]
    table["predicted"] = table["per_unit"].abs() * amplitude
    table["measured"] = _measure(model, text, table, key, value * amplitude, target, float(logits[0, position, target]))
    return table


def _effects(
    cache: RecurrentCache,
    cell: Cell,
    key: Float[Tensor, "atom rank d_k"],
    value: Float[Tensor, "atom rank d_v"],
    first: int,
    end: int,
) -> Iterator[tuple[int, Float[Tensor, "pos atom"]]]:
    """(first position, effect of every atom at it and the following ones), a block of positions at a time."""
    for start in range(first, end, POSITIONS_AT_ONCE):
        lambdas = cache.write_grad(*cell, slice(start, min(start + POSITIONS_AT_ONCE, end)))[0]
        # Lambda's product with the value sides first: a row per position and side, never a matrix per atom
        through = torch.einsum("pkv,arv->park", lambdas, value.to(lambdas))
        yield start, torch.einsum("park,ark->pa", through, key.to(lambdas))


def _measure(
    model: HookedRecurrentModel,
    text: Tensor,
    table: pd.DataFrame,
    key: Tensor,
    value: Tensor,
    target: int,
    native: float,
) -> list[float]:
    edits = [
        [
            WriteEdit(row.layer, row.head, row.position, "add", k, v * row.sign)
            for k, v in zip(key[row.atom], value[row.atom], strict=True)
        ]
        for row in table.itertuples()
    ]
    measured = [float("nan")] * len(edits)
    for fork in run_edits(model, text, edits, horizon=None, last_only=True):
        measured[fork.index] = float(fork.logits[-1, target]) - native
    return measured


def _cells(model: HookedRecurrentModel, cells: Collection[Cell] | None) -> list[Cell]:
    cfg = model.cfg
    every = [(layer, head) for layer in cfg.recurrent_layers for head in range(cfg.n_heads)]
    if cells is None:
        return every
    for cell in cells:
        if tuple(cell) not in every:
            raise IndexError(
                f"there is no cell {tuple(cell)}: the recurrent layers are {cfg.recurrent_layers}, with heads 0 to "
                f"{cfg.n_heads - 1}"
            )
    return sorted((layer, head) for layer, head in cells)


def _check(
    model: HookedRecurrentModel, sae: WriteSAE, tokens: Tensor, target: int, position: int, first_position: int
) -> None:
    cfg = model.cfg
    if len(tokens) != 1:
        raise ValueError(f"the search takes one text, got {len(tokens)}")
    if not 0 <= target < cfg.d_vocab:
        raise IndexError(f"target {target} is out of range: the vocabulary has {cfg.d_vocab} tokens")
    if not 0 <= first_position <= position < tokens.shape[1]:
        raise IndexError(
            f"positions {first_position} to {position} do not lie in the text, which has {tokens.shape[1]} tokens"
        )
    if sae.config.decoder == "dense":
        raise ValueError("the dictionary's atoms are dense matrices; the search takes outer products")
    if (sae.config.d_k, sae.config.d_v) != (cfg.d_k, cfg.d_v):
        raise ValueError(
            f"the SAE's atoms are {sae.config.d_k} x {sae.config.d_v}, but the model's writes are {cfg.d_k} x {cfg.d_v}"
        )
