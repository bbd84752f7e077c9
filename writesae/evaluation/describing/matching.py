"""Whether two dictionaries found the same atoms: one-to-one matching by Frobenius cosine, against random dictionaries."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from writesae.sae.write_sae import WriteSAE

MATCHED = 0.9
"""Cosine above which two atoms count as the same one (the paper's)."""


@dataclass(frozen=True)
class Match:
    """How much of a first dictionary a second one holds."""

    n_first: int
    """Atoms of the first that were matched against"""
    n_second: int
    """these of the second."""
    share: float
    """Share of the first's atoms whose partner has a cosine above 0.9; each atom of the second is the partner of one."""
    median_cosine: float
    """Median cosine of the partners."""
    null_share: float
    """The same share for Gaussian atoms of the second's number and rank, the first's against which they are matched."""
    null_median_cosine: float
    """The same median."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


@torch.no_grad()
def atom_cosines(
    first: WriteSAE,
    second: WriteSAE,
    of_first: Int[Tensor, " one"] | None = None,
    of_second: Int[Tensor, " two"] | None = None,
) -> Float[Tensor, "one two"]:
    """Frobenius cosine of atoms of two dictionaries, all by default; 0 beside an atom of norm 0.

    Raises `ValueError` for dictionaries of different shapes.
    """
    shapes = [(sae.config.d_k, sae.config.d_v) for sae in (first, second)]
    if shapes[0] != shapes[1]:
        one, other = (f"{d_k} x {d_v}" for d_k, d_v in shapes)
        raise ValueError(f"atoms of {one} cannot be matched with atoms of {other}")
    chosen = [
        sae.decoder.matrices()[slice(None) if which is None else which].double().flatten(1)
        for sae, which in ((first, of_first), (second, of_second))
    ]
    left, right = (x / x.norm(dim=1, keepdim=True).clamp_min(1e-300) for x in chosen)
    return left @ right.T


def match_atoms(
    first: WriteSAE,
    second: WriteSAE,
    of_first: Int[Tensor, " one"] | None = None,
    of_second: Int[Tensor, " two"] | None = None,
    seed: int = 0,
) -> Match:
    """Match atoms one to one so that the cosines' sum is largest (the Hungarian algorithm, scipy's).

    Args:
        first, second: two dictionaries of the same shape.
        of_first, of_second: which of their atoms to match, for instance those that are alive; all by default.
        seed: of the Gaussian atoms of the null.

    Raises:
        ValueError: for dictionaries of different shapes, or no atoms to match.
    """
    cosines = atom_cosines(first, second, of_first, of_second)
    if not cosines.numel():
        raise ValueError(f"there is nothing to match: {len(cosines)} atoms against {cosines.shape[1]}")
    config = second.config
    generator = torch.Generator().manual_seed(seed)
    count = cosines.shape[1]
    sides = [
        torch.randn(count, config.rank, d, generator=generator, dtype=torch.float64) for d in (config.d_k, config.d_v)
    ]
    noise = (sides[0].mT @ sides[1]).flatten(1)
    own = first.decoder.matrices()[slice(None) if of_first is None else of_first].detach().double().flatten(1).cpu()
    null = (own / own.norm(dim=1, keepdim=True).clamp_min(1e-300)) @ (noise / noise.norm(dim=1, keepdim=True)).T
    share, median = _partners(cosines)
    null_share, null_median = _partners(null)
    return Match(len(cosines), count, share, median, null_share, null_median)


def _partners(cosines: Tensor) -> tuple[float, float]:
    """The share of rows matched above 0.9, and the matches' median cosine."""
    table = cosines.detach().cpu().numpy()
    rows, columns = linear_sum_assignment(table, maximize=True)
    matched = torch.from_numpy(table[rows, columns])
    return float((matched > MATCHED).sum()) / len(table), float(matched.median())
