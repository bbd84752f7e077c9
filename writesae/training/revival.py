"""Reviving dead atoms, once for every variant: counting, an auxiliary loss, and moving atoms to where they are needed.

An atom that never wins the TopK gets no gradient and stays as it is. Two cures, used together:

- The auxiliary loss (Gao et al. 2024, arXiv:2406.04093, section 2.4) lets the dead atoms alone rebuild what the living
  left over: with R = X - X_hat held fixed, |R - sum_dead b_j A_j|^2, where b is the TopK of the dead atoms' scores. R is
  a sum of k + 1 outer products, so this too costs factors only:

      |R|^2 - 2 sum_j b_j <R, A_j> + |sum_j b_j A_j|^2,    <R, A_j> = (v_j . k)(w_j . v) - sum_i a_i (v_j . v_i)(w_j .
      w_i)

- Resampling (Bricken et al. 2023) moves dead atoms onto badly reconstructed writes. For a write the leading singular
  vectors are its own factors, k/|k| and v/|v|: no decomposition is needed.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from writesae.sae import Codes, LossOutput, WriteSAE
from writesae.sae.factored import inner_with_sum, squared_norm_of_sum

RESAMPLED_ENCODER_LENGTH = 0.5
"""Length of a moved atom's encoder factors, as a share of the living atoms' mean (0.2 in the paper's code)."""


@torch.no_grad()
def count_step(sae: WriteSAE, codes: Codes) -> None:
    """Add one step to every atom's `steps_since_active`, and set those that fired in this batch to zero."""
    fired = torch.zeros_like(sae.steps_since_active)
    fired.scatter_add_(0, codes.indices.reshape(-1), codes.active.reshape(-1).long())
    sae.steps_since_active.add_(1).masked_fill_(fired > 0, 0)


def dead_atoms(sae: WriteSAE, dead_after: int) -> Bool[Tensor, " n_atoms"]:
    """Which atoms have not fired for `dead_after` steps."""
    return sae.steps_since_active >= dead_after


def auxiliary_loss(
    sae: WriteSAE,
    key: Float[Tensor, "batch d_k"],
    value: Float[Tensor, "batch d_v"],
    output: LossOutput,
    dead: Bool[Tensor, " n_atoms"],
    k: int,
) -> Float[Tensor, ""]:
    """Mean squared error, in scaled units, of the residual rebuilt by at most `k` dead atoms; gradients reach only
    these.

    `output` is `sae.loss(key, value)`; the output of `sae.dense_loss` raises `ValueError`. Zero when no atom is dead.
    """
    numbers = dead.nonzero().squeeze(-1)
    k = min(k, len(numbers))
    if k == 0:
        return output.loss.new_zeros(())
    projections, residual = output.projections, output.residual
    if projections is None or residual is None:
        raise ValueError("auxiliary_loss needs the output of sae.loss; that of sae.dense_loss holds no factors")
    places = projections.scores[:, numbers].topk(k, sorted=False).indices
    indices = numbers[places]
    values = sae.activation.apply(sae.encoder.at(indices, key, value, projections, 1 / sae.input_scale), indices)
    key_rows, value_rows = sae.decoder.factors_at(indices)
    coefficients = sae.decoder.per_term(values)
    left_over = residual.coefficients.detach(), residual.left.detach(), residual.right.detach()
    inner = inner_with_sum(key_rows, value_rows, *left_over)
    rebuilt = squared_norm_of_sum(coefficients[:, None], key_rows, value_rows).squeeze(1) - 2 * (coefficients * inner).sum(-1)
    if sae.mean is not None:
        of_atoms = sae.decoder.inner_with_matrix(sae.mean)[indices]
        rebuilt = rebuilt + 2 * (values * of_atoms).sum(-1)
    return (output.errors + rebuilt * sae.input_scale**2).mean()


@torch.no_grad()
def resample(
    sae: WriteSAE,
    optimizer: torch.optim.Optimizer,
    key: Float[Tensor, "batch d_k"],
    value: Float[Tensor, "batch d_v"],
    errors: Float[Tensor, " batch"],
    dead: Bool[Tensor, " n_atoms"],
    generator: torch.Generator,
) -> int:
    """Move dead atoms onto writes of this batch, drawn without replacement in proportion to their squared error.

    At most as many atoms move as there are writes with an error, lowest numbers first. A moved atom becomes the unit
    outer product of its write's factors; its encoder points the same way at a small length, its bias and counter are
    zero, and the optimiser forgets its moments. Returns how many were moved.
    """
    size = key.norm(dim=-1) * value.norm(dim=-1)
    chances = (errors.clamp_min(0) * (size > 0)).double().cpu()
    atoms = dead.nonzero().squeeze(-1)[: int((chances > 0).sum())]
    if len(atoms) == 0:
        return 0
    samples = torch.multinomial(chances, len(atoms), replacement=False, generator=generator).to(key.device)
    key_directions = torch.nn.functional.normalize(key[samples], dim=-1)
    value_directions = torch.nn.functional.normalize(value[samples], dim=-1)
    alive = (~dead).nonzero().squeeze(-1)
    sae.encoder.reset_(atoms, key_directions, value_directions, alive, RESAMPLED_ENCODER_LENGTH)
    sae.decoder.reset_(atoms, key_directions, value_directions)
    sae.steps_since_active[atoms] = 0
    forget_moments(sae, optimizer, atoms)
    return len(atoms)


def forget_moments(sae: WriteSAE, optimizer: torch.optim.Optimizer, atoms: Int[Tensor, " chosen"]) -> None:
    """Zero the optimiser's moments of the chosen atoms; the first axis of every parameter counts the atoms."""
    for parameter in sae.parameters():
        for moment in optimizer.state.get(parameter, {}).values():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                moment[atoms] = 0
