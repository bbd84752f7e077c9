"""SAELens (sae-lens 6): dictionaries go there and back, ours become one of its architectures, its trainer reads our models.

    to_saelens(sae)            an SAE of SAELens's own classes, for dictionaries that they can express
    from_saelens(sae)          a WriteSAE, for topk, jumprelu, gated, standard and batchtopk
    register()                 makes `SAE.load_from_disk` read "writesae", our architecture with its factors
    save_for_saelens(sae, folder)
    saelens_model(model, hook, head)    (writesae/interop/saelens_model.py) one head of a hook as SAELens expects activations

SAELens knows vectors. A matrix [d_k, d_v] is flattened key-first, row after row; a vector hook's dictionary has d_v = 1. Its
`apply_b_dec_to_input` is off in what we write (our encoder sees the raw input) and folded into the biases in what we read.

Without sae-lens, or beside transformer-lens 4, which it does not support, the functions say how to install it.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from writesae.config import WriteSAEConfig
from writesae.interop.flattened import flat
from writesae.sae.write_sae import WriteSAE

INSTALL = (
    "SAELens is not installed beside a transformer-lens that it supports: pip install 'hooked-recurrent[sae-lens]'"
)
ARCHITECTURES = {"topk": "topk", "batch_topk": "jumprelu", "jumprelu": "jumprelu", "gated": "gated"}
"""SAELens's class for each activation that it has."""


def to_saelens(sae: WriteSAE, *, densify: bool = False) -> Any:
    """An SAE of SAELens's own classes with the same codes and reconstructions.

    topk becomes its topk, jumprelu its jumprelu, batch_topk (as SAELens does it itself) a jumprelu with the threshold that
    inference uses, gated its gated. Its decoders are dense, and its encoders whole matrices.

    Args:
        sae: the dictionary.
        densify: write factors out as the matrices that they stand for. Nothing is lost but their form and some memory;
            `register` and `save_for_saelens` keep it.

    Raises:
        ImportError: without SAELens.
        ValueError: factors without `densify`, and soft_gated, which SAELens does not have.
    """
    lens, config = _sae_lens(), sae.config
    if config.activation not in ARCHITECTURES:
        raise ValueError(
            f"SAELens has no {config.activation!r} activation (it has {', '.join(ARCHITECTURES)}); "
            "save_for_saelens keeps it as an architecture of our own"
        )
    if not densify and (config.encoder, config.decoder) != ("linear", "dense"):
        raise ValueError(
            f"SAELens's dictionaries are flat, this one has a {config.encoder} encoder and {config.decoder} atoms: "
            "densify=True writes them out, save_for_saelens keeps their factors"
        )
    architecture = ARCHITECTURES[config.activation]
    classes = {
        "topk": (lens.TopKSAE, lens.TopKSAEConfig, {"k": config.k, "rescale_acts_by_decoder_norm": False}),
        "jumprelu": (lens.JumpReLUSAE, lens.JumpReLUSAEConfig, {}),
        "gated": (lens.GatedSAE, lens.GatedSAEConfig, {}),
    }
    sae_class, config_class, own = classes[architecture]
    result = sae_class(config_class(**_common(sae), **own))
    maps = flat(sae)
    state = {"W_enc": maps.W_enc, "W_dec": maps.W_dec, "b_dec": maps.b_dec, **maps.activation}
    result.load_state_dict({name: tensor.detach().clone().contiguous() for name, tensor in state.items()})
    return result


def from_saelens(sae: Any, *, d_k: int | None = None, d_v: int | None = None) -> WriteSAE:
    """A WriteSAE with the same codes and reconstructions as an SAE of SAELens, trained or loaded.

    Args:
        sae: a topk, jumprelu, gated or standard SAE, a training SAE of those or of batchtopk, or one of ours.
        d_k, d_v: the matrices that its inputs are, flattened key-first; by default what `to_saelens` left on record, else
            vectors, d_k = d_in and d_v = 1.

    Raises:
        ImportError: without SAELens.
        ValueError: an architecture that has no counterpart (transcoders, temporal ones), a normalisation of the input
            that is not folded into its weights, or widths that do not multiply to d_in.
    """
    register()
    from writesae.interop.saelens_sae import FactoredSAE

    if isinstance(sae, FactoredSAE):
        return sae.to_writesae()
    cfg = sae.cfg
    architecture = cfg.architecture()
    if architecture not in ("topk", "jumprelu", "gated", "standard", "batchtopk"):
        raise ValueError(f"SAELens's architecture {architecture!r} has no counterpart among WriteSAEs")
    if getattr(cfg, "normalize_activations", "none") != "none":
        raise ValueError(
            f"this SAE normalises its inputs ({cfg.normalize_activations}), which no WriteSAE does; fold it into the weights"
        )
    recorded = cfg.metadata.writesae or {}
    d_k, d_v = d_k or recorded.get("d_k") or cfg.d_in // (d_v or 1), d_v or recorded.get("d_v") or 1
    if d_k * d_v != cfg.d_in:
        raise ValueError(f"d_k and d_v must multiply to d_in={cfg.d_in}, got {d_k} and {d_v}")
    tensors = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}
    result = WriteSAE(_our_config(architecture, cfg, d_k, d_v)).to(tensors["W_dec"].dtype)
    own = _our_tensors(architecture, cfg, tensors, (d_k, d_v))
    result.load_state_dict(result.state_dict() | own)
    metadata = cfg.metadata
    told = {"model": metadata.model_name, "hook": metadata.hook_name, "head": metadata.hook_head_index}
    result.provenance.update({name: value for name, value in told.items() if value is not None})
    result.provenance |= recorded.get("provenance", {})
    result.provenance["sae_lens"] = {"architecture": architecture, "version": metadata.sae_lens_version}
    return result.eval()


