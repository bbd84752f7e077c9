"""WriteSAE: sparse autoencoders over the rank-1 writes of recurrent language models."""

from writesae.config import TrainConfig, WriteSAEConfig
from writesae.sae import Codes, LossOutput, WriteSAE
from writesae.stream import Passages, WriteStream, passages
from writesae.training import Job, TrainResult, fit, train, train_many

__all__ = [
    "Codes",
    "Job",
    "LossOutput",
    "Passages",
    "TrainConfig",
    "TrainResult",
    "WriteSAE",
    "WriteSAEConfig",
    "WriteStream",
    "fit",
    "passages",
    "train",
    "train_many",
]
