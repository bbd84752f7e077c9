"""What changes from step to step: learning rate, weight of the sparsity penalty, jumprelu's window. Steps count from 0."""

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


def sparsity_share(step: int, config: TrainConfig) -> float:
    """How much of the sparsity penalty counts: up in a line over `sparsity_warmup_steps`, then all of it."""
    return min(1.0, (step + 1) / max(config.sparsity_warmup_steps, 1))


def bandwidth_share(step: int, config: TrainConfig) -> float:
    """jumprelu's window as a share of the first one: geometrically down to `bandwidth_final` at the last step."""
    return config.bandwidth_final ** (step / max(config.steps - 1, 1))
