"""Many interventions at the price of what they change."""

from hooked_recurrent.patching.forks import Fork, run_edits

__all__ = ["Fork", "run_edits"]
