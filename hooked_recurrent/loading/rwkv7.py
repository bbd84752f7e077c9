"""RWKV-7 in transformers' layout (`model_type: rwkv7`), as flash-linear-attention and rwkv7_hf write it.

Their config.json is read as it is, without either package: transformers does not know the type, and their own config classes
would have to be installed or run from the folder. Handled: every head width, ranks that the config leaves open (the
tensors tell them), tied and untied embeddings, the older `x_x` that holds six mixes in one tensor. Refused by name: softmax
layers, activations other than the squared ReLU, models without the norm after the embedding, norms without bias, and heads
that do not fill the residual stream. RWKV-LM's own layout is in `rwkv7_official`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hooked_recurrent.config import ModelConfig
from hooked_recurrent.loading import rwkv7_official
from hooked_recurrent.loading.checkpoint import Checkpoint, Entry
from hooked_recurrent.mixers.rwkv7 import RWKV7Config

SAVED_AS = "rwkv7"
RULE = RWKV7Config.rule
MODEL_TYPES = (SAVED_AS,)
READS_MAPPING = True
# What a config may leave open, and the tensor whose rows tell it.
TOLD_BY = {
    "decay_low_rank_dim": "model.layers.0.attn.w_lora.lora.0.weight",
    "a_low_rank_dim": "model.layers.0.attn.a_lora.lora.0.weight",
    "v_low_rank_dim": "model.layers.1.attn.v_lora.lora.0.weight",
    "gate_low_rank_dim": "model.layers.0.attn.g_lora.lora.0.weight",
    "intermediate_size": "model.layers.0.ffn.key.weight",
}


def complete(raw: Mapping[str, Any], open_checkpoint: Callable[[], Checkpoint]) -> dict[str, Any]:
    """The config with the ranks and the MLP's width that it leaves open, as its checkpoint tells them.

    Raises `ValueError` where the checkpoint does not tell either. A single layer mixes in no values of an earlier one, so
    that its `v_low_rank_dim` says nothing; it becomes 1.
    """
    told = dict(raw)
    if told.get("num_hidden_layers") == 1 and told.get("v_low_rank_dim") is None:
        told["v_low_rank_dim"] = 1
    missing = [key for key in TOLD_BY if told.get(key) is None]
    checkpoint = open_checkpoint() if missing else None
    for key in missing:
        assert checkpoint is not None
        if TOLD_BY[key] not in checkpoint.names():
            raise ValueError(f"the config leaves {key} open, and {checkpoint.origin} lacks {TOLD_BY[key]!r} to tell it")
        told[key] = checkpoint.shape(TOLD_BY[key])[0]
    return told


def config_from_mapping(raw: Mapping[str, Any], name: str) -> ModelConfig:
    """Our config from a config.json; refuses what this family does not cover, by name."""
    needed = ("hidden_size", "num_hidden_layers", "vocab_size", *TOLD_BY)
    absent = [key for key in needed if raw.get(key) is None]
    if absent:
        raise ValueError(f"this rwkv7 config has no {', '.join(absent)}")
    width, norm_eps = raw["hidden_size"], raw.get("norm_eps", 1e-5)
    d_head = _head_width(raw, width)
    _refuse_unsupported(raw, width)
    return ModelConfig(
        d_model=width,
        d_vocab=raw["vocab_size"],
        d_mlp=raw["intermediate_size"],
        mlp="channel_mix",
        layer_types=(RULE,) * raw["num_hidden_layers"],
        mixer=RWKV7Config(
            n_heads=width // d_head,
            d_k=d_head,
            d_v=d_head,
            decay_rank=raw["decay_low_rank_dim"],
            iclr_rank=raw["a_low_rank_dim"],
            value_rank=raw["v_low_rank_dim"],
            gate_rank=raw["gate_low_rank_dim"],
            norm_eps=d_head * norm_eps,
        ),
        norm="layer",
        norm_eps=norm_eps,
        embed_norm=True,
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        n_ctx=raw.get("max_position_embeddings") or ModelConfig.n_ctx,
        model_name=name,
    )


def _head_width(raw: Mapping[str, Any], width: int) -> int:
    """Width of a head. Where `head_dim` and `num_heads` are both given, the modules go by the former."""
    heads, d_head = raw.get("num_heads"), raw.get("head_dim")
    if d_head is None:
        if not heads:
            raise ValueError("this rwkv7 config has neither head_dim nor num_heads")
        d_head = width // heads
    if d_head < 1 or width % d_head:
        raise ValueError(f"heads of width {d_head} (num_heads {heads}) do not divide hidden_size {width}")
    return d_head


def _refuse_unsupported(raw: Mapping[str, Any], width: int) -> None:
    given = raw.get("value_dim")
    values = set(given) if isinstance(given, list | tuple) else {given or width}
    inner = raw.get("attention_hidden_size") or width
    activation = raw.get("hidden_act", "sqrelu")
    refusals = [
        (bool(raw.get("attn")), f"softmax layers (attn {raw.get('attn')}) are not supported"),
        (activation != "sqrelu", f"hidden_act {activation!r} is not supported, only 'sqrelu'"),
        (not raw.get("norm_first", True), "norm_first=false is not supported: the embedding needs its norm"),
        (not raw.get("norm_bias", True), "norm_bias=false is not supported: the norms need their biases"),
        (values != {width}, f"value_dim {given} is not supported, only hidden_size {width}"),
        (inner != width, f"attention_hidden_size {inner} is not supported, only hidden_size {width}"),
    ]
    for refused, why in refusals:
        if refused:
            raise ValueError(f"this rwkv7 config cannot be loaded: {why}")


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json of an `rwkv7` checkpoint that flash-linear-attention, rwkv7_hf and this package load."""
    mixer = cfg.mixer
    shape = (cfg.mlp, cfg.norm, cfg.embed_norm, cfg.residual_in_fp32, cfg.attention)
    if not isinstance(mixer, RWKV7Config) or shape != ("channel_mix", "layer", True, False, None) or cfg.d_mlp is None:
        raise ValueError(
            "the rwkv7 layout is an RWKV-7 mixer with channel mix, LayerNorm and a norm after the embedding; this model differs"
        )
    if mixer.d_v != mixer.d_k or mixer.n_heads * mixer.d_k != cfg.d_model:
        raise ValueError(
            f"the rwkv7 layout has heads that fill the residual stream of {cfg.d_model}; this model has {mixer.n_heads} heads "
            f"of width {mixer.d_k} and {mixer.d_v}"
        )
    if not math.isclose(mixer.norm_eps, mixer.d_k * cfg.norm_eps, rel_tol=1e-12):
        raise ValueError(
            f"the rwkv7 layout normalises heads with epsilon head width {mixer.d_k} x norm_eps {cfg.norm_eps}; this model "
            f"does so with {mixer.norm_eps}"
        )
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": SAVED_AS,
        "vocab_size": cfg.d_vocab,
        "hidden_size": cfg.d_model,
        "hidden_ratio": cfg.d_mlp / cfg.d_model,
        "intermediate_size": cfg.d_mlp,
        "num_hidden_layers": cfg.n_layers,
        "head_dim": mixer.d_k,
        "num_heads": mixer.n_heads,
        "value_dim": [cfg.d_model] * cfg.n_layers,
        "decay_low_rank_dim": mixer.decay_rank,
        "a_low_rank_dim": mixer.iclr_rank,
        "v_low_rank_dim": mixer.value_rank,
        "gate_low_rank_dim": mixer.gate_rank,
        "hidden_act": "sqrelu",
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": cfg.norm_eps,
        # Their fused kernels add 1e-6 to the squared length of a removal key, which the paper does not.
        "fuse_norm": False,
        "attn": None,
        "attn_mode": "chunk",
        "max_position_embeddings": cfg.n_ctx,
        "tie_word_embeddings": cfg.tied_embeddings,
        # Left out, their readers would take tokens 1 and 2 for the ends of a text.
        "bos_token_id": None,
        "eos_token_id": None,
    }


