"""Gated Linear Attention as flash-linear-attention saves it (`gla`).

Handled beside what fla.py handles: groups of heads that share key, value and decay, with or without convolutions and
output gate, a limit of the decay (`clamp_min`). Refused by name: feature maps, norms without a weight. The package's models
have one rank of the decay's projection and one divisor of the decay, whatever a config says; `use_gk` and `use_gv` are
passed over, as the package itself does.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from hooked_recurrent.config import ModelConfig
from hooked_recurrent.loading import fla
from hooked_recurrent.loading.checkpoint import Entry
from hooked_recurrent.mixers.gated_linear_attention import GatedLinearAttentionConfig

SAVED_AS = "gla"
RULE = GatedLinearAttentionConfig.rule
MODEL_TYPES = (SAVED_AS,)
READS_MAPPING = True
DEFAULTS: dict[str, Any] = {
    **{"num_heads": 4, "num_kv_heads": None, "expand_k": 0.5, "expand_v": 1.0, "feature_map": None, "clamp_min": None},
    **{"use_short_conv": False, "conv_size": 4, "use_output_gate": True, "elementwise_affine": True},
}
RANK, DIVISOR = 16, 16.0


def config_from_mapping(raw: Mapping[str, Any], name: str) -> ModelConfig:
    """Our config from a config.json; refuses what this family does not cover, by name."""
    options = fla.options_of(raw, DEFAULTS)
    feature_map, groups = options["feature_map"], options["num_kv_heads"]
    fla.refuse(
        SAVED_AS,
        {
            f"feature_map {feature_map!r} is not supported: keys and queries stay as they are": feature_map is not None,
            "elementwise_affine=false is not supported: norms have a weight": not options["elementwise_affine"],
        },
    )
    mixer = GatedLinearAttentionConfig(
        n_heads=options["num_heads"],
        n_key_value_heads=options["num_heads"] if groups is None else groups,
        d_k=fla.head_width(options, "expand_k"),
        d_v=fla.head_width(options, "expand_v"),
        decay_rank=RANK,
        decay_divisor=DIVISOR,
        min_log_decay=options["clamp_min"],
        conv_size=options["conv_size"] if options["use_short_conv"] else None,
        output_gate=options["use_output_gate"],
        norm_eps=options["norm_eps"],
    )
    return fla.model_config(options, mixer, name)


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json of a `gla` checkpoint that flash-linear-attention and this package load."""
    mixer = cfg.mixer
    assert isinstance(mixer, GatedLinearAttentionConfig)  # RULE says so
    fla.require_plain_blocks(cfg, mixer.norm_eps, SAVED_AS)
    if (mixer.decay_rank, mixer.decay_divisor) != (RANK, DIVISOR):
        came = f"{mixer.decay_rank} and {mixer.decay_divisor}"
        raise ValueError(f"the gla layout has decay_rank {RANK} and decay_divisor {DIVISOR}; this model has {came}")
    return fla.config_of(
        cfg,
        SAVED_AS,
        "GLAForCausalLM",
        num_heads=mixer.n_heads,
        num_kv_heads=mixer.n_key_value_heads,
        expand_k=mixer.n_heads * mixer.d_k / cfg.d_model,
        expand_v=mixer.n_heads * mixer.d_v / cfg.d_model,
        feature_map=None,
        clamp_min=mixer.min_log_decay,
        use_short_conv=mixer.conv_size is not None,
        conv_size=mixer.conv_size or DEFAULTS["conv_size"],
        use_output_gate=mixer.output_gate,
        elementwise_affine=True,
    )


def entries(cfg: ModelConfig, names: list[str], model_type: str) -> Iterator[Entry]:
    """Every tensor of the checkpoint, in reading order. `names` tells what the norm is called (it depends on `fuse_norm`)."""
    mixer = cfg.mixer
    assert isinstance(mixer, GatedLinearAttentionConfig)  # this family's configs make no other
    plain = not mixer.output_gate or any(name.endswith(".attn.g_norm.weight") for name in names)

    def mixer_entries(theirs: str, ours: str) -> Iterator[Entry]:
        yield from fla.projections(theirs, ours)
        if mixer.conv_size is not None:
            yield from fla.convolutions(theirs, ours)
        for part in ("0.weight", "1.weight", "1.bias"):
            yield Entry(f"{theirs}gk_proj.{part}", (f"{ours}decay.{part}",))
        if mixer.output_gate:
            yield Entry(f"{theirs}g_proj.weight", (f"{ours}gate.weight",))
        yield Entry(f"{theirs}{'g_norm' if plain else 'g_norm_swish_gate'}.weight", (f"{ours}norm.weight",))

    return fla.entries(cfg, mixer_entries)
