"""How many planted atoms a dictionary finds again.

    cosine of a learned atom B and a planted one A:   <A, B> / (|A| |B|),  for outer products the product of the factors'

The sign counts: coefficients are positive on both sides, so an atom found with the wrong sign is not found. Both an
assignment of one learned atom to every planted one (Hungarian method, the sum of cosines at its largest) and the best
match of every planted atom are scored; they differ where one learned atom stands for several planted ones.

A dense atom is compared as it is and, where it is to be used in a write's place, by its leading outer product sigma_1
u_1 v_1^T: the baseline "FlatSAE + SVD" of arXiv:2605.12770.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from writesae.config import TrainConfig, WriteSAEConfig
from writesae.evaluation.planted import Planted, PlantedAtoms
from writesae.evaluation.recovery_result import RecoveryResult
from writesae.sae import WriteSAE
from writesae.training import fit, measure

AS_LEARNED, SVD = "as learned", "svd"
THRESHOLD = 0.95
