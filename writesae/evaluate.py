"""The experiments under one name: `from writesae import evaluate; evaluate.replacement(model, sae, tokens, ...)`.

Every experiment is a function of (model, sae, tokens, layer, head, config) that gives a `Result`: `.to_dataframe()` with a row
per measurement, `.summary()`, `.figure()`, `.to_json(path)`.
"""

from writesae.evaluation.acting.erasure import ErasureConfig, erasure
from writesae.evaluation.acting.readers import ReadersConfig, readers
from writesae.evaluation.acting.steering import SteeringConfig, steering
from writesae.evaluation.comparing.baselines import BaselinesConfig, baselines
from writesae.evaluation.comparing.encoder_swap import EncoderSwapConfig, encoder_swap
from writesae.evaluation.comparing.objectives import ObjectivesConfig, compare_objectives
from writesae.evaluation.describing.class_differences import ClassDifferencesConfig, class_differences
from writesae.evaluation.describing.contexts import contexts_html, top_contexts
from writesae.evaluation.describing.partition import PartitionConfig, partition
from writesae.evaluation.describing.perplexity import PerplexityConfig, perplexity
from writesae.evaluation.describing.selectivity import SelectivityConfig, selectivity
from writesae.evaluation.firings import encode_cell, sample_firings
from writesae.evaluation.installing.install import InstallConfig, install
from writesae.evaluation.installing.install_token import install_token
from writesae.evaluation.predicting.logit_search import strongest_edits
from writesae.evaluation.predicting.logit_shift import LogitShiftConfig, logit_shift
from writesae.evaluation.predicting.sign_test import SignTestConfig, sign_test
from writesae.evaluation.replacing.passage_test import PassageTestConfig, passage_test
from writesae.evaluation.replacing.population import PopulationConfig, population
from writesae.evaluation.replacing.replacement import ReplacementConfig, replacement
from writesae.evaluation.replacing.replacement_cells import CellsResult, sweep_cells
from writesae.evaluation.replacing.replacement_result import ReplacementResult
from writesae.evaluation.result import Result

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
    "contexts_html",
    "encode_cell",
    "encoder_swap",
    "erasure",
    "install",
    "install_token",
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
    "top_contexts",
]
