"""Every experiment of the WriteSAE paper (arXiv:2605.12770) on one model, as one resumable run: `writesae reproduce`.

config     which model and cell, how large, the paper's cells for its own models
bench      model, texts and dictionaries that the experiments share, each made once
steps      the experiments, by name, in order
claims     which way every effect should point, and whether it does
run        runs the steps, keeps each on disk, skips those that are there
paper      the paper's figures;  page  docs/results.md, ours beside them
"""

from writesae.reproduce.config import ReproduceConfig
from writesae.reproduce.run import Outcome, check_steps, reproduce

__all__ = ["Outcome", "ReproduceConfig", "check_steps", "reproduce"]
