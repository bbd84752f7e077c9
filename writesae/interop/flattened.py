"""A dictionary of matrices written out as one of flattened vectors, key-first and row after row, as elsewhere."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from writesae.sae.write_sae import WriteSAE


@dataclass(frozen=True)
class Flat:
    """A dictionary as maps between flattened matrices and codes, in the raw units of the input."""

    W_enc: Float[Tensor, "d_in n"]
    """Column i is the matrix that atom i's score is the inner product with."""
    W_dec: Float[Tensor, "n d_in"]
    """Row i is atom i."""
    b_dec: Float[Tensor, " d_in"]
    """The mean, or zeros."""
    activation: dict[str, Float[Tensor, " n"]]
    """What the activation adds to the scores, by SAELens's names."""


def flat(sae: WriteSAE) -> Flat:
    """The maps of a dictionary, written out; differentiable in its parameters. They take 2 n d_k d_v numbers."""
    encoder, config = sae.encoder, sae.config
    if config.decoder == "dense":
        atoms = sae.decoder.atoms
    else:
        atoms = torch.einsum("nrk,nrv->nkv", sae.decoder.key_atoms, sae.decoder.value_atoms)
    if config.encoder == "linear":
        listens = encoder.weight
    elif config.encoder == "tied":
        listens = atoms
    else:
        listens = torch.einsum("nrk,nrv->nkv", encoder.key_factors, encoder.value_factors)
    mean = sae.mean if sae.mean is not None else atoms.new_zeros(config.d_k, config.d_v)
    own, unscale = sae.activation, 1 / sae.input_scale
    added: dict[str, Tensor] = {}
    if config.activation in ("gated", "soft_gated"):
        added = {
            "b_gate": own.gate_bias * unscale,
            "b_mag": own.magnitude_bias * unscale,
            "r_mag": own.log_magnitude,
        }
    else:
        added["b_enc"] = encoder.bias * unscale
    if config.activation == "jumprelu":
        added["threshold"] = own.log_threshold.exp() * unscale
    elif config.activation == "batch_topk":
        added["threshold"] = (own.threshold * unscale).expand(config.n_atoms)
    return Flat(listens.flatten(1).T, atoms.flatten(1), mean.flatten(), added)
