"""Until the family takes Samples: the same calls in the terms of today. Goes when it does."""

from dataclasses import dataclass

import torch

from hooked_recurrent.config import StrictConfig
from writesae.sae.samples import Factored
from writesae.stream.activations import collect_writes


class ActivationStream:
    """Stand-in for the stream: everything in memory, a new order every epoch, any batch by its number."""

    def __init__(self, model, tokens, sources, *, batch_size, skip_positions, seed, world=None, **others):
        self.sources, self.batch_size, self.seed = tuple(sources), batch_size, seed
        self.records = {}
        for source in self.sources:
            key, value = collect_writes(model, tokens, source.hook, source.head)
            self.records[source] = tuple(s[:, skip_positions:].flatten(0, 1).float() for s in (key, value))

    def n_samples(self, source):
        """Stand-in."""
        return len(self.records[source][0])

    def _take(self, rows):
        return {s: Factored(key[rows], value[rows]) for s, (key, value) in self.records.items()}

    def batch(self, number):
        """Stand-in."""
        n = self.n_samples(self.sources[0])
        size = min(self.batch_size, n)
        epoch, place = divmod(number, n // size)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed * 100003 + epoch))
        return self._take(order[place * size : (place + 1) * size])

    def sample(self, n):
        """Stand-in."""
        total = self.n_samples(self.sources[0])
        return self._take(torch.randperm(total, generator=torch.Generator().manual_seed(self.seed + 7))[:n])


@dataclass(frozen=True)
class Source(StrictConfig):
    """Stand-in."""

    hook: str
    head: int | None = None
    form: str = "additive"


def kind_of(model, source):
    """Stand-in."""
    name = source.hook.rsplit(".", 1)[-1]
    return {"hook_write": "write", "hook_state": "state"}.get(name, "vector")
