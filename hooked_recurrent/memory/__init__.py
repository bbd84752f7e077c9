"""Looking at a memory: what reads read, how long writes last, how full the state is. For every rule, from the six roles alone.

    effective_attention   how much of every write is in every read, exactly
    retention             how much of a write is left in the state, token after token
    spectrum              singular values of the state over time, and its effective ranks
    half_life             how many tokens the decay alone leaves a memory
    changes               what every token did to the state, erase and write in one: its net write

Each takes the cache of a run (or bare Factors) and gives a small result with its numbers as tensors, `to_dataframe()` and
`figure()`; `hooked_recurrent.memory.plots` has these pictures and more, of single writes and states too.
"""

from hooked_recurrent.memory.attention import EffectiveAttention, effective_attention
from hooked_recurrent.memory.changes import Changes, changes
from hooked_recurrent.memory.decay import HalfLives, half_life
from hooked_recurrent.memory.remains import Retention, retention
from hooked_recurrent.memory.spectra import Spectrum, spectrum

__all__ = [
    "Changes",
    "EffectiveAttention",
    "HalfLives",
    "Retention",
    "Spectrum",
    "changes",
    "effective_attention",
    "half_life",
    "retention",
    "spectrum",
]
