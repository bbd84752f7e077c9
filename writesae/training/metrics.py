"""How good a dictionary is on given writes, in the field's usual numbers."""

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from writesae.sae import WriteSAE

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
def measure(sae: WriteSAE, key: Float[Tensor, "write d_k"], value: Float[Tensor, "write d_v"]) -> Quality:
    """Quality of `sae` on these writes, at factor cost. Raises `ValueError` when there are none."""
    if len(key) == 0:
        raise ValueError("measure needs at least one write")
    fired = torch.zeros(sae.config.n_atoms, dtype=torch.bool, device=key.device)
    error = power = active = cosine = silent = 0.0
    for keys, values in zip(key.split(_AT_ONCE), value.split(_AT_ONCE), strict=True):
        output = sae.loss(keys, values)
        codes = output.codes
        error += float(output.errors.double().sum() / sae.input_scale.double() ** 2)
        power += float((keys.double().square().sum(-1) * values.double().square().sum(-1)).sum())
        active += float(codes.l0.sum())
        fired[codes.indices[codes.active]] = True
        fires = codes.active.any(-1)
        silent += float((~fires).sum())
        cosine += float(
            dominant_cosine(sae, keys[fires], values[fires], codes.indices[fires], codes.values[fires]).sum()
        )
    mean = key.double().T @ value.double() / len(key)
    variance = power - len(key) * float(mean.square().sum())
    return Quality(
        fvu=error / max(variance, 1e-12 * power) if power else float("nan"),
        l0=active / len(key),
        dead_fraction=float((~fired).double().mean()),
        cosine=cosine / max(len(key) - silent, 1.0),
        silent_fraction=silent / len(key),
        n_writes=len(key),
    )


def dominant_cosine(
    sae: WriteSAE,
    key: Float[Tensor, "write d_k"],
    value: Float[Tensor, "write d_v"],
    indices: Tensor,
    values: Tensor,
) -> Float[Tensor, " write"]:
    """Cosine between each write and the atom with its largest coefficient, both as matrices, from factors alone."""
    top = indices.gather(1, values.argmax(1, keepdim=True))
    key_rows, value_rows = sae.decoder.factors_at(top)
    inner = ((key_rows @ key[:, :, None]) * (value_rows @ value[:, :, None])).sum((1, 2))
    size = key.norm(dim=-1) * value.norm(dim=-1) * sae.atom_norms()[top.squeeze(1)]
    return inner / size.clamp_min(torch.finfo(size.dtype).tiny)
