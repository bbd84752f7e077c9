"""Kimi Delta Attention as flash-linear-attention saves it (`kda`); Kimi's own models are in kimi.py.

Handled beside what fla.py handles: grouped value heads, values wider than keys, bounded decays, negative eigenvalues.
Refused by name: mixers without convolutions.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from hooked_recurrent.config import ModelConfig
from hooked_recurrent.loading import fla
from hooked_recurrent.loading.checkpoint import Entry, factor
from hooked_recurrent.mixers.kimi_delta_attention import KimiDeltaAttentionConfig

SAVED_AS = "kda"
RULE = KimiDeltaAttentionConfig.rule
MODEL_TYPES = (SAVED_AS,)
READS_MAPPING = True
DEFAULTS: dict[str, Any] = {
    **{"num_heads": 16, "num_v_heads": None, "head_dim": 128, "expand_v": 1.0, "conv_size": 4, "use_short_conv": True},
    **{"lower_bound": None, "allow_neg_eigval": False},
}
# Below this bound the package's faster kernels (safe_gate) are not exact.
SAFE_BOUND = -5.0


def config_from_mapping(raw: Mapping[str, Any], name: str) -> ModelConfig:
    """Our config from a config.json; refuses what this family does not cover, by name."""
    options = fla.options_of(raw, DEFAULTS)
    short_conv = options["use_short_conv"]
    fla.refuse(SAVED_AS, {"use_short_conv=false is not supported: the convolutions are needed": not short_conv})
    values = options["num_heads"] if options["num_v_heads"] is None else options["num_v_heads"]
    mixer = KimiDeltaAttentionConfig(
        n_heads=values,
        n_key_heads=options["num_heads"],
        d_k=options["head_dim"],
        d_v=int(options["head_dim"] * options["expand_v"]),
        conv_size=options["conv_size"],
        lower_bound=options["lower_bound"],
        negative_eigenvalues=options["allow_neg_eigval"],
        norm_eps=options["norm_eps"],
    )
    return fla.model_config(options, mixer, name)


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json of a `kda` checkpoint that flash-linear-attention and this package load."""
    mixer = cfg.mixer
    assert isinstance(mixer, KimiDeltaAttentionConfig)  # RULE says so
    fla.require_plain_blocks(cfg, mixer.norm_eps, SAVED_AS)
    if not mixer.gate_bias:
        raise ValueError("the kda layout has a bias on the output gate; this model has none (gate_bias)")
    return fla.config_of(
        cfg,
        SAVED_AS,
        "KDAForCausalLM",
        num_heads=mixer.n_key_heads,
        num_v_heads=mixer.n_heads,
        head_dim=mixer.d_k,
        expand_v=factor(mixer.d_v, mixer.d_k),
        conv_size=mixer.conv_size,
        use_short_conv=True,
        lower_bound=mixer.lower_bound,
        safe_gate=mixer.lower_bound is not None and mixer.lower_bound >= SAFE_BOUND,
        allow_neg_eigval=mixer.negative_eigenvalues,
    )


def entries(cfg: ModelConfig, names: list[str], model_type: str) -> Iterator[Entry]:
    """Every tensor of the checkpoint, in reading order."""

    def mixer_entries(theirs: str, ours: str) -> Iterator[Entry]:
        yield from fla.projections(theirs, ours)
        yield from fla.convolutions(theirs, ours)
        yield Entry(f"{theirs}b_proj.weight", (f"{ours}beta.weight",))
        for part, name in (("f", "decay"), ("g", "gate")):
            for index in (0, 1):
                yield Entry(f"{theirs}{part}_proj.{index}.weight", (f"{ours}{name}.{index}.weight",))
        yield Entry(f"{theirs}g_proj.1.bias", (f"{ours}gate.1.bias",))
        for part in ("A_log", "dt_bias"):
            yield Entry(f"{theirs}{part}", (f"{ours}{part}",))
        yield Entry(f"{theirs}o_norm.weight", (f"{ours}norm.weight",))

    return fla.entries(cfg, mixer_entries)
