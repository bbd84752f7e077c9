"""The experiments under one name: `from writesae import evaluate; evaluate.replacement(model, sae, tokens, ...)`.

Every experiment is a function of (model, sae, tokens, layer, head, config) that gives a `Result`: `.to_dataframe()` with a row
per measurement, `.summary()`, `.figure()`, `.to_json(path)`.
"""

from writesae.evaluation.baselines import BaselinesConfig, baselines
from writesae.evaluation.class_differences import ClassDifferencesConfig, class_differences
from writesae.evaluation.encoder_swap import EncoderSwapConfig, encoder_swap
from writesae.evaluation.erasure import ErasureConfig, erasure
from writesae.evaluation.firings import encode_cell, sample_firings
from writesae.evaluation.install import InstallConfig, install
from writesae.evaluation.logit_search import strongest_edits
from writesae.evaluation.logit_shift import LogitShiftConfig, logit_shift
from writesae.evaluation.objectives import ObjectivesConfig, compare_objectives
from writesae.evaluation.partition import PartitionConfig, partition
from writesae.evaluation.passage_test import PassageTestConfig, passage_test
from writesae.evaluation.perplexity import PerplexityConfig, perplexity
from writesae.evaluation.population import PopulationConfig, population
from writesae.evaluation.readers import ReadersConfig, readers
from writesae.evaluation.replacement import ReplacementConfig, replacement
from writesae.evaluation.replacement_cells import CellsResult, sweep_cells
from writesae.evaluation.replacement_result import ReplacementResult
from writesae.evaluation.result import Result
from writesae.evaluation.selectivity import SelectivityConfig, selectivity
from writesae.evaluation.sign_test import SignTestConfig, sign_test
from writesae.evaluation.steering import SteeringConfig, steering

__all__ = [
    "BaselinesConfig",
    "CellsResult",
    "ClassDifferencesConfig",
    "EncoderSwapConfig",
    "ErasureConfig",
    "InstallConfig",
    "LogitShiftConfig",
    "ObjectivesConfig",
    "PartitionConfig",
    "PassageTestConfig",
    "PerplexityConfig",
    "PopulationConfig",
    "ReadersConfig",
    "ReplacementConfig",
    "ReplacementResult",
    "Result",
    "SelectivityConfig",
    "SignTestConfig",
    "SteeringConfig",
    "baselines",
    "class_differences",
    "compare_objectives",
    "encode_cell",
    "encoder_swap",
    "erasure",
    "install",
    "logit_shift",
    "partition",
    "passage_test",
    "perplexity",
    "population",
    "readers",
    "replacement",
    "sample_firings",
    "selectivity",
    "sign_test",
    "steering",
    "strongest_edits",
    "sweep_cells",
]
