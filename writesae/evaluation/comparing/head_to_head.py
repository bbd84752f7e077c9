"""Two things put in the same writes' places: who wins more often against deletion, and whose KL is smaller."""

from typing import Any

import numpy as np

from writesae.evaluation.statistics import (
    cliffs_delta,
    interval,
    paired_wilcoxon,
)

_NOTHING = 1e-12  # nats; a KL below it is rounding, and has no logarithm worth looking at


def against(
    kl: np.ndarray, reference: np.ndarray, delete: np.ndarray, passages: np.ndarray, floor: float, n_resamples: int
) -> dict[str, Any]:
    """Compare KLs with a reference's at the same firings (nats, all [firing]).

    difference: win rate against deletion minus the reference's, with its interval over passages; log_ratio: median of
    log(KL / KL of the reference), where a KL below the floor counts as the floor, with its interval; cliffs_delta (all pairs,
    above 0 where these KLs are the larger); closer, the share of firings with the smaller KL; wilcoxon_p of the pairs.
    """
    least = max(floor, _NOTHING)
    gained = (kl < delete).astype(float) - (reference < delete).astype(float)
    ratio = np.log(np.maximum(kl, least) / np.maximum(reference, least))
    return {
        "difference": float(gained.mean()),
        "difference_by_passage": interval(gained, passages, "mean", n_resamples),
        "log_ratio": float(np.median(ratio)),
        "log_ratio_by_passage": interval(ratio, passages, "median", n_resamples),
        "cliffs_delta": cliffs_delta(kl, reference),
        "closer": float((kl < reference).mean()),
        "wilcoxon_p": paired_wilcoxon(kl, reference).p_value if len(kl) > 1 else float("nan"),
    }
