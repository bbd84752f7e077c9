"""Training a dictionary: loop, dead-atom revival, metrics."""

from writesae.training.metrics import Quality, measure
from writesae.training.trainer import Trainer, TrainResult, fit, train

__all__ = ["Quality", "TrainResult", "Trainer", "fit", "measure", "train"]
