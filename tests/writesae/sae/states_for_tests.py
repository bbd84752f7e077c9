"""Passages of net writes of every kind, drawn from seeds, with their states formed one after the other."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hooked_recurrent.memory import changes
from writesae.sae.states import StateSequences

D_K, D_V = 3, 5


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def record_of(passages=2, length=40, *, terms=None, d_k=D_K, d_v=D_V, strong=False, vector_decay=False, seed=0):
    """A record of one head: log-decays to -0.5 a step, or with `strong` to -30 and one of -inf."""
    several = () if terms is None else (terms,)
    uniform = random(passages, length, *((d_k,) if vector_decay else ()), seed=seed).sigmoid()
    log_decay = -30.0 * uniform**4 if strong else -0.5 * uniform
    if strong and length > 2:
        log_decay[0, length // 2] = -torch.inf
    return {
        "log_decay": log_decay,
        "key": random(passages, length, *several, d_k, seed=seed + 1) / d_k**0.5,
        "value": random(passages, length, *several, d_v, seed=seed + 2),
    }


def states_by_hand(record):
    """Every state [passage, pos, d_k, d_v], by the definition."""
    key, value = record["key"], record["value"]
    if key.ndim == 3:
        key, value = key[:, :, None], value[:, :, None]
    decay = record["log_decay"].exp()
    decay = decay[..., None] if decay.ndim == 3 else decay[..., None, None]
    state, states = torch.zeros(key.shape[0], key.shape[-1], value.shape[-1], dtype=key.dtype), []
    for position in range(key.shape[1]):
        added = torch.einsum("pmk,pmv->pkv", key[:, position], value[:, position])
        state = decay[:, position] * state + added
        states.append(state)
    return torch.stack(states, dim=1)


def sequences_of(record, skip=0):
    return StateSequences(record["log_decay"], record["key"], record["value"], record.get("squared_norm"), skip)


def record_of_run(cache, layer, head):
    """The record that a stream keeps of one head of a run from an empty memory."""
    net = changes(cache, layer, head)
    record = {"log_decay": net.log_decay[:, :, 0], "key": net.key[:, :, 0], "value": net.value[:, :, 0]}
    if record["log_decay"].ndim == 2:
        record["squared_norm"] = net.squared_norms()[:, :, 0]
    return record


class Largest(TorchDispatchMode):
    """Records the most entries of any tensor that an operation made, backward included."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out
