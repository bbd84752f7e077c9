"""Qwen3.5 (`qwen3_5`, `qwen3_5_text`) and dense Qwen3-Next (`qwen3_next`): their configs, tensor names and layouts.

Handled: all-linear and hybrid stacks, grouped value heads, biases on attention, tied and untied embeddings, the text part
of a multimodal checkpoint. Ignored: `model.visual.*` (vision tower) and `mtp.*` (multi-token prediction head). Refused by
name: mixture-of-experts layers, activations other than SiLU, scaled rotary embeddings.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hooked_recurrent.config import ATTENTION, AttentionConfig, ModelConfig
from hooked_recurrent.loading.checkpoint import Entry, factor
from hooked_recurrent.mixers.gated_delta_net import GatedDeltaNetConfig

SAVED_AS = "qwen3_5_text"
RULE = GatedDeltaNetConfig.rule
MODEL_TYPES = ("qwen3_5", SAVED_AS, "qwen3_next")
LAYER_KINDS = {"linear_attention": RULE, "full_attention": ATTENTION}


def config_from_hf(hf: Any, name: str) -> ModelConfig:
    """Our config from a transformers config object; refuses what this family does not cover, by name."""
    tied = hf.tie_word_embeddings
    text = hf.get_text_config()
    if text is not hf:
        tied = tied or text.tie_word_embeddings
    _refuse_unsupported(text)
    rope = text.rope_parameters
    layer_types = tuple(LAYER_KINDS.get(kind, kind) for kind in text.layer_types)
    attention = AttentionConfig(
        n_heads=text.num_attention_heads,
        n_key_value_heads=text.num_key_value_heads,
        d_head=text.head_dim,
        rotary_dims=int(text.head_dim * rope.get("partial_rotary_factor", 1.0)),
        rope_theta=float(rope["rope_theta"]),
        bias=text.attention_bias,
        norm_eps=text.rms_norm_eps,
    )
    return ModelConfig(
        d_model=text.hidden_size,
        d_vocab=text.vocab_size,
        d_mlp=text.intermediate_size,
        layer_types=layer_types,
        mixer=GatedDeltaNetConfig(
            n_heads=text.linear_num_value_heads,
            n_key_heads=text.linear_num_key_heads,
            d_k=text.linear_key_head_dim,
            d_v=text.linear_value_head_dim,
            conv_size=text.linear_conv_kernel_dim,
            norm_eps=text.rms_norm_eps,
        ),
        attention=attention if ATTENTION in layer_types else None,
        norm_eps=text.rms_norm_eps,
        tied_embeddings=tied,
        n_ctx=text.max_position_embeddings,
        model_name=name,
    )


def _refuse_unsupported(text: Any) -> None:
    if text.hidden_act != "silu":
        raise ValueError(f"hidden_act {text.hidden_act!r} is not supported; Qwen models use 'silu'")
    rope_type = text.rope_parameters.get("rope_type", "default")
    if rope_type != "default":
        raise ValueError(f"rotary embeddings of type {rope_type!r} are not supported, only 'default'")
    for layer in range(text.num_hidden_layers):
        dense = layer in (getattr(text, "mlp_only_layers", None) or [])
        experts = getattr(text, "num_experts", 0)
        if experts and not dense and (layer + 1) % text.decoder_sparse_step == 0:
            raise ValueError(f"layer {layer}'s MLP is a mixture of {experts} experts; only dense MLPs are supported")


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json of a `qwen3_5_text` checkpoint that transformers and this package load."""
    kinds = {ours: theirs for theirs, ours in LAYER_KINDS.items()}
    mixer = cfg.mixer
    if (
        not isinstance(mixer, GatedDeltaNetConfig)
        or cfg.d_mlp is None
        or cfg.norm_offset != 1.0
        or cfg.residual_in_fp32
    ):
        raise ValueError(
            "the qwen3_5_text layout is Gated DeltaNet with MLPs and zero-centred norms; this model differs"
        )
    # A stack without softmax layers still has to say what they would be.
    attention = cfg.attention or AttentionConfig(mixer.n_heads, mixer.n_heads, 64, 16)
    if cfg.norm_eps != mixer.norm_eps or (cfg.attention and cfg.norm_eps != attention.norm_eps):
        raise ValueError("the qwen3_5_text layout has one epsilon for every norm; this model has several")
    return {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": SAVED_AS,
        "vocab_size": cfg.d_vocab,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_mlp,
        "num_hidden_layers": cfg.n_layers,
        "layer_types": [kinds[kind] for kind in cfg.layer_types],
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_key_value_heads,
        "head_dim": attention.d_head,
        "attention_bias": attention.bias,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": attention.rope_theta,
            "partial_rotary_factor": factor(attention.rotary_dims, attention.d_head),
        },
        "linear_num_value_heads": mixer.n_heads,
        "linear_num_key_heads": mixer.n_key_heads,
        "linear_key_head_dim": mixer.d_k,
        "linear_value_head_dim": mixer.d_v,
        "linear_conv_kernel_dim": mixer.conv_size,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.n_ctx,
        "tie_word_embeddings": cfg.tied_embeddings,
        "dtype": "float32",
    }


def ignored(name: str) -> bool:
    """Tensors of parts that this package leaves out."""
    return name.startswith(("model.visual.", "visual.", "mtp.", "model.mtp."))


