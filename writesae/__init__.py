"""WriteSAE: sparse autoencoders over the rank-1 writes of recurrent language models."""

from writesae.config import TrainConfig, WriteSAEConfig
from writesae.sae import Codes, Factored, LossOutput, Matrices, Samples, Vectors, WriteSAE
from writesae.stream import ActivationStore, ActivationStream, Passages, Source, passages
from writesae.training import TrainResult, fit, train

__all__ = [
    "ActivationStore",
    "ActivationStream",
    "Codes",
    "Factored",
    "LossOutput",
    "Matrices",
    "Passages",
    "Samples",
    "Source",
    "TrainConfig",
    "TrainResult",
    "Vectors",
    "WriteSAE",
    "WriteSAEConfig",
    "fit",
    "passages",
    "train",
]
