"""Files of the paper's code (`torch.save` of its core/sae.py, arXiv:2605.12770) as WriteSAEs that compute the same.

| type | encoder | decoder | tensors |
|---|---|---|---|
| flat | dense | dense | encoder.weight [n, d_in], encoder.bias, decoder.weight [d_in, n], decoder.bias |
| rank1 | dense | sum_r V W^T | encoder.*, V [n, r, first], W [n, r, second], bias [first, second] |
| bilinear | sum_r V^T S W | as rank1 | V_enc, W_enc, b_enc, V_dec, W_dec, bias |
| bilinear_tied | the decoder's factors | as rank1 | no V_enc, W_enc |
| bilinear_flat | bilinear | dense | V_enc, W_enc, b_enc, decoder.weight, decoder.bias |
| bilinear_gated | bilinear, no bias | as rank1 | V_enc, W_enc, b_gate, b_mag, r_mag, V_dec, W_dec, bias |
| bilinear_jumprelu | bilinear | as rank1 | adds log_threshold |

V lives on the first axis of the state S and W on the second. Which axis that is depends on the model: key-first for Gated
DeltaNet, value-first for Mamba-2 and RWKV-7, and the file does not say; `layout` does, and value-first tensors are
transposed. Their encoders see the raw state and their decoders add a bias, which is our mean. Atoms keep the norms that
they were saved with, up to a hundred steps off 1: dividing by them would change every coefficient.

Nothing in a file is run. A pickled module is refused.
"""

import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_recurrent.loading.checkpoint import read_mapping, read_torch
from writesae.config import PRESETS, WriteSAEConfig, require_one_of
from writesae.sae.write_sae import WriteSAE

LAYOUTS = ("key_first", "value_first")
_RANK_1 = ("V_dec", "W_dec", "bias")
_BILINEAR = ("V_enc", "W_enc")
_TENSORS = {
    "flat": ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"),
    "rank1": ("encoder.weight", "encoder.bias", "V", "W", "bias"),
    "bilinear": (*_BILINEAR, "b_enc", *_RANK_1),
    "bilinear_tied": ("b_enc", *_RANK_1),
    "bilinear_flat": (*_BILINEAR, "b_enc", "decoder.weight", "decoder.bias"),
    "bilinear_gated": (*_BILINEAR, "b_gate", "b_mag", "r_mag", *_RANK_1),
    "bilinear_jumprelu": (*_BILINEAR, "b_enc", "log_threshold", *_RANK_1),
}
_COUNTER = "steps_since_active"
_VECTORS = {
    "encoder.bias": "encoder.bias",
    "b_enc": "encoder.bias",
    "b_gate": "activation.gate_bias",
    "b_mag": "activation.magnitude_bias",
    "r_mag": "activation.log_magnitude",
    "log_threshold": "activation.log_threshold",
}
_FACTORS = {"V_enc": 0, "W_enc": 1, "V_dec": 0, "W_dec": 1, "V": 0, "W": 1}
"""Tensors of factors and the axis of the state that they live on."""
_RESAVE = (
    "where you trust it, load it with the code that wrote it and save "
    "torch.save({'model_state_dict': sae.state_dict(), 'config': {...}}, file), with plain values in the config"
)


