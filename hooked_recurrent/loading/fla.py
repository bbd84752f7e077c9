"""What all checkpoints of flash-linear-attention share: config.json, the tensors around the mixer, and the way back.

Read by delta_net.py, gla.py and kda.py of this folder, which add their mixers. The package itself is not needed: its
config.json is read as a mapping. What is left out there has the package's own default; options that only choose among
its kernels or matter to training (attn_mode, fuse_*, safe_gate, use_l2warp, ...) are passed over. Refused by name: softmax
layers (`attn`), attention over the depth (`attnres_block_size`), activations other than SiLU ("swish").
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from hooked_recurrent.config import MixerConfig, ModelConfig
from hooked_recurrent.loading.checkpoint import Entry

DEFAULTS: dict[str, Any] = {
    **{"vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 24, "max_position_embeddings": 2048},
    **{"hidden_ratio": 4, "intermediate_size": None, "hidden_act": "swish", "norm_eps": 1e-6},
    **{"tie_word_embeddings": False, "attn": None, "attnres_block_size": None},
}
# The widths of MLPs are rounded up to this where the config does not give one.
MLP_MULTIPLE = 256
NORMS = (("attn_norm", "ln1"), ("mlp_norm", "ln2"))


def options_of(raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with what it leaves out; the defaults of the family go over those that all families share."""
    options = DEFAULTS | dict(defaults) | dict(raw)
    softmax, residuals = options["attn"], options["attnres_block_size"]
    refuse(
        options["model_type"],
        {
            f"softmax layers (attn {softmax!r}) are not supported": bool(softmax),
            f"attention over the depth (attnres_block_size {residuals!r}) is not supported": residuals is not None,
            f"hidden_act {options['hidden_act']!r} is not supported, only 'swish'": options["hidden_act"]
            not in ("swish", "silu"),
        },
    )
    return options


def refuse(model_type: str, reasons: Mapping[str, bool]) -> None:
    """Raise `ValueError` with the first reason that holds."""
    for why, refused in reasons.items():
        if refused:
            raise ValueError(f"this {model_type} config cannot be loaded: {why}")


def head_width(options: Mapping[str, Any], expand: str) -> int:
    """Width of a head where the heads share hidden_size times the option `expand`."""
    width, heads = options["hidden_size"] * options[expand], options["num_heads"]
    if not math.isclose(width, round(width)) or round(width) % heads:
        sizes = f"hidden_size {options['hidden_size']} times {expand} {options[expand]}"
        raise ValueError(f"{sizes} is {width}, which is no whole width for {heads} heads")
    return round(width) // heads


def model_config(options: Mapping[str, Any], mixer: MixerConfig, name: str) -> ModelConfig:
    """Our config of a whole model from theirs and the config of its mixers."""
    d_model, d_mlp = options["hidden_size"], options["intermediate_size"]
    if d_mlp is None:
        ratio = 4 if options["hidden_ratio"] is None else options["hidden_ratio"]
        d_mlp = MLP_MULTIPLE * math.ceil(int(d_model * ratio * 2 / 3) / MLP_MULTIPLE)
    return ModelConfig(
        d_model=d_model,
        d_vocab=options["vocab_size"],
        d_mlp=d_mlp,
        layer_types=(mixer.rule,) * options["num_hidden_layers"],
        mixer=mixer,
        norm_eps=options["norm_eps"],
        norm_offset=0.0,
        tied_embeddings=options["tie_word_embeddings"],
        n_ctx=options["max_position_embeddings"],
        model_name=name,
    )


def require_plain_blocks(cfg: ModelConfig, norm_eps: float, model_type: str) -> None:
    """Raise `ValueError` unless every block is a mixer and a SwiGLU behind plain RMSNorms of one epsilon, as theirs are."""
    plain = cfg.attention is None and cfg.norm == "rms" and cfg.norm_offset == 0.0
    plain = plain and not cfg.embed_norm and not cfg.residual_in_fp32
    if not plain or cfg.d_mlp is None or cfg.mlp != "swiglu":
        raise ValueError(f"the {model_type} layout has plain RMSNorms and a SwiGLU in every block; this model differs")
    if norm_eps != cfg.norm_eps:
        raise ValueError(f"the {model_type} layout has one epsilon for every norm; this model has several")


def config_of(cfg: ModelConfig, model_type: str, architecture: str, **mixer: Any) -> dict[str, Any]:
    """The config.json of a model in this layout; `mixer` holds the options of its mixers."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": cfg.d_vocab,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_mlp,
        "num_hidden_layers": cfg.n_layers,
        "max_position_embeddings": cfg.n_ctx,
        "hidden_act": "swish",
        "norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied_embeddings,
        **mixer,
    }


def entries(cfg: ModelConfig, mixer_entries: Callable[[str, str], Iterable[Entry]]) -> Iterator[Entry]:
    """Every tensor of the checkpoint, in reading order; `mixer_entries` gets the two prefixes of a layer's mixer."""
    yield Entry("model.embeddings.weight", ("embed.weight",))
    for layer in range(cfg.n_layers):
        theirs, ours = f"model.layers.{layer}.", f"blocks.{layer}."
        for their_norm, our_norm in NORMS:
            yield Entry(f"{theirs}{their_norm}.weight", (f"{ours}{our_norm}.weight",))
        yield from mixer_entries(f"{theirs}attn.", f"{ours}mixer.")
        for part in ("gate", "up", "down"):
            yield Entry(f"{theirs}mlp.{part}_proj.weight", (f"{ours}mlp.{part}.weight",))
    yield Entry("model.norm.weight", ("ln_final.weight",))
    if not cfg.tied_embeddings:
        yield Entry("lm_head.weight", ("unembed.weight",))


def projections(theirs: str, ours: str) -> Iterator[Entry]:
    """The projections to q, k and v, and W_O."""
    for part, name in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
        yield Entry(f"{theirs}{part}_proj.weight", (f"{ours}{name}.weight",))


def convolutions(theirs: str, ours: str) -> Iterator[Entry]:
    """The short convolutions over q, k and v."""
    for index, part in enumerate("qkv"):
        yield Entry(
            f"{theirs}{part}_conv1d.weight",
            (f"{ours}convs.parts.{index}.weight",),
            lambda tensor: (tensor.squeeze(1),),
            lambda tensor: tensor.unsqueeze(1),
        )
