"""The experiments under one name: `from writesae import evaluate; evaluate.replacement(model, sae, tokens, ...)`."""

from writesae.evaluation.firings import encode_cell, sample_firings
from writesae.evaluation.replacement import ReplacementConfig, replacement
from writesae.evaluation.replacement_cells import CellsResult, sweep_cells
from writesae.evaluation.replacement_result import ReplacementResult

__all__ = [
    "CellsResult",
    "ReplacementConfig",
    "ReplacementResult",
    "encode_cell",
    "replacement",
    "sample_firings",
    "sweep_cells",
]