def load_published(
    path: str | Path,
    *,
    sae_type: str | None = None,
    layout: str = "key_first",
    k: int | None = None,
    threshold: float | None = None,
    d_k: int | None = None,
    d_v: int | None = None,
    model: str | None = None,
    revision: str | None = None,
    hook: str | None = None,
    head: int | None = None,
) -> WriteSAE:
    """A dictionary of the paper's code: the same codes and the same reconstructions.

    The file is a dict with `model_state_dict` and `config`, a dict with a state dict under `sae`, or a bare state dict; a
    `config.json` beside it stands in for a missing config.

    Args:
        path: the .pt file.
        sae_type: type string, where the config does not say it; without either it follows from the tensors' names.
        layout: which axis of their states comes first, "key_first" (Gated DeltaNet) or "value_first" (Mamba-2, RWKV-7).
        k: active atoms; by default the config's.
        threshold: only for files with `use_batchtopk`, whose code learns none and takes the k largest of every batch: the
            score, in raw units, above which an atom is active. Without it the dictionary becomes a TopK one, which is what
            theirs is for one sample at a time.
        d_k: width of the key side; needed when neither factors nor config tell it.
        d_v: width of the value side, likewise.
        model: name of the model for the provenance.
        revision: its revision, likewise.
        hook: which hook its states are; by default that of the config's layer.
        head: which head; by default the config's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged or a pickled module (nothing in it is run), that lacks tensors of its type or has
            others, holds NaN or infinity, or leaves open what no argument tells.
    """
    path = Path(path)
    require_one_of("load_published", "layout", layout, LAYOUTS)
    tensors, config, record = _read(path)
    kind = sae_type or config.get("sae_type") or infer_type(tensors)
    require_one_of("load_published", "sae_type", kind, tuple(_TENSORS))
    _check(path, kind, tensors)
    tensors = {
        name: tensor[:, None] if name in _FACTORS and tensor.ndim == 2 else tensor for name, tensor in tensors.items()
    }
    first, second = (d_k, d_v) if layout == "key_first" else (d_v, d_k)
    sizes = _sizes(path, tensors, first or config.get("d_k"), second or config.get("d_v"))
    ours = _our_tensors(tensors, sizes, layout)
    sae = WriteSAE(_our_config(path, kind, tensors, sizes, layout, config, k, threshold))
    if sae.config.activation == "batch_topk":
        ours["activation.threshold"] = torch.tensor(threshold)
    floats = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
    dtype = torch.float64 if torch.float64 in floats else torch.float32
    own = sae.to(dtype).state_dict()
    for name, tensor in ours.items():
        if tensor.shape != own[name].shape:
            came, wanted = tuple(tensor.shape), tuple(own[name].shape)
            raise ValueError(f"{path}: what becomes {name} has shape {came}, the other tensors ask for {wanted}")
    sae.load_state_dict(own | ours)
    if hook is None and isinstance(config.get("layer"), int):
        hook = f"blocks.{config['layer']}.mixer.hook_state"
    known = {"model": model, "revision": revision, "hook": hook, "layer": config.get("layer"),
             "head": config.get("head") if head is None else head, "training": config or None}  # fmt: skip
    sae.provenance.update({name: value for name, value in known.items() if value is not None})
    sae.provenance["published"] = {"file": path.name, "type": kind, "layout": layout, **record}
    return sae.eval()


def convert(source: str | Path, out: str | Path, **told: Any) -> Path:
    """Read a published file with `load_published`, which has the arguments, and save it as our folder; returns it."""
    return load_published(source, **told).save(out)


def infer_type(tensors: dict[str, Any]) -> str:
    """The type that these tensor names belong to, asked in the order of the code that wrote them."""
    names = set(tensors)
    if "V_enc" in names and "decoder.weight" in names and "V_dec" not in names:
        return "bilinear_flat"
    if "log_threshold" in names:
        return "bilinear_jumprelu"
    if {"b_gate", "r_mag"} <= names:
        return "bilinear_gated"
    if "V_dec" in names:
        return "bilinear" if "V_enc" in names else "bilinear_tied"
    return "rank1" if {"V", "W"} <= names else "flat"


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """The state dict, the config, and the plain values beside them."""
    try:
        content = read_torch(path)
    except ValueError as error:
        raise ValueError(f"{error}; {_RESAVE}") from None
    outer: dict[str, Any] = {}
    state = content
    for name in ("sae", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            outer, state = {**outer, **state}, state[name]
    if not isinstance(state, dict) or not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} holds no state dict, neither bare nor under 'model_state_dict' or 'sae'; {_RESAVE}")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{path} has NaN or infinity in {name}")
    config, beside = outer.get("config"), path.with_name("config.json")
    if config is None and beside.is_file():
        config = read_mapping(beside, "config of a published dictionary")
        if "format_version" in config:  # a dictionary that was converted into the same folder
            config = None
    if not isinstance(config or {}, dict):
        raise ValueError(f"{path} has a config that is no dict but a {type(config).__name__}")
    record: dict[str, Any] = {name: outer[name] for name in ("epoch", "step", "val_mse") if name in outer}
    return state, _plain(config or {}), _plain(record)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The values that JSON knows, numbers in tensors as numbers; the rest as text."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor) and value.numel() == 1:
            return value.item()
        return value if isinstance(value, str | int | float | bool | None) else str(value)

    return {str(name): plain(value) for name, value in values.items()}