def ignored(name: str) -> bool:
    """Tensors that some files carry and no implementation reads."""
    return name in rwkv7_official.UNUSED


def entries(cfg: ModelConfig, names: list[str], model_type: str) -> Iterator[Entry]:
    """Every tensor of the checkpoint, in reading order. `names` tells whose layout it is."""
    if "emb.weight" in names:
        yield from rwkv7_official.entries(cfg)
        return
    yield Entry("model.embeddings.weight", ("embed.weight",))
    yield from _norm_entries("model.layers.0.pre_norm", "ln_embed")
    for layer in range(cfg.n_layers):
        theirs, ours = f"model.layers.{layer}.", f"blocks.{layer}."
        yield from _norm_entries(f"{theirs}attn_norm", f"{ours}ln1")
        yield from _mixer_entries(layer, f"{theirs}attn.", f"{ours}mixer.", f"{theirs}attn.x_x" in names)
        yield from _norm_entries(f"{theirs}ffn_norm", f"{ours}ln2")
        for part, name in (("x_k", "mix"), ("key.weight", "up.weight"), ("value.weight", "down.weight")):
            yield Entry(f"{theirs}ffn.{part}", (f"{ours}mlp.{name}",))
    yield from _norm_entries("model.norm", "ln_final")
    if not cfg.tied_embeddings:
        yield Entry("lm_head.weight", ("unembed.weight",))


def _norm_entries(theirs: str, ours: str) -> Iterator[Entry]:
    for leaf in ("weight", "bias"):
        yield Entry(f"{theirs}.{leaf}", (f"{ours}.{leaf}",))


def _mixer_entries(layer: int, theirs: str, ours: str, mixes_in_one: bool) -> Iterator[Entry]:
    if mixes_in_one:
        mixes = tuple(f"{ours}mix_{part}" for part in "rwkvag")
        yield Entry(f"{theirs}x_x", mixes, lambda tensor: tensor.unbind(0), lambda *rows: torch.stack(rows))
    else:
        for part in "rwkvag":
            yield Entry(f"{theirs}x_{part}", (f"{ours}mix_{part}",), _from_row, _to_row)
    for part, name in (("r", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
        yield Entry(f"{theirs}{part}_proj.weight", (f"{ours}{name}.weight",))
    for part, name in (("w", "decay"), ("a", "iclr"), ("v", "value_gate"), ("g", "gate")):
        if part == "v" and layer == 0:
            continue
        yield Entry(f"{theirs}{part}_lora.lora.0.weight", (f"{ours}{name}.down.weight",))
        yield Entry(f"{theirs}{part}_lora.lora.2.weight", (f"{ours}{name}.up.weight",))
        if part != "g":
            yield Entry(f"{theirs}{part}_lora.lora.2.bias", (f"{ours}{name}.bias",))
    for part, name in (("k_k", "removal"), ("k_a", "replacement"), ("r_k", "bonus")):
        yield Entry(f"{theirs}{part}", (f"{ours}{name}",))
    for leaf in ("weight", "bias"):
        yield Entry(f"{theirs}g_norm.{leaf}", (f"{ours}norm_{leaf}",))


def _from_row(row: Tensor) -> tuple[Tensor, ...]:
    return (row.flatten(),)


def _to_row(vector: Tensor) -> Tensor:
    return vector.view(1, 1, -1)
