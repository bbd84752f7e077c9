"""Reviving dead atoms, once for every variant: counting, an auxiliary loss, and moving atoms to where they are needed.

An atom that never wins a place in a code gets no gradient and stays as it is. Two cures, used together:

- The auxiliary loss (Gao et al. 2024, arXiv:2406.04093, section 2.4) lets the dead atoms alone rebuild what the living
  left over: with R = X - X_hat held fixed, |R - sum_dead b_j A_j|^2, where b is the ReLU of the largest of the dead atoms'
  scores, whatever the sparsifier. Only inner products are needed (`WriteSAE.residual_errors`), so it costs factors where
  the samples have factors.

- Resampling (Bricken et al. 2023) moves dead atoms onto badly reconstructed samples. For a write these are its own
  factors, k/|k| and v/|v|, which need no decomposition. Of a sum of several outer products (a net write, a state) it is
  the leading singular vectors of what is LEFT of it: those of the sum are mixtures of its terms, most of which have an
  atom already.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from writesae.parallel import World
from writesae.sae import Codes, LossOutput, WriteSAE
from writesae.sae.samples import Factored, Matrices, Samples

RESAMPLED_ENCODER_LENGTH = 0.5
"""Length of a moved atom's encoder factors, as a share of the living atoms' mean (0.2 in the paper's code)."""


@torch.no_grad()
def count_step(sae: WriteSAE, codes: Codes, world: World | None = None) -> None:
    """Add one step to every atom's `steps_since_active`, and set those that fired in this batch to zero."""
    fired = torch.zeros_like(sae.steps_since_active)
    fired.scatter_add_(0, codes.indices.reshape(-1), codes.active.reshape(-1).long())
    if world is not None:
        world.max_(fired)
    sae.steps_since_active.add_(1).masked_fill_(fired > 0, 0)


def dead_atoms(sae: WriteSAE, dead_after: int) -> Bool[Tensor, " n_atoms"]:
    """Which atoms have not fired for `dead_after` steps."""
    return sae.steps_since_active >= dead_after


def auxiliary_loss(
    sae: WriteSAE, samples: Samples, output: LossOutput, dead: Bool[Tensor, " n_atoms"], k: int
) -> Float[Tensor, ""]:
    """Mean squared error, in scaled units, of the residual rebuilt by at most `k` dead atoms; gradients reach only these.

    `output` is `sae.loss(samples)`. Zero when no atom is dead.
    """
    numbers = dead.nonzero().squeeze(-1)
    k = min(k, len(numbers))
    if k == 0:
        return output.loss.new_zeros(())
    indices = numbers[output.scores.scores[:, numbers].topk(k, sorted=False).indices]
    values = sae.scores_at(indices, samples, output.scores).relu()
    return sae.residual_errors(samples, output, Codes(indices, values)).mean()


@torch.no_grad()
def resample(
    sae: WriteSAE,
    optimizer: torch.optim.Optimizer,
    samples: Samples,
    errors: Float[Tensor, " batch"],
    dead: Bool[Tensor, " n_atoms"],
    generator: torch.Generator,
    world: World | None = None,
    codes: Codes | None = None,
) -> int:
    """Move dead atoms onto samples of this batch, drawn without replacement in proportion to their squared error.

    At most as many atoms move as there are samples with an error, lowest numbers first. A moved atom becomes the leading
    singular pair of its sample (a dense one the sample itself) at unit norm, or, where the samples are no single outer
    products and `codes` tells how they are rebuilt, that of what is left of its sample; its encoder points the same way
    at a small length, its bias and counter are zero, and the optimiser forgets its moments. With several processes the batch is
    that of all of them, and every process moves the same atoms alike. Returns how many were moved.
    """
    world = world or World()
    chances = world.all_gather((errors.clamp_min(0) * (samples.squared_norms() > 0)).double()).cpu()
    atoms = dead.nonzero().squeeze(-1)[: int((chances > 0).sum())]
    if len(atoms) == 0:
        return 0
    drawn = torch.multinomial(chances, len(atoms), replacement=False, generator=generator).to(errors.device)
    chosen, leading = _drawn(sae, samples, codes, drawn, world)
    alive = (~dead).nonzero().squeeze(-1)
    sae.encoder.reset_(atoms, chosen, leading, alive, RESAMPLED_ENCODER_LENGTH)
    sae.activation.reset_(atoms, alive)
    sae.decoder.reset_(atoms, chosen, leading)
    sae.steps_since_active[atoms] = 0
    forget_moments(sae, optimizer, atoms)
    return len(atoms)


def left_of(sae: WriteSAE, samples: Samples, codes: Codes | None, rows: Int[Tensor, " chosen"]) -> Samples:
    """What the code leaves of the chosen samples, as matrices; the samples themselves where they are single outer products
    (or there is no code).
    """
    chosen = samples.take(rows)
    if codes is None or (isinstance(chosen, Factored) and chosen.terms == 1):
        return chosen
    return Matrices(chosen.matrices() - sae.decode(Codes(codes.indices[rows], codes.values[rows])))


def _drawn(
    sae: WriteSAE, samples: Samples, codes: Codes | None, drawn: Int[Tensor, " chosen"], world: World
) -> tuple[Samples, tuple[Float[Tensor, "chosen d_k"], Float[Tensor, "chosen d_v"]]]:
    """The drawn samples of all processes, as far as the dictionary needs them: leading vectors, and matrices if dense."""
    dense = sae.config.decoder == "dense" or sae.config.encoder == "linear"
    if world.size == 1:
        chosen = left_of(sae, samples, codes, drawn)
        return chosen, chosen.leading(torch.arange(len(chosen), device=drawn.device))
    lengths = world.all_gather(torch.tensor([len(samples)], device=drawn.device))
    first = int(lengths[: world.rank].sum())
    mine = ((drawn >= first) & (drawn < first + len(samples))).nonzero().squeeze(-1)
    own = drawn[mine] - first

    def everyones(part: Tensor) -> Tensor:
        whole = part.new_zeros(len(drawn), *part.shape[1:])
        whole[mine] = part
        return world.sum_(whole)

    chosen = left_of(sae, samples, codes, own)
    key, value = chosen.leading(torch.arange(len(chosen), device=drawn.device))
    matrices = everyones(chosen.matrices()) if dense else key.new_zeros(len(drawn), 0, 0)
    return Matrices(matrices), (everyones(key), everyones(value))


def forget_moments(sae: WriteSAE, optimizer: torch.optim.Optimizer, atoms: Int[Tensor, " chosen"]) -> None:
    """Zero the optimiser's moments of the chosen atoms; the first axis of every parameter counts the atoms."""
    for parameter in sae.parameters():
        for moment in optimizer.state.get(parameter, {}).values():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                moment[atoms] = 0
