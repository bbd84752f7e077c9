"""Many interventions at the price of what they change: single edits by the thousand, and sweeps over every place of a text."""

from hooked_recurrent.patching.forks import Fork, Trunk, run_edits
from hooked_recurrent.patching.result import Sweep
from hooked_recurrent.patching.sites import SITES
from hooked_recurrent.patching.sweeps import SweepOptions, ablation, activation_patching, attribution_patching

__all__ = [
    "SITES",
    "Fork",
    "Sweep",
    "SweepOptions",
    "Trunk",
    "ablation",
    "activation_patching",
    "attribution_patching",
    "run_edits",
]