def entries(cfg: ModelConfig, names: list[str], model_type: str) -> Iterator[Entry]:
    """Every tensor of the checkpoint, in reading order. `names` tells where the text part sits and whether a tied head
    was written all the same."""
    nested = any(name.startswith("model.language_model.") for name in names)
    root = "model.language_model." if nested else "model."
    yield Entry(f"{root}embed_tokens.weight", ("embed.weight",))
    for layer, kind in enumerate(cfg.layer_types):
        theirs, ours = f"{root}layers.{layer}.", f"blocks.{layer}."
        yield Entry(f"{theirs}input_layernorm.weight", (f"{ours}ln1.weight",))
        yield Entry(f"{theirs}post_attention_layernorm.weight", (f"{ours}ln2.weight",))
        for part in ("gate", "up", "down"):
            yield Entry(f"{theirs}mlp.{part}_proj.weight", (f"{ours}mlp.{part}.weight",))
        if kind == ATTENTION:
            yield from _attention_entries(cfg, f"{theirs}self_attn.", f"{ours}attn.")
        else:
            assert isinstance(cfg.mixer, GatedDeltaNetConfig)  # this family's configs make no other
            yield from _delta_net_entries(cfg.mixer, f"{theirs}linear_attn.", f"{ours}mixer.", model_type)
    yield Entry(f"{root}norm.weight", ("ln_final.weight",))
    if not cfg.tied_embeddings:
        yield Entry("lm_head.weight", ("unembed.weight",))


def _attention_entries(cfg: ModelConfig, theirs: str, ours: str) -> Iterator[Entry]:
    attention = cfg.attention
    assert attention is not None  # ModelConfig checked it
    heads, width = attention.n_heads, attention.d_head

    def split(both: Tensor) -> tuple[Tensor, ...]:  # per head, the query's rows stand before the gate's
        return tuple(half.flatten(0, 1) for half in both.unflatten(0, (heads, 2 * width)).split(width, dim=1))

    def join(query: Tensor, gate: Tensor) -> Tensor:
        return torch.cat([side.unflatten(0, (heads, width)) for side in (query, gate)], dim=1).flatten(0, 1)

    for leaf in ("weight", "bias") if attention.bias else ("weight",):
        yield Entry(f"{theirs}q_proj.{leaf}", (f"{ours}q.{leaf}", f"{ours}gate.{leaf}"), split, join)
        for part, name in (("k_proj", "k"), ("v_proj", "v"), ("o_proj", "out")):
            yield Entry(f"{theirs}{part}.{leaf}", (f"{ours}{name}.{leaf}",))
    for part in ("q_norm", "k_norm"):
        yield Entry(f"{theirs}{part}.weight", (f"{ours}{part}.weight",))


def _delta_net_entries(cfg: GatedDeltaNetConfig, theirs: str, ours: str, model_type: str) -> Iterator[Entry]:
    if model_type == "qwen3_next":
        yield from _grouped_projections(cfg, theirs, ours)
    else:
        for part, name in (("qkv", "qkv"), ("z", "gate"), ("b", "beta"), ("a", "dt")):
            yield Entry(f"{theirs}in_proj_{part}.weight", (f"{ours}{name}.weight",))
    yield Entry(f"{theirs}conv1d.weight", (f"{ours}conv.weight",), lambda t: (t.squeeze(1),), lambda t: t.unsqueeze(1))
    yield Entry(f"{theirs}dt_bias", (f"{ours}dt_bias",))
    yield Entry(f"{theirs}A_log", (f"{ours}A_log",))
    yield Entry(f"{theirs}norm.weight", (f"{ours}norm.weight",))
    yield Entry(f"{theirs}out_proj.weight", (f"{ours}out.weight",))


def _grouped_projections(cfg: GatedDeltaNetConfig, theirs: str, ours: str) -> Iterator[Entry]:
    """Qwen3-Next keeps q, k, v, z (and b, a) of one key head together; we keep each role together."""
    groups, per_group = cfg.n_key_heads, cfg.n_heads // cfg.n_key_heads

    def regroup(widths: tuple[int, ...]):
        def split(rows: Tensor) -> list[Tensor]:
            return [part.flatten(0, 1) for part in rows.unflatten(0, (groups, -1)).split(list(widths), dim=1)]

        def join(*parts: Tensor) -> Tensor:
            return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)

        return split, join

    key_width, value_width = groups * cfg.d_k, cfg.n_heads * cfg.d_v
    split_qkvz, join_qkvz = regroup((cfg.d_k, cfg.d_k, per_group * cfg.d_v, per_group * cfg.d_v))
    split_ba, join_ba = regroup((per_group, per_group))

    def to_ours(rows: Tensor) -> tuple[Tensor, ...]:
        query, key, value, gate = split_qkvz(rows)
        return torch.cat([query, key, value]), gate

    def to_theirs(qkv: Tensor, gate: Tensor) -> Tensor:
        return join_qkvz(*qkv.split([key_width, key_width, value_width]), gate)

    yield Entry(f"{theirs}in_proj_qkvz.weight", (f"{ours}qkv.weight", f"{ours}gate.weight"), to_ours, to_theirs)
    yield Entry(
        f"{theirs}in_proj_ba.weight", (f"{ours}beta.weight", f"{ours}dt.weight"), lambda t: tuple(split_ba(t)), join_ba
    )
