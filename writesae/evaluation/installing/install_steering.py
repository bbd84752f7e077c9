"""The control that the paper lacks: a steering vector in the residual stream that disturbs the rest of the text as much.

Norms of a write and of a residual vector cannot be compared, so the vector's length is set by bisection until its collateral
KL equals that of the edit it is held against. Two directions: W_U[T] at all install positions, what one would add without
any knowledge of the model's insides; and the gradient of the objective with respect to the same activations, which knows as
much of the model as Lambda does and is not confined to what one head can write.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from writesae.evaluation.installing.install_context import PLACES, Context
from writesae.evaluation.installing.install_edits import Steering
from writesae.evaluation.installing.install_measure import measure

DOUBLINGS = 16
"""Lengths up to this power of two of the first guess are tried before the bisection begins."""
HALVINGS = 9
"""Steps of the bisection; the last interval is 1/512 of the first."""


def unembedding_steering(
    model: HookedRecurrentModel, targets: Int[Tensor, " trial"], layers: tuple[int, ...]
) -> Steering:
    """W_U[T] of length 1 at every install position."""
    rows = model.W_U.detach()[:, targets].T
    return Steering(layers, (rows / rows.norm(dim=-1, keepdim=True))[:, None].expand(-1, PLACES, -1))


def gradient_steering(residual: dict[int, Float[Tensor, "trial place d_model"]], layers: tuple[int, ...]) -> Steering:
    """The gradient at hook_resid_post of every trial's layer, of length 1 over all install positions together."""
    found = torch.stack([residual[layer][trial] for trial, layer in enumerate(layers)])
    return Steering(layers, found / found.norm(dim=(-1, -2), keepdim=True).clamp(min=1e-30))


@torch.no_grad()
def match_collateral(
    model: HookedRecurrentModel,
    context: Context,
    steering: Steering,
    targets: Int[Tensor, " trial"],
    wanted: Float[Tensor, " trial"],
    guess: float = 1.0,
) -> tuple[Steering, Steering]:
    """The vectors scaled so that each trial's collateral KL is the one wanted; and at a length that may stay below it.

    The length is doubled from `guess` until the KL is reached, then bisected. A KL that grows in jumps, or is never
    reached, leaves the longest length that was found to stay below it; the trial's measured KL tells. Such a length can
    be long past the one that serves the target, so the second answer is, of all lengths tried that stay below, the one
    with the highest log p(T) at the first step.
    """
    low = torch.zeros(len(steering), dtype=torch.float64)
    high = torch.full_like(low, torch.inf)
    now = torch.full_like(low, guess)
    wanted = wanted.cpu().double()
    doublings = torch.zeros_like(low)
    best, best_logprob = torch.zeros_like(low), torch.full_like(low, -torch.inf)
    for _ in range(DOUBLINGS + HALVINGS):
        open_rows = ((high.isinf() & (doublings < DOUBLINGS)) | (high - low > high / 2**HALVINGS)).nonzero()[:, 0]
        if not len(open_rows):
            break
        part = Steering(tuple(steering.layers[row] for row in open_rows.tolist()), steering.vector[open_rows])
        trial = part.scaled(now[open_rows]).single(context.first)
        found = measure(model, context, trial, targets[open_rows])
        below = found["collateral_kl"].cpu() <= wanted[open_rows]
        better = below & (found["logprob"].cpu() > best_logprob[open_rows])
        best[open_rows] = torch.where(better, now[open_rows], best[open_rows])
        best_logprob[open_rows] = torch.where(better, found["logprob"].cpu(), best_logprob[open_rows])
        low[open_rows] = torch.where(below, now[open_rows], low[open_rows])
        high[open_rows] = torch.where(below, high[open_rows], now[open_rows])
        doublings[open_rows] += 1
        now = torch.where(high.isinf(), 2 * now, (low + high) / 2)
    return steering.scaled(low), steering.scaled(best)
