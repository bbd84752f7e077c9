"""Where to write so that a token appears: Lambda, the gradient of its log-probability with respect to the writes.

To first order an added write E at position t changes the objective by <E, Lambda_t>, so among all rank-1 writes of one norm
the steepest is the top singular pair of Lambda_t: its key side is what the coming queries read, its value side what moves
the token through everything above. The paper fixes the value side to W_O[h]^T W_U[T] and leaves the key side open.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.edits import Edit
from hooked_recurrent.edits.memory import Reading
from writesae.evaluation.installing.install_context import PLACES, Context
from writesae.evaluation.installing.install_edits import Installs

OBJECTIVES = ("first", "mean", "any", "greedy")
SPLITS = ("native", "singular")


def objective(
    logits: Float[Tensor, "trial step d_vocab"], targets: Int[Tensor, " trial"], kind: str
) -> Float[Tensor, " trial"]:
    """What is raised, in nats, from the logits of the decoding steps.

    first: log p(T) at the first step. mean: its mean over the steps. any: log of the mean of p(T) over the steps, which
    grows with whichever step is the easiest. greedy: log of the sum over the steps of p(T) / p(the most likely other token),
    which a greedy choice turns on.
    """
    place = targets[:, None, None].expand(-1, logits.shape[1], 1)
    if kind == "greedy":
        rival = logits.scatter(-1, place, -torch.inf).amax(-1)
        return (logits.gather(-1, place)[..., 0] - rival).logsumexp(-1)
    wanted = logits.log_softmax(-1).gather(-1, place)[..., 0]
    if kind == "first":
        return wanted[:, 0]
    if kind == "mean":
        return wanted.mean(-1)
    return wanted.logsumexp(-1) - torch.tensor(float(wanted.shape[1])).log()


@dataclass(frozen=True)
class Climb:
    """What is raised, and under which conditions."""

    kind: str
    """One of `OBJECTIVES`."""
    steps: int
    """Steps of the native continuation that it looks at."""
    reading: Reading
    """When an added write is read first; see `WriteEdit`."""
    split: str
    """One of `SPLITS`."""

    @property
    def length(self) -> int:
        """How many tokens must be read from the first install position on."""
        return PLACES if self.kind == "first" else PLACES + self.steps - 1


@dataclass(frozen=True)
class Slope:
    """The objective of every trial at some edits, and its gradients there."""

    value: Float[Tensor, " trial"]
    """The objective."""
    writes: dict[int, Float[Tensor, "trial place head d_k d_v"]]
    """Per layer the gradient with respect to the writes at the install positions."""
    residual: dict[int, Float[Tensor, "trial place d_model"]]
    """Per layer that with respect to hook_resid_post."""


def slope(
    model: HookedRecurrentModel,
    context: Context,
    targets: Int[Tensor, " trial"],
    edits: Sequence[Edit],
    climb: Climb,
    layers: Sequence[int],
) -> Slope:
    """One run over the install positions and the first steps of the native continuation, and one backward pass.

    With reading "cache" a write is not read at its own position, so what its own query reads is taken off.
    """
    rows = len(targets)
    roles = ("log_decay", "erase", "probe", "query", "read")
    names = [f"blocks.{layer}.mixer.hook_{role}" for layer in layers for role in roles]
    names = [name for name in names if name in model.hook_dict]
    names += [f"blocks.{layer}.hook_resid_post" for layer in layers]
    values: list[Tensor] = []

    def total(logits: Tensor) -> Tensor:
        values.append(objective(logits[:, PLACES - 1 :], targets, climb.kind))
        return values[0].sum()

    _, cache = model.run_with_cache(
        context.read[:, : climb.length].expand(rows, -1),
        names_filter=names,
        incl_bwd=True,
        metric=total,
        state=context.trunk.states[context.first].fork(rows),
        edits=list(edits),
    )
    writes = {}
    for layer in layers:
        found = cache.write_grad(layer, slice(None), slice(0, PLACES))
        if climb.reading == "cache":
            query, read = (cache[f"blocks.{layer}.mixer.hook_{name}"] for name in ("query", "read_grad"))
            found = found - (query[..., :, None] * read[..., None, :])[:, :PLACES]
        writes[layer] = found.detach()
    residual = {layer: cache[f"blocks.{layer}.hook_resid_post_grad"][:, :PLACES].detach() for layer in layers}
    return Slope(values[0].detach(), writes, residual)


def top_pairs(
    matrices: Float[Tensor, "*batch d_k d_v"],
) -> tuple[Float[Tensor, "*batch d_k"], Float[Tensor, "*batch d_v"], Float[Tensor, "*batch"]]:
    """Left and right vector and value of the largest singular triple of every matrix."""
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    return left[..., :, 0], right[..., 0, :], values[..., 0]


def budget(
    norms: Float[Tensor, "row place"], singular: Float[Tensor, "row place"], split: str, together: int = 1
) -> Float[Tensor, "row place"]:
    """The norm of every write, of equal root of summed squares over a trial (`together` rows) for every split.

    native: each position's own native norm (times the magnitude). singular: in proportion to the largest singular values
    there, the steepest of all splits.
    """
    if split == "native":
        return norms
    mine, wanted = (part.reshape(-1, together * part.shape[1]) for part in (singular, norms))
    size = mine.norm(dim=-1, keepdim=True)
    return torch.where(size > 0, mine / size * wanted.norm(dim=-1, keepdim=True), wanted).reshape(norms.shape)


def steepest(
    cells: tuple[tuple[int, int], ...],
    matrices: Float[Tensor, "row place d_k d_v"],
    norms: Float[Tensor, "row place"],
    split: str,
    together: int = 1,
) -> Installs:
    """The rank-1 writes of the given norms that are nearest to these matrices: of a gradient, the steepest ones."""
    key, value, singular = top_pairs(matrices)
    return Installs(cells, key, value * budget(norms, singular, split, together)[..., None], together)


def at_cells(
    per_layer: dict[int, Float[Tensor, "trial place head *rest"]],
    cells: tuple[tuple[int, int], ...],
    together: int = 1,
) -> Float[Tensor, "row place *rest"]:
    """Every row's entry at its own cell, from its trial's gradient; a trial has `together` rows."""
    return torch.stack([per_layer[layer][row // together, :, head] for row, (layer, head) in enumerate(cells)])


def promising(
    context: Context, gradient: dict[int, Float[Tensor, "trial place head d_k d_v"]], count: int
) -> list[list[tuple[int, int]]]:
    """Per trial the cells whose steepest write promises most per native norm: sum over places of norm x singular value."""
    promise, cells = [], []
    for layer, found in gradient.items():
        _, _, singular = top_pairs(found)
        promise.append((singular * context.native_norms(layer)).sum(1))
        cells += [(layer, head) for head in range(found.shape[2])]
    best = torch.cat(promise, dim=1).topk(min(count, len(cells)), dim=1).indices
    return [[cells[index] for index in mine] for mine in best.tolist()]


def refine(
    model: HookedRecurrentModel,
    context: Context,
    targets: Int[Tensor, " trial"],
    start: Installs,
    norms: Float[Tensor, "row place"],
    climb: Climb,
    rounds: int,
) -> tuple[Installs, Float[Tensor, " trial"]]:
    """Climb from `start` among the rank-1 writes of these norms, a trial's rows together.

    The gradient is taken anew at the edited point every round. Each round steps along it, at first by as much as the write's
    own length, and returns to the nearest rank-1 writes of the same norms. A step that lowers the objective is halved and
    tried again from the best point so far, which is what comes back together with its objective; so it is never below that
    of `start`.
    """
    layers, together = sorted({layer for layer, _ in start.cells}), start.together
    best, now = start, start
    value = norms.new_full((len(start),), -torch.inf)
    gradient = torch.zeros_like(start.key[..., :, None] * start.value[..., None, :])
    step = torch.ones_like(value)
    for done in range(rounds + 1):
        here = slope(model, context, targets, now.batched(context.first, climb.reading), climb, layers)
        better = here.value > value
        value, step = torch.where(better, here.value, value), torch.where(better, step, step / 2)
        keep = better.repeat_interleave(together)[:, None, None]
        key, kept = torch.where(keep, now.key, best.key), torch.where(keep, now.value, best.value)
        best = Installs(start.cells, key, kept, together)
        gradient = torch.where(keep[..., None], at_cells(here.writes, start.cells, together), gradient)
        if done < rounds:
            along = gradient / gradient.norm(dim=(-1, -2), keepdim=True).clamp(min=1e-30)
            length = step.repeat_interleave(together)[:, None] * norms
            moved = best.key[..., :, None] * best.value[..., None, :] + length[..., None, None] * along
            now = steepest(start.cells, moved, norms, climb.split, together)
    return best, value


def furthest_cells(
    model: HookedRecurrentModel,
    context: Context,
    targets: Int[Tensor, " trial"],
    start: Slope,
    climb: Climb,
    magnitude: float,
    *,
    candidates: int,
    rounds: int,
) -> tuple[tuple[int, int], ...]:
    """Per trial, of the most promising cells the one in which a write of `magnitude` native norms, refined, gets furthest.

    `start` is the slope of the untouched run over every recurrent layer.
    """
    options = promising(context, start.writes, candidates)
    several = len(options[0])
    cells = tuple(cell for mine in options for cell in mine)
    norms = torch.stack([context.native_norms(layer)[:, head] for layer, head in cells]) * magnitude
    repeated = {layer: found.repeat_interleave(several, dim=0) for layer, found in start.writes.items()}
    first = steepest(cells, at_cells(repeated, cells), norms, climb.split)
    _, reached = refine(model, context, targets.repeat_interleave(several), first, norms, climb, rounds)
    best = reached.view(len(options), several).argmax(1).tolist()
    return tuple(mine[index] for mine, index in zip(options, best, strict=True))
