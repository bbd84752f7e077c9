"""Mamba-2: transformers' `mamba2` checkpoints and the original layout of state-spaces/mamba.

The two differ in their config.json and in one tensor name (the embedding). Handled: any number of groups, biases, limits of
the step size, tied and untied heads, a float32 residual stream. Refused by name: activations other than SiLU, LayerNorm on
the residual stream, and of the original's options MLPs, softmax layers, Mamba-1 layers, part-wide memories (`d_ssm`), a skip
per channel (`D_has_hdim`), an ungated norm (`rmsnorm`).

Old transformers checkpoints carry `norm_before_gate: true` (Codestral Mamba among them). transformers never read it: the
norm comes after the gate there, and so it does here. The original layout's `norm_before_gate` means what it says.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hooked_recurrent.config import ModelConfig
from hooked_recurrent.loading.checkpoint import Entry
from hooked_recurrent.mixers.mamba2 import Mamba2Config

SAVED_AS = "mamba2"
RULE = Mamba2Config.rule
MODEL_TYPES = (SAVED_AS,)
NO_LIMIT = (0.0, math.inf)
# The epsilon that the original code gives to every norm; its configs do not mention it.
ORIGINAL_EPS = 1e-5
# ssm_cfg: what may stand there, and what is assumed where it does not. The second row only matters to training.
ORIGINAL_DEFAULTS: dict[str, Any] = {
    **{"layer": "Mamba1", "d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1, "bias": False},
    **{
        "conv_bias": True,
        "dt_limit": NO_LIMIT,
        "norm_before_gate": False,
        "rmsnorm": True,
        "D_has_hdim": False,
        "d_ssm": None,
    },
}
TRAINING_ONLY = {"A_init_range", "dt_min", "dt_max", "dt_init_floor", "conv_init", "chunk_size", "use_mem_eff_path"}


def config_from_hf(hf: Any, name: str) -> ModelConfig:
    """Our config from a transformers config object; refuses what this family does not cover, by name."""
    if hf.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act {hf.hidden_act!r} is not supported; Mamba-2 models use 'silu'")
    if not getattr(hf, "rms_norm", True):
        raise ValueError("rms_norm=False is not supported; Mamba-2 models normalise by RMSNorm")
    return ModelConfig(
        d_model=hf.hidden_size,
        d_vocab=hf.vocab_size,
        d_mlp=None,
        layer_types=(RULE,) * hf.num_hidden_layers,
        mixer=Mamba2Config(
            n_heads=hf.num_heads,
            n_groups=hf.n_groups,
            d_k=hf.state_size,
            d_v=hf.head_dim,
            conv_size=hf.conv_kernel,
            conv_bias=hf.use_conv_bias,
            bias=hf.use_bias,
            dt_limit=_limits(hf.time_step_limit),
            norm_eps=hf.layer_norm_epsilon,
        ),
        norm_eps=hf.layer_norm_epsilon,
        norm_offset=0.0,
        residual_in_fp32=hf.residual_in_fp32,
        tied_embeddings=hf.tie_word_embeddings,
        model_name=name,
    )


def _limits(given: Sequence[float]) -> tuple[float, float]:
    low, high = given
    return float(low), float(high)


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of state-spaces/mamba."""
    return "model_type" not in config and {"d_model", "n_layer", "ssm_cfg"} <= set(config)


def config_from_original(raw: Mapping[str, Any], name: str) -> ModelConfig:
    """Our config from the config.json of state-spaces/mamba; refuses what this family does not cover, by name."""
    ssm = ORIGINAL_DEFAULTS | dict(raw["ssm_cfg"])
    _refuse_original(raw, ssm)
    inner, vocabulary, multiple = (
        ssm["expand"] * raw["d_model"],
        raw["vocab_size"],
        raw.get("pad_vocab_size_multiple", 8),
    )
    if not isinstance(inner, int) or inner % ssm["headdim"]:
        raise ValueError(f"headdim {ssm['headdim']} does not divide expand * d_model = {inner}")
    return ModelConfig(
        d_model=raw["d_model"],
        d_vocab=math.ceil(vocabulary / multiple) * multiple,
        d_mlp=None,
        layer_types=(RULE,) * raw["n_layer"],
        mixer=Mamba2Config(
            n_heads=inner // ssm["headdim"],
            n_groups=ssm["ngroups"],
            d_k=ssm["d_state"],
            d_v=ssm["headdim"],
            conv_size=ssm["d_conv"],
            conv_bias=ssm["conv_bias"],
            bias=ssm["bias"],
            dt_limit=_limits(ssm["dt_limit"]),
            norm_eps=ORIGINAL_EPS,
            norm_before_gate=ssm["norm_before_gate"],
        ),
        norm_eps=ORIGINAL_EPS,
        norm_offset=0.0,
        residual_in_fp32=raw.get("residual_in_fp32", True),
        tied_embeddings=raw.get("tie_embeddings", True),
        model_name=name,
    )


