"""DeltaNet as flash-linear-attention saves it (`delta_net`).

Handled beside what fla.py handles: with or without output gate, learned or constant write strength, negative eigenvalues.
Refused by name: activations of q and k other than SiLU, norms of q and k other than L2, mixers without convolutions.
`use_output_norm` is passed over, as the package itself does: there always is a norm before W_O.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from hooked_recurrent.config import ModelConfig
from hooked_recurrent.loading import fla
from hooked_recurrent.loading.checkpoint import Entry
from hooked_recurrent.mixers.delta_net import DeltaNetConfig

SAVED_AS = "delta_net"
RULE = DeltaNetConfig.rule
MODEL_TYPES = (SAVED_AS,)
READS_MAPPING = True
DEFAULTS: dict[str, Any] = {
    **{"num_heads": 16, "expand_k": 1.0, "expand_v": 1.0, "conv_size": 4, "use_short_conv": True},
    **{"use_beta": True, "allow_neg_eigval": False, "use_gate": False, "qk_norm": "l2", "qk_activation": "silu"},
}


def config_from_mapping(raw: Mapping[str, Any], name: str) -> ModelConfig:
    """Our config from a config.json; refuses what this family does not cover, by name."""
    options = fla.options_of(raw, DEFAULTS)
    activation, norm = options["qk_activation"], options["qk_norm"]
    fla.refuse(
        SAVED_AS,
        {
            f"qk_activation {activation!r} is not supported, only 'silu'": activation != "silu",
            f"qk_norm {norm!r} is not supported, only 'l2'": norm != "l2",
            "use_short_conv=false is not supported: the convolutions are needed": not options["use_short_conv"],
        },
    )
    mixer = DeltaNetConfig(
        n_heads=options["num_heads"],
        d_k=fla.head_width(options, "expand_k"),
        d_v=fla.head_width(options, "expand_v"),
        conv_size=options["conv_size"],
        learned_beta=options["use_beta"],
        negative_eigenvalues=options["allow_neg_eigval"],
        output_gate=options["use_gate"],
        norm_eps=options["norm_eps"],
    )
    return fla.model_config(options, mixer, name)


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json of a `delta_net` checkpoint that flash-linear-attention and this package load."""
    mixer = cfg.mixer
    assert isinstance(mixer, DeltaNetConfig)  # RULE says so
    fla.require_plain_blocks(cfg, mixer.norm_eps, SAVED_AS)
    return fla.config_of(
        cfg,
        SAVED_AS,
        "DeltaNetForCausalLM",
        num_heads=mixer.n_heads,
        expand_k=mixer.n_heads * mixer.d_k / cfg.d_model,
        expand_v=mixer.n_heads * mixer.d_v / cfg.d_model,
        conv_size=mixer.conv_size,
        use_short_conv=True,
        use_beta=mixer.learned_beta,
        allow_neg_eigval=mixer.negative_eigenvalues,
        use_gate=mixer.output_gate,
        qk_norm="l2",
        qk_activation="silu",
    )


def entries(cfg: ModelConfig, names: list[str], model_type: str) -> Iterator[Entry]:
    """Every tensor of the checkpoint, in reading order."""
    mixer = cfg.mixer
    assert isinstance(mixer, DeltaNetConfig)  # this family's configs make no other

    def mixer_entries(theirs: str, ours: str) -> Iterator[Entry]:
        yield from fla.projections(theirs, ours)
        yield from fla.convolutions(theirs, ours)
        for part, name, present in (("b", "beta", mixer.learned_beta), ("g", "gate", mixer.output_gate)):
            if present:
                yield Entry(f"{theirs}{part}_proj.weight", (f"{ours}{name}.weight",))
        yield Entry(f"{theirs}o_norm.weight", (f"{ours}norm.weight",))

    return fla.entries(cfg, mixer_entries)
