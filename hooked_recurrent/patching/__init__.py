"""Many interventions at the price of what they change."""

from hooked_recurrent.patching.forks import Fork, Trunk, run_edits

__all__ = ["Fork", "Trunk", "run_edits"]
