"""Training dictionaries: loop, many at once, dead-atom revival, metrics, checkpoints, logs."""

from writesae.training.jobs import Job, TrainResult
from writesae.training.metrics import Quality, measure
from writesae.training.run import stream_of, train, train_many
from writesae.training.schedule import learning_rate
from writesae.training.trainer import Trainer, fit

__all__ = [
    "Job",
    "Quality",
    "TrainResult",
    "Trainer",
    "fit",
    "learning_rate",
    "measure",
    "stream_of",
    "train",
    "train_many",
]
