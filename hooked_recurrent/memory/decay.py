"""Half-lives: how many tokens the decay leaves a memory.

A memory that decays by exp(log_decay) per token (log_decay <= 0) is halved after log(1/2) / log_decay tokens, if the rate is
held. The erase is not in this number: `retention` measures what the two together leave of a write.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from hooked_recurrent.display import OneLine
from hooked_recurrent.factors import Factors
from hooked_recurrent.memory.source import Indices, Source, kept_role, open_memory

if TYPE_CHECKING:  # a look at numbers does not load matplotlib
    from matplotlib.figure import Figure

COLUMNS = ("lower_quartile", "median", "upper_quartile", "of_mean_log_decay")


def half_life_quartiles(log_decay: Float[np.ndarray, "tokens *rest"]) -> Float[np.ndarray, "four *rest"]:
    """Half-lives in tokens from log-decays <= 0: lower quartile, median and upper quartile, and that of the mean log-decay.

    The last one is what long stretches of text do to the memory. A decay of 1 has an infinite half-life.
    """
    # Half-life is increasing in log-decay, so its quartiles are those of the log-decay, in the same order.
    rates = np.stack([*np.quantile(log_decay, [0.25, 0.5, 0.75], axis=0), log_decay.mean(axis=0)])
    with np.errstate(divide="ignore"):
        return math.log(2) / np.abs(rates)


@dataclass(frozen=True, repr=False)
class HalfLives(OneLine):
    """The decay of some heads over a run, as half-lives in tokens."""

    layer: int | None
    """Which layer; None for bare factors."""
    heads: tuple[int, ...]
    """The layer's numbers of the heads along the head axis."""
    log_decay: Float[Tensor, "batch pos head *d_k"]
    """log d_t <= 0, with a channel axis where every key channel decays at its own rate."""

    def per_token(self) -> Float[Tensor, "batch pos head *d_k"]:
        """The half-life that the memory would have, in tokens, if every token decayed it as this one does; inf for no decay."""
        return math.log(2) / self.log_decay.abs()

    def quartiles(self) -> Float[np.ndarray, "four head *d_k"]:
        """Per head (and channel) over all tokens: lower quartile, median, upper quartile, and that of the mean log-decay."""
        return half_life_quartiles(self.log_decay.detach().double().flatten(0, 1).cpu().numpy())

    def figure(self, *more: "HalfLives") -> "Figure":
        """The half-lives of every head, and below them those of further layers: `plots.half_life_strip`."""
        from hooked_recurrent.memory.plots import half_life_strip

        return half_life_strip(self, *more)

    def to_dataframe(self) -> pd.DataFrame:
        """A row per head, or per head and channel, in tokens: the four numbers of `quartiles`."""
        numbers = self.quartiles()
        keys = [(head, *channel) for head in self.heads for channel in np.ndindex(numbers.shape[2:])]
        table = pd.DataFrame(keys, columns=["head", "channel"][: numbers.ndim - 1])
        table.insert(0, "layer", self.layer)
        return pd.concat([table, pd.DataFrame(numbers.reshape(len(COLUMNS), -1).T, columns=COLUMNS)], axis=1)


def half_life(source: Source, layer: int | None = None, heads: Indices = None) -> HalfLives:
    """How long the decay of some heads leaves their memory, in tokens.

    Args:
        source: the cache of a run that kept hook_log_decay of this layer, or factors.
        layer: which layer of the cache; None with factors.
        heads: one, a slice, several, or None for all; the axis stays.

    Raises:
        ValueError, KeyError, IndexError: as `open_memory` says.
    """
    if isinstance(source, Factors):
        factors, _, chosen = open_memory(source, layer, heads)
        return HalfLives(layer, chosen, factors.log_decay)
    log_decay = kept_role(source, layer, "log_decay")
    places, numbers = source.kept.head_places("head", heads)
    return HalfLives(layer, numbers, log_decay[:, :, places])