def _our_config(architecture: str, cfg: Any, d_k: int, d_v: int) -> WriteSAEConfig:
    n = cfg.d_sae
    # A ReLU alone is a TopK of everyone: all signed scores, then ReLU.
    kinds = {
        "topk": ("topk", getattr(cfg, "k", n)),
        "standard": ("topk", n),
        "jumprelu": ("jumprelu", n),
        "gated": ("gated", n),
        "batchtopk": ("batch_topk", max(1, round(getattr(cfg, "k", n)))),
    }
    activation, k = kinds[architecture]
    return WriteSAEConfig.preset("flat", d_k, d_v, n_atoms=n, k=min(k, n), center=True, activation=activation)


def _our_tensors(architecture: str, cfg: Any, theirs: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
    """Their tensors under our names, the input's bias and the decoder's norms folded in."""
    W_enc, W_dec, b_dec = theirs["W_enc"], theirs["W_dec"], theirs["b_dec"]
    offset = -(b_dec @ W_enc) if cfg.apply_b_dec_to_input else torch.zeros_like(W_enc[0])
    norms = torch.ones_like(offset)
    if getattr(cfg, "rescale_acts_by_decoder_norm", False):
        norms = W_dec.norm(dim=-1)  # scores and codes are multiplied by them, atoms divided
    ours = {
        "encoder.weight": (W_enc * norms).T.reshape(-1, *shape),
        "decoder.atoms": (W_dec / norms[:, None]).reshape(-1, *shape),
        "mean": b_dec.reshape(shape),
    }
    if architecture == "gated":
        ours["activation.gate_bias"] = theirs["b_gate"] + offset
        ours["activation.magnitude_bias"] = theirs["b_mag"] + theirs["r_mag"].exp() * offset
        ours["activation.log_magnitude"] = theirs["r_mag"]
        return ours
    ours["encoder.bias"] = (theirs["b_enc"] + offset) * norms
    if architecture == "jumprelu":
        # Below zero a threshold is that of the ReLU, which the smallest positive one stands for.
        ours["activation.log_threshold"] = theirs["threshold"].clamp_min(torch.finfo(W_dec.dtype).tiny).log()
    if architecture == "batchtopk":
        ours["activation.threshold"] = theirs["topk_threshold"].to(W_dec.dtype)
    return ours


def register() -> None:
    """Make SAELens know "writesae": `SAE.load_from_disk` then reads what `save_for_saelens` wrote.

    Raises `ImportError` with the way to install SAELens where it is missing.
    """
    _sae_lens()
    import writesae.interop.saelens_sae  # noqa: F401  (registers itself as it is imported)


def save_for_saelens(sae: WriteSAE, folder: str | Path) -> Path:
    """Save a dictionary in SAELens's layout, factors and all, as an SAE of architecture "writesae"; returns the folder.

    A program that reads it calls `register` first.
    """
    register()
    from writesae.interop.saelens_sae import FactoredSAE

    FactoredSAE.from_writesae(sae, _common(sae)).save_model(folder)
    return Path(folder)


def _common(sae: WriteSAE) -> dict[str, Any]:
    """The fields that every config of SAELens has."""
    from sae_lens.saes.sae import SAEMetadata

    config, origin = sae.config, sae.provenance
    parameter = next(sae.parameters())
    return {
        "d_in": config.d_k * config.d_v,
        "d_sae": config.n_atoms,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device),
        "apply_b_dec_to_input": False,
        "metadata": SAEMetadata(
            model_name=origin.get("model"),
            hook_name=origin.get("hook"),
            hook_head_index=origin.get("head"),
            writesae={"d_k": config.d_k, "d_v": config.d_v, "provenance": dict(origin)},
        ),
    }


def _sae_lens() -> Any:
    try:
        import sae_lens
    except ImportError as error:
        raise ImportError(INSTALL) from error
    return sae_lens
