"""Sparsifiers: which atoms of a row of scores are active, and what coefficient an active score becomes.

A sparsifier splits in two, so that scores are differentiated at the chosen atoms only: `select` picks the atoms,
without gradient, and `apply` turns the chosen scores into coefficients.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.config import WriteSAEConfig

_GROUPS = 256  # rows of this many group maxima are fastest on the CPU at 2,048 atoms


def largest(scores: Float[Tensor, "batch n_atoms"], k: int) -> Int[Tensor, "batch k"]:
    """Indices of the k largest scores of every row, in no particular order.

    On the CPU a row is first cut into groups: the k largest entries lie in the k groups with the largest maxima,
    because every one of those groups holds an entry at least as large as any entry outside them. So the exact search
    runs over two short rows, not one long one.
    """
    n_atoms = scores.shape[1]
    if scores.device.type != "cpu" or n_atoms % _GROUPS or n_atoms < 4 * _GROUPS or k > _GROUPS // 4:
        return scores.topk(k, sorted=False).indices
    maxima = scores.view(-1, n_atoms // _GROUPS, _GROUPS).amax(1)
    groups = maxima.topk(k, sorted=False).indices
    members = torch.arange(0, n_atoms, _GROUPS, device=scores.device)
    candidates = (members[None, :, None] + groups[:, None, :]).flatten(1)
    return candidates.gather(1, scores.gather(1, candidates).topk(k, sorted=False).indices)


class TopK:
    """The k largest SIGNED scores, then ReLU: at most k atoms are active (Gao et al. 2024, arXiv:2406.04093)."""

    def __init__(self, config: WriteSAEConfig):
        self.k = config.k

    def select(self, scores: Float[Tensor, "batch n_atoms"]) -> Int[Tensor, "batch k"]:
        """The atoms that may be active; no gradient."""
        return largest(scores.detach(), self.k)

    def apply(
        self, chosen_scores: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"]
    ) -> Float[Tensor, "batch k"]:
        """Coefficients of the chosen atoms. The indices are for sparsifiers whose threshold belongs to the atom."""
        return chosen_scores.relu()


ACTIVATIONS = {"topk": TopK}
