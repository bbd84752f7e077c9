"""WriteSAE: sparse autoencoders over the rank-1 writes of recurrent language models."""

from writesae.config import TrainConfig, WriteSAEConfig
from writesae.sae import Codes, Factored, LossOutput, Matrices, Samples, Vectors, WriteSAE, atoms_html
from writesae.stream import ActivationStore, ActivationStream, Passages, Source, passages
from writesae.training import Job, TrainResult, fit, train, train_many

__all__ = [
    "ActivationStore",
    "ActivationStream",
    "Codes",
    "Factored",
    "Job",
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
    "atoms_html",
    "fit",
    "passages",
    "train",
    "train_many",
]
