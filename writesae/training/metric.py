"""A dictionary that is good where it counts: reconstruction in the metric of the output distribution.

Putting X_hat in the place of a write X moves the output by an expected KL of, to second order,

    1/2 E <Lambda, X - X_hat>^2,      Lambda = d log p(y) / d write,  y drawn from the model itself

for this is the Fisher information of the write. One backward pass of a passage whose labels are drawn at every position gives
a Lambda for every write of every layer that is an unbiased sketch of all coming positions at once: the labels of
different positions are independent, so the cross terms vanish on average.

As a Kronecker product, the Fisher of a cell is about A (x) G with A ~ E[Lambda Lambda^T] on the key side and
G ~ E[Lambda^T Lambda] on the value side (as in Martens and Grosse 2015, arXiv:1503.05671). Then the error is an ordinary one
of transformed writes,

    |A^1/2 (X - X_hat) G^1/2|^2       A^1/2 k v^T G^1/2 = (A^1/2 k)(G^1/2 v)^T

which are outer products as before: `transform` them, train any dictionary at the same cost, and `restore` makes of it one
that has the same codes and rebuilds the writes themselves. Its atoms have unit length in the metric, not in the raw
space, so coefficients there compare what atoms do to the output.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.cache.write_gradients import ROLES
from hooked_recurrent.config import require_positive
from writesae.sae import Factored, WriteSAE


@torch.no_grad()
def output_gradients(
    model: HookedRecurrentModel,
    tokens: Int[Tensor, "passage pos"],
    layer: int,
    head: int,
    generator: torch.Generator,
) -> Float[Tensor, "passage pos d_k d_v"]:
    """Lambda of every write of one cell: the gradient of the log-probability, in nats, of labels drawn from the model.

    One forward and one backward pass; E <Lambda, E>^2 over the draws is the Fisher information of changing a write by E, summed
    over its own and all later positions.
    """

    def of_drawn_labels(logits: Float[Tensor, "passage pos d_vocab"]) -> Tensor:
        chances = logits.detach().double().softmax(-1).flatten(0, 1).cpu()
        drawn = torch.multinomial(chances, 1, generator=generator).to(logits.device)
        return logits.flatten(0, 1).log_softmax(-1).gather(1, drawn).sum()

    names = [f"blocks.{layer}.mixer.hook_{role}" for role in (*ROLES, "read")]
    names = [name for name in names if name in model.hook_dict]
    _, cache = model.run_with_cache(tokens, names_filter=names, heads=[head], incl_bwd=True, metric=of_drawn_labels)
    return cache.write_grad(layer, head, slice(None))


def _root(matrix: Float[Tensor, "d d"], damping: float) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
    """Square root and inverse square root of a covariance scaled to mean eigenvalue 1, plus `damping` times the identity."""
    values, vectors = torch.linalg.eigh(matrix / matrix.diagonal().mean())
    roots = (values.clamp_min(0) + damping).sqrt()
    return vectors * roots @ vectors.T, vectors / roots @ vectors.T


@dataclass(frozen=True)
class OutputMetric:
    """The metric of one cell as the roots of its two sides, each scaled to mean eigenvalue 1 before the damping."""

    key_root: Float[Tensor, "d_k d_k"]
    """A^1/2, symmetric, float64."""
    value_root: Float[Tensor, "d_v d_v"]
    """G^1/2, symmetric, float64."""
    key_inverse: Float[Tensor, "d_k d_k"]
    """A^-1/2."""
    value_inverse: Float[Tensor, "d_v d_v"]
    """G^-1/2."""

    @staticmethod
    def of_gradients(gradients: Float[Tensor, "*sample d_k d_v"], damping: float = 0.01) -> "OutputMetric":
        """The metric of given Lambdas. Raises `ValueError` when all of them are zero, or for a damping that is not positive."""
        require_positive("OutputMetric", damping=damping)
        flat = gradients.double().flatten(0, -3)
        if not flat.any():
            raise ValueError("every gradient is zero: no write of this cell moves the output")
        by_key, by_value = torch.einsum("nkv,nlv->kl", flat, flat), torch.einsum("nkv,nkw->vw", flat, flat)
        (key, key_inverse), (value, value_inverse) = _root(by_key, damping), _root(by_value, damping)
        return OutputMetric(key, value, key_inverse, value_inverse)

    @staticmethod
    def measure(
        model: HookedRecurrentModel,
        tokens: Int[Tensor, "passage pos"],
        layer: int,
        head: int,
        *,
        damping: float = 0.01,
        seed: int = 0,
        batch: int = 4,
    ) -> "OutputMetric":
        """The metric of one cell from one forward and one backward pass over training passages."""
        generator = torch.Generator().manual_seed(seed)
        parts = [output_gradients(model, rows, layer, head, generator) for rows in tokens.split(batch)]
        return OutputMetric.of_gradients(torch.cat(parts), damping)

    def transform(self, samples: Factored) -> Factored:
        """The samples A^1/2 X G^1/2, at the cost of their factors."""
        return Factored(samples.key @ self.key_root.to(samples.key), samples.value @ self.value_root.to(samples.value))

    @torch.no_grad()
    def restore(self, sae: WriteSAE) -> WriteSAE:
        """The dictionary of raw samples that does with X what `sae` does with A^1/2 X G^1/2: the same codes, and
        reconstructions that `transform` would make those of `sae`.

        A tied encoder becomes bilinear. Atoms keep their norm of 1 in the metric, so their raw norms differ
        (`sae.atom_norms()`).
        """
        config = sae.config
        if config.encoder == "tied":
            config = replace(config, encoder="bilinear")
        restored = WriteSAE(config).to(sae.input_scale)
        own = dict(sae.state_dict())
        if sae.config.encoder == "tied":
            own |= {"encoder.key_factors": sae.key_atoms, "encoder.value_factors": sae.value_atoms}
        for name, (key, value) in self._sides().items():
            if name not in own:
                continue
            tensor = own[name].double()
            if key is not None:
                tensor = key.to(tensor.device) @ tensor if value is not None else tensor @ key.to(tensor.device)
            if value is not None:
                tensor = tensor @ value.to(tensor.device)
            own[name] = tensor.to(own[name])
        restored.load_state_dict(own)
        restored.provenance = dict(sae.provenance)
        return restored.train(sae.training)

    def _sides(self) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """What each tensor of a dictionary is multiplied by on its key side and on its value side."""
        return {
            "decoder.key_atoms": (self.key_inverse, None),
            "decoder.value_atoms": (None, self.value_inverse),
            "decoder.atoms": (self.key_inverse, self.value_inverse),
            "encoder.key_factors": (self.key_root, None),
            "encoder.value_factors": (None, self.value_root),
            "encoder.weight": (self.key_root, self.value_root),
            "mean": (self.key_inverse, self.value_inverse),
        }
