"""How good a dictionary is on given writes, in the field's usual numbers."""

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from writesae.sae import Codes, Factored, Samples, WriteSAE

_AT_ONCE = 4096


@dataclass(frozen=True)
class Quality:
    """Numbers over one set of writes; `to_dict` gives them as plain values."""

    fvu: float
    """Fraction of variance unexplained: sum |X - X_hat|^2 over sum |X - mean of these X|^2. 0 is perfect."""
    l0: float
    """Mean number of active atoms."""
    dead_fraction: float
    """Share of the dictionary that fires on none of these writes."""
    cosine: float
    """Mean cosine between a write and its most active atom, over writes where an atom fires."""
    silent_fraction: float
    """Share of the writes on which no atom fires."""
    n_writes: int
    """How many writes were measured."""

    def to_dict(self) -> dict[str, int | float]:
        """The fields as plain values."""
        return asdict(self)


@torch.no_grad()
def measure(sae: WriteSAE, samples: Samples | Float[Tensor, "write d_k"], value: Tensor | None = None) -> Quality:
    """Quality of `sae` on these samples (or writes key value^T), by the rule of inference and at the samples' own cost.

    Raises `ValueError` when there are none.
    """
    if isinstance(samples, Tensor):
        if value is None:
            raise ValueError("measure needs samples, or the keys and the values of writes; got keys alone")
        samples = Factored(samples, value)
    if len(samples) == 0:
        raise ValueError("measure needs at least one write")
    was_training = sae.training
    sae.eval()
    fired = torch.zeros(sae.config.n_atoms, dtype=torch.bool, device=samples.device)
    error = power = active = cosine = silent = 0.0
    for block in samples.blocks(_AT_ONCE):
        output = sae.loss(block)
        codes = output.codes
        error += float(output.errors.double().sum() / sae.input_scale.double() ** 2)
        power += float(block.to(dtype=torch.float64).squared_norms().sum())
        active += float(codes.l0.sum())
        fired[codes.indices[codes.active]] = True
        silent += float((~codes.active.any(-1)).sum())
        cosine += float(dominant_cosine(sae, block, codes).sum())
    sae.train(was_training)
    variance = power - len(samples) * float(samples.mean().square().sum())
    return Quality(
        fvu=error / max(variance, 1e-12 * power) if power else float("nan"),
        l0=active / len(samples),
        dead_fraction=float((~fired).double().mean()),
        cosine=cosine / max(len(samples) - silent, 1.0),
        silent_fraction=silent / len(samples),
        n_writes=len(samples),
    )


def dominant_cosine(sae: WriteSAE, samples: Samples, codes: Codes) -> Float[Tensor, " write"]:
    """Cosine between each sample and the atom with its largest coefficient, both as matrices; 0 where no atom fires."""
    largest, slot = codes.values.max(1, keepdim=True)
    top = codes.indices.gather(1, slot)
    samples = samples.to(dtype=sae.dtype)
    inner = sae.decoder.inner_at(samples, top).squeeze(1)
    size = samples.squared_norms().clamp_min(0).sqrt() * sae.atom_norms()[top.squeeze(1)]
    return inner / size.clamp_min(torch.finfo(size.dtype).tiny) * (largest.squeeze(1) > 0)
