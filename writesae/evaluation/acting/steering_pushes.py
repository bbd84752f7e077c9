"""Which atoms mark the places before a wanted token, and the matrices that push towards it, with their controls."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from writesae.evaluation.acting.atom_edits import dense_atom
from writesae.evaluation.firings import encode_cell
from writesae.sae.write_sae import WriteSAE

if TYPE_CHECKING:
    from writesae.evaluation.acting.steering import SteeringConfig


@dataclass(frozen=True)
class HeadPush:
    """What is added to the state of one head at dose 1, and what stands beside it."""

    head: int
    """Which head."""
    atoms_matrix: Float[Tensor, "d_k d_v"]
    """Sum of the steering atoms, each at its mean boundary coefficient."""
    other: Float[Tensor, "d_k d_v"]
    """Other alive atoms at their own, at the same Frobenius norm."""
    gaussian: Float[Tensor, "d_k d_v"]
    """A rank-1 matrix of Gaussian factors at the same Frobenius norm."""
    atoms: list[dict[str, Any]]
    """Every atom in it as plain values: head, role ("atoms" or "other_atoms"), atom, score, boundary, elsewhere."""


def head_push(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    tokens: Int[Tensor, "passage pos"],
    *,
    layer: int,
    head: int,
    wanted: Int[Tensor, " token"],
    config: "SteeringConfig",
) -> HeadPush:
    """Score the atoms of one head on these passages and make its push and controls.

    Raises `ValueError` where no wanted token ever comes next (or only such tokens do), where no atom fires more before wanted
    tokens, and where fewer atoms are alive than a control of as many needs.
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + head)
    before = is_boundary(tokens.cpu(), wanted, config.first_position)
    codes = encode_cell(model, sae, tokens, layer, head).codes
    means = {}
    for name, where in (("boundary", before), ("elsewhere", ~before)):
        where[:, : config.first_position] = where[:, -1] = False
        places = where.nonzero()
        if not len(places):
            raise ValueError(
                f"none of the tokens comes next anywhere, or nothing else does: no {name} position is left"
            )
        passage, position = places[torch.randperm(len(places), generator=generator)[: config.positions]].unbind(1)
        here = codes.values.cpu()[passage, position], codes.indices.cpu()[passage, position]
        means[name] = mean_coefficients(*here, sae.config.n_atoms)
    score, alive = means["boundary"] - means["elsewhere"], (means["boundary"] + means["elsewhere"]) > 0
    order = score.argsort(descending=True, stable=True)
    chosen = [int(atom) for atom in order[: config.top] if score[atom] > 0]
    if not chosen:
        raise ValueError(f"no atom of head {head} fires more before the wanted tokens than elsewhere")
    rest = alive.clone()
    rest[chosen] = False
    others = rest.nonzero()[:, 0]
    others = others[torch.randperm(len(others), generator=generator)[: len(chosen)]].tolist()
    if len(others) < len(chosen):
        raise ValueError(f"head {head} has {len(others)} other alive atoms, but its control needs {len(chosen)}")
    push = summed(sae, {atom: float(means["boundary"][atom]) for atom in chosen})
    other = summed(sae, {atom: float(means["boundary"][atom] + means["elsewhere"][atom]) / 2 for atom in others})
    key, value = (torch.randn(d, generator=generator, dtype=torch.float64) for d in push.shape)
    told = [
        {"head": head, "role": role, "atom": atom, "score": float(score[atom])}
        | {name: float(mean[atom]) for name, mean in means.items()}
        for role, atoms in (("atoms", chosen), ("other_atoms", others))
        for atom in atoms
    ]
    gaussian = torch.outer(key, value).to(push)
    return HeadPush(head, push, at_norm_of(push, other), at_norm_of(push, gaussian), told)


def is_boundary(
    tokens: Int[Tensor, "passage pos"], wanted: Int[Tensor, " token"], first: int
) -> Bool[Tensor, "passage pos"]:
    """Positions from `first` on whose next token is wanted; a passage's last position has none."""
    found = torch.zeros(tokens.shape, dtype=torch.bool)
    found[:, :-1] = torch.isin(tokens[:, 1:], wanted)
    found[:, :first] = False
    return found


def mean_coefficients(
    values: Float[Tensor, "position k"], indices: Int[Tensor, "position k"], n_atoms: int
) -> Float[Tensor, " n_atoms"]:
    """Mean coefficient of every atom over positions, zero where it is silent; in float64."""
    sums = torch.zeros(n_atoms, dtype=torch.float64)
    return sums.index_add_(0, indices.flatten(), values.flatten().double()) / len(values)


@torch.no_grad()
def summed(sae: WriteSAE, coefficients: dict[int, float]) -> Float[Tensor, "d_k d_v"]:
    """The sum of atoms, each at its coefficient."""
    return torch.stack([coefficient * dense_atom(sae, atom) for atom, coefficient in coefficients.items()]).sum(0)


def at_norm_of(like: Float[Tensor, "d_k d_v"], matrix: Float[Tensor, "d_k d_v"]) -> Float[Tensor, "d_k d_v"]:
    """A matrix at the Frobenius norm of another."""
    return matrix * (like.norm() / matrix.norm().clamp_min(torch.finfo(matrix.dtype).tiny))
