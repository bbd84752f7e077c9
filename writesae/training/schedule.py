"""What changes from step to step: the learning rate, and the weight of the sparsity term. Steps count from 0."""

import math

from writesae.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up to `lr` over `warmup_steps`, then down to `lr_min` at the last step as `config.schedule` says."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = max(config.steps - 1 - config.warmup_steps, 1)
    done = min((step - config.warmup_steps) / span, 1.0)
    left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.lr_min + (config.lr - config.lr_min) * left


def sparsity_weight(step: int, config: TrainConfig) -> float:
    """Weight of the sparsity term: up in a line over `sparsity_warmup_steps`, then constant."""
    return config.sparsity_weight * min(1.0, (step + 1) / max(config.sparsity_warmup_steps, 1))