def _refuse_original(raw: Mapping[str, Any], ssm: Mapping[str, Any]) -> None:
    unknown = sorted(set(ssm) - set(ORIGINAL_DEFAULTS) - TRAINING_ONLY)
    refusals = [
        (bool(unknown), f"ssm_cfg has options that are not known here: {', '.join(unknown)}"),
        (ssm["layer"] != "Mamba2", f"layers of type {ssm['layer']!r} are not supported, only 'Mamba2'"),
        (
            bool(raw.get("attn_layer_idx")),
            f"softmax layers (attn_layer_idx {raw.get('attn_layer_idx')}) are not supported",
        ),
        (bool(raw.get("d_intermediate")), f"MLPs (d_intermediate {raw.get('d_intermediate')}) are not supported"),
        (not raw.get("rms_norm", True), "rms_norm=false is not supported: only RMSNorm on the residual stream"),
        (not ssm["rmsnorm"], "rmsnorm=false is not supported: the gated norm is needed"),
        (bool(ssm["D_has_hdim"]), "D_has_hdim=true is not supported: the skip has one number per head"),
        (ssm["d_ssm"] not in (None, ssm["expand"] * raw["d_model"]), f"d_ssm {ssm['d_ssm']} is not supported"),
    ]
    for refused, why in refusals:
        if refused:
            raise ValueError(f"this state-spaces config cannot be loaded: {why}")


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json of a `mamba2` checkpoint that transformers and this package load."""
    mixer = cfg.mixer
    if not isinstance(mixer, Mamba2Config) or cfg.d_mlp is not None or cfg.attention is not None or cfg.norm_offset:
        raise ValueError(
            "the mamba2 layout holds blocks of a Mamba-2 mixer and a plain norm alone; this model has others"
        )
    if cfg.norm_eps != mixer.norm_eps:
        raise ValueError("the mamba2 layout has one epsilon for every norm; this model has several")
    if mixer.norm_before_gate:
        raise ValueError("the mamba2 layout normalises after the gate; this model does so before (norm_before_gate)")
    if (mixer.n_heads * mixer.d_v) % cfg.d_model:
        raise ValueError(
            f"the mamba2 layout needs heads {mixer.n_heads} x {mixer.d_v} in whole multiples of {cfg.d_model}"
        )
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": SAVED_AS,
        "vocab_size": cfg.d_vocab,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "expand": mixer.n_heads * mixer.d_v // cfg.d_model,
        "num_heads": mixer.n_heads,
        "head_dim": mixer.d_v,
        "state_size": mixer.d_k,
        "n_groups": mixer.n_groups,
        "conv_kernel": mixer.conv_size,
        "use_conv_bias": mixer.conv_bias,
        "use_bias": mixer.bias,
        "hidden_act": "silu",
        "layer_norm_epsilon": cfg.norm_eps,
        "residual_in_fp32": cfg.residual_in_fp32,
        # JSON knows no infinity; this is how transformers writes one.
        "time_step_limit": [{"__float__": "Infinity"} if math.isinf(bound) else bound for bound in mixer.dt_limit],
        "tie_word_embeddings": cfg.tied_embeddings,
    }


def entries(cfg: ModelConfig, names: list[str], model_type: str) -> Iterator[Entry]:
    """Every tensor of the checkpoint, in reading order. `names` tells how the embedding is called."""
    original = "backbone.embedding.weight"
    yield Entry(original if original in names else "backbone.embeddings.weight", ("embed.weight",))
    mixer = cfg.mixer
    assert isinstance(mixer, Mamba2Config)  # this family's configs make no other
    for layer in range(cfg.n_layers):
        theirs, ours = f"backbone.layers.{layer}.", f"blocks.{layer}."
        yield Entry(f"{theirs}norm.weight", (f"{ours}ln1.weight",))
        yield from _mixer_entries(mixer, f"{theirs}mixer.", f"{ours}mixer.")
    yield Entry("backbone.norm_f.weight", ("ln_final.weight",))
    if not cfg.tied_embeddings:
        yield Entry("lm_head.weight", ("unembed.weight",))


def _mixer_entries(cfg: Mamba2Config, theirs: str, ours: str) -> Iterator[Entry]:
    inner = cfg.n_heads * cfg.d_v
    widths = [inner, inner + 2 * cfg.n_groups * cfg.d_k, cfg.n_heads]  # gate; x, B and C; dt

    def split(rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(widths)

    def join(*parts: Tensor) -> Tensor:
        return torch.cat(parts)

    for leaf in ("weight", "bias") if cfg.bias else ("weight",):
        parts = tuple(f"{ours}{part}.{leaf}" for part in ("gate", "vkq", "dt"))
        yield Entry(f"{theirs}in_proj.{leaf}", parts, split, join)
        yield Entry(f"{theirs}out_proj.{leaf}", (f"{ours}out.{leaf}",))
    yield Entry(f"{theirs}conv1d.weight", (f"{ours}conv.weight",), lambda t: (t.squeeze(1),), lambda t: t.unsqueeze(1))
    if cfg.conv_bias:
        yield Entry(f"{theirs}conv1d.bias", (f"{ours}conv.bias",))
    for part in ("dt_bias", "A_log", "D", "norm.weight"):
        yield Entry(f"{theirs}{part}", (f"{ours}{part}",))
