"""A first look at every cell (layer, head): how long it remembers, how strongly it writes, what one of its writes does.

The effect is the KL, in nats, of the output distribution at t after deleting the cell's write at t, so a survey tells where
a replacement test has something to measure.
"""

import math

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel, WriteEdit
from hooked_recurrent.patching import run_edits


@torch.no_grad()
def survey(
    model: HookedRecurrentModel, tokens: Int[Tensor, "passage pos"], *, positions: int = 6, seed: int = 0
) -> pd.DataFrame:
    """One row per cell: layer, head, half_life, write_norm, deletion_kl: medians over tokens, half-lives in tokens.

    Args:
        model: any HookedRecurrentModel.
        tokens: passages to look at.
        positions: random positions per passage at which every cell's write is deleted once.
        seed: of the choice of positions.
    """
    layers = model.cfg.recurrent_layers
    cells = [(layer, head) for layer in layers for head in range(model.cfg.n_heads)]
    kls: list[Tensor] = []
    decays: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    norms: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    generator = torch.Generator().manual_seed(seed)
    names = [
        f"blocks.{layer}.mixer.hook_{role}" for layer in layers for role in ("log_decay", "write_key", "write_value")
    ]
    for row in tokens:
        plain, cache = model.run_with_cache(row[None], names_filter=names)
        for layer in layers:
            log_decay, key, value = (cache[name][0] for name in names if name.startswith(f"blocks.{layer}."))
            # where every key channel has its own decay, each counts like a token
            decays[layer].append(log_decay.transpose(1, 2).flatten(0, 1) if log_decay.ndim == 3 else log_decay)
            norms[layer].append(key.norm(dim=-1) * value.norm(dim=-1))
        chosen = torch.randperm(len(row) - 1, generator=generator)[:positions] + 1
        edits = [WriteEdit(layer, head, t, "delete") for t in chosen.tolist() for layer, head in cells]
        effects = torch.zeros(len(edits), dtype=torch.float64)
        for fork in run_edits(model, row[None], edits, horizon=0):
            after, before = fork.logits[0].double().log_softmax(-1), plain[0, fork.position].double().log_softmax(-1)
            effects[fork.index] = (after.exp() * (after - before)).sum()
        kls += effects.unflatten(0, (-1, len(cells)))
    effect = torch.stack(kls).median(dim=0).values
    rows = []
    for index, (layer, head) in enumerate(cells):
        decay = torch.cat(decays[layer])[:, head].median()
        rows.append(
            {
                "layer": layer,
                "head": head,
                "half_life": math.log(0.5) / min(float(decay), -1e-12),
                "write_norm": float(torch.cat(norms[layer])[:, head].median()),
                "deletion_kl": float(effect[index]),
            }
        )
    return pd.DataFrame(rows)


def most_effective(cells: pd.DataFrame) -> tuple[int, int]:
    """The cell (layer, head) whose deleted write moves the output most."""
    best = cells.loc[cells["deletion_kl"].idxmax()]
    return int(best["layer"]), int(best["head"])