def _check(path: Path, kind: str, tensors: dict[str, Tensor]) -> None:
    present = set(tensors) - {_COUNTER}
    wanted = set(_TENSORS[kind])
    if present != wanted:
        lacks = f"lacks {', '.join(sorted(wanted - present))}" if wanted - present else ""
        has = f"has {', '.join(sorted(present - wanted))}" if present - wanted else ""
        raise ValueError(f"{path} is no dictionary of type {kind!r}: it {' and '.join(filter(None, (lacks, has)))}")


def _sizes(path: Path, tensors: dict[str, Tensor], first: int | None, second: int | None) -> tuple[int, int]:
    """Widths of the first and the second axis of their states: from factors, else as told; both must agree."""
    widths: dict[int, int | None] = {0: first, 1: second}
    for name, axis in _FACTORS.items():
        if name in tensors:
            width = tensors[name].shape[-1]
            if widths[axis] not in (None, width):
                raise ValueError(f"{path} has {name} of width {width} where {widths[axis]} was told")
            widths[axis] = width
    rows, columns = widths[0], widths[1]
    d_in = (tensors["decoder.bias"] if "decoder.bias" in tensors else tensors["bias"]).numel()
    if rows is None or columns is None:
        raise ValueError(f"{path} does not say which matrices its {d_in} numbers are: give d_k and d_v")
    if rows * columns != d_in:
        raise ValueError(f"{path} reads {d_in} numbers, which are no matrices of {rows} x {columns}")
    return rows, columns


def _our_tensors(tensors: dict[str, Tensor], sizes: tuple[int, int], layout: str) -> dict[str, Tensor]:
    """Their tensors under our names, key-first."""
    sides = ("key", "value") if layout == "key_first" else ("value", "key")

    def matrices(rows: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_k d_v"]:
        theirs = rows.reshape(-1, *sizes)
        return theirs if layout == "key_first" else theirs.transpose(1, 2)

    ours = {our: tensors[their] for their, our in _VECTORS.items() if their in tensors}
    for name, axis in _FACTORS.items():
        if name in tensors:
            owner = f"encoder.{sides[axis]}_factors" if name.endswith("_enc") else f"decoder.{sides[axis]}_atoms"
            ours[owner] = tensors[name]
    if "encoder.weight" in tensors:
        ours["encoder.weight"] = matrices(tensors["encoder.weight"])
    if "decoder.weight" in tensors:
        ours["decoder.atoms"] = matrices(tensors["decoder.weight"].T)
    bias = tensors["decoder.bias"] if "decoder.bias" in tensors else tensors["bias"]
    ours["mean"] = matrices(bias.reshape(1, -1))[0]
    if _COUNTER in tensors:
        ours[_COUNTER] = tensors[_COUNTER]
    return ours


def _our_config(
    path: Path,
    kind: str,
    tensors: dict[str, Tensor],
    sizes: tuple[int, int],
    layout: str,
    config: dict[str, Any],
    k: int | None,
    threshold: float | None,
) -> WriteSAEConfig:
    n_atoms = next(tensors[name].shape[0] for name in ("encoder.weight", "V_dec", "V_enc") if name in tensors)
    ranks = {tensor.shape[1] for name, tensor in tensors.items() if name in _FACTORS}
    rank = max(ranks, default=1)
    if ranks and config.get("rank", rank) != rank:
        raise ValueError(f"{path} has factors of rank {rank}, its config says {config['rank']}")
    activation = PRESETS[kind][2]
    if activation == "topk":
        k = config.get("k") if k is None else k
        if k is None:
            raise ValueError(f"{path} does not say how many atoms are active at once: give k")
    if threshold is not None:
        if activation != "topk" or not (config.get("use_batchtopk") and math.isfinite(threshold) and threshold >= 0):
            raise ValueError(
                f"threshold is a finite score of at least 0 for files with use_batchtopk, got {threshold!r}"
            )
        activation = "batch_topk"
    d_k, d_v = sizes if layout == "key_first" else sizes[::-1]
    # What training further needs; with an input scale of 1 their units are ours.
    names = {"lambda_sparsity": "sparsity", "bandwidth": "bandwidth", "init_threshold": "init_threshold"}
    training = {our: float(config[their]) for their, our in names.items() if config.get(their)}
    told = {"n_atoms": n_atoms, "k": k or n_atoms, "rank": rank, "center": True, "activation": activation}
    return WriteSAEConfig.preset(kind, d_k, d_v, **told, **training)
