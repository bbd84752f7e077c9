"""What an edit of the install positions does: to the target, to everything else, and to twenty greedy tokens."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.edits import Edit
from hooked_recurrent.patching.forks import run_edits
from writesae.evaluation.installing.install_context import PLACES, Context


def collateral(
    logits: Float[Tensor, "trial step d_vocab"],
    native: Float[Tensor, "step d_vocab"],
    targets: Int[Tensor, " trial"],
) -> tuple[Float[Tensor, " trial"], Float[Tensor, " trial"]]:
    """KL on the tokens that are not the target, each distribution renormalised without it, averaged over the steps.

    Both directions, KL(edited || native) and KL(native || edited), in nats. `logits` are the edited run's, `native`
    the untouched run's log-probabilities; both in float64.
    """
    place = targets[:, None, None].expand(-1, logits.shape[1], 1)
    after = logits.scatter(-1, place, -torch.inf).log_softmax(-1)
    rest = torch.log1p(-native[:, targets].exp()).T  # log of what the native run leaves to the other tokens
    share = after.exp()
    after = after.scatter(-1, place, 0.0)  # weighs nothing from here on, and -inf times 0 is no number
    before = native.exp()
    kl = (share * (after - native)).sum(-1) + rest
    told = (before * (native - after)).sum(-1) - (before * native)[:, targets].T
    return kl.mean(-1), (told / rest.exp() - rest).mean(-1)


@torch.no_grad()
def measure(
    model: HookedRecurrentModel,
    context: Context,
    interventions: Sequence[Sequence[Edit]],
    targets: Int[Tensor, " trial"],
) -> dict[str, Float[Tensor, " trial"]]:
    """Per trial, on the untouched model's continuation: logprob and rank of the target at the first step, collateral KLs."""
    logits: list[Tensor] = [torch.empty(0)] * len(interventions)
    for fork in run_edits(model, context.text[:, :-1], list(interventions), horizon=None, trunk=context.trunk):
        logits[fork.index] = fork.logits[PLACES - 1 :]
    made = torch.stack(logits).double()
    first = made[:, 0].log_softmax(-1)
    wanted = first.gather(-1, targets[:, None])
    forward, reverse = collateral(made, context.log_probs, targets)
    return {
        "logprob": wanted[:, 0],
        "rank": (first > wanted).sum(-1).double(),
        "collateral_kl": forward,
        "collateral_kl_reverse": reverse,
    }


@torch.no_grad()
def included(
    model: HookedRecurrentModel, context: Context, edits: Sequence[Edit], targets: Int[Tensor, " trial"], steps: int
) -> Bool[Tensor, " trial"]:
    """Whether the target is among the greedy tokens of every row of a batch, whose edits name their rows."""
    rows = len(targets)
    prompt = context.text[:, context.first : context.position + 1].expand(rows, -1)
    state = context.trunk.states[context.first].fork(rows)
    made = model.generate(prompt, steps, state=state, edits=edits, stop_at_eos=False)
    return (made[:, PLACES:] == targets[:, None]).any(-1)
