"""Kimi Linear (`kimi_linear`): models whose layers are all Kimi Delta Attention with dense MLPs.

Three spellings of the tensors: that of the published checkpoints, that of transformers' files (dense MLPs are called
`block_sparse_moe` there), and that of a transformers model in memory (one convolution, the decay in `forget_gate`).
Refused by name: softmax layers (multi-head latent attention) and mixtures of experts, which the published models have,
activations other than SiLU, tied embeddings (transformers gives these models a head of their own in any case).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hooked_recurrent.config import ModelConfig
from hooked_recurrent.loading import fla
from hooked_recurrent.loading.checkpoint import Entry
from hooked_recurrent.mixers.kimi_delta_attention import KimiDeltaAttentionConfig

SAVED_AS = "kimi_linear"
RULE = KimiDeltaAttentionConfig.rule
MODEL_TYPES = (SAVED_AS,)
NORMS = (("input_layernorm", "ln1"), ("post_attention_layernorm", "ln2"))


def config_from_hf(hf: Any, name: str) -> ModelConfig:
    """Our config from a transformers config object; refuses what this family does not cover, by name."""
    for layer, (mixer, mlp) in enumerate(zip(hf.layer_types, hf.mlp_layer_types, strict=True)):
        if mixer != "linear_attention":
            why = f"layer {layer} is a softmax layer (multi-head latent attention, {mixer!r})"
            raise ValueError(f"{why}; only Kimi Delta Attention is supported")
        if mlp != "dense":
            why = f"layer {layer}'s MLP is a mixture of {hf.num_local_experts} experts ({mlp!r})"
            raise ValueError(f"{why}; only dense MLPs are supported")
    fla.refuse(
        SAVED_AS,
        {
            f"hidden_act {hf.hidden_act!r} is not supported, only 'silu'": hf.hidden_act not in ("silu", "swish"),
            "tie_word_embeddings=true is not supported: Kimi Linear has a head of its own": hf.tie_word_embeddings,
        },
    )
    return ModelConfig(
        d_model=hf.hidden_size,
        d_vocab=hf.vocab_size,
        d_mlp=hf.intermediate_size,
        layer_types=(RULE,) * hf.num_hidden_layers,
        mixer=KimiDeltaAttentionConfig(
            n_heads=hf.linear_num_heads,
            n_key_heads=hf.linear_num_heads,
            d_k=hf.linear_head_dim,
            d_v=hf.linear_head_dim,
            conv_size=hf.linear_conv_kernel_dim,
            gate_bias=False,
            norm_eps=hf.rms_norm_eps,
        ),
        norm_eps=hf.rms_norm_eps,
        norm_offset=0.0,
        tied_embeddings=False,
        n_ctx=hf.max_position_embeddings,
        model_name=name,
    )


def holds(cfg: ModelConfig) -> bool:
    """Whether a model with this rule has a Kimi Linear's mixers; others are saved as kda.py says."""
    mixer = cfg.mixer
    assert isinstance(mixer, KimiDeltaAttentionConfig)  # RULE says so
    square = mixer.d_k == mixer.d_v and mixer.n_heads == mixer.n_key_heads
    extras = mixer.gate_bias or mixer.negative_eigenvalues or mixer.lower_bound is not None
    return square and not extras and not cfg.tied_embeddings


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json of a `kimi_linear` checkpoint that transformers and this package load."""
    mixer = cfg.mixer
    assert isinstance(mixer, KimiDeltaAttentionConfig)  # RULE says so
    fla.require_plain_blocks(cfg, mixer.norm_eps, SAVED_AS)
    return {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": SAVED_AS,
        "vocab_size": cfg.d_vocab,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_mlp,
        "num_hidden_layers": cfg.n_layers,
        "layer_types": ["linear_attention"] * cfg.n_layers,
        "mlp_layer_types": ["dense"] * cfg.n_layers,
        "linear_num_heads": mixer.n_heads,
        "linear_head_dim": mixer.d_k,
        "linear_conv_kernel_dim": mixer.conv_size,
        "model_max_length": cfg.n_ctx,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": False,
        # Their defaults are tokens of Kimi's own vocabulary.
        **{f"{kind}_token_id": None for kind in ("pad", "bos", "eos")},
    }


def entries(cfg: ModelConfig, names: list[str], model_type: str) -> Iterator[Entry]:
    """Every tensor of the checkpoint, in reading order. `names` tells the spelling."""
    in_memory = any(".forget_gate." in name for name in names)
    mlp = "block_sparse_moe" if any(".block_sparse_moe." in name for name in names) else "mlp"
    yield Entry("model.embed_tokens.weight", ("embed.weight",))
    for layer in range(cfg.n_layers):
        theirs, ours = f"model.layers.{layer}.", f"blocks.{layer}."
        for their_norm, our_norm in NORMS:
            yield Entry(f"{theirs}{their_norm}.weight", (f"{ours}{our_norm}.weight",))
        yield from _mixer_entries(cfg, f"{theirs}self_attn.", f"{ours}mixer.", in_memory)
        for part in ("gate", "up", "down"):
            yield Entry(f"{theirs}{mlp}.{part}_proj.weight", (f"{ours}mlp.{part}.weight",))
    yield Entry("model.norm.weight", ("ln_final.weight",))
    yield Entry("lm_head.weight", ("unembed.weight",))


def _mixer_entries(cfg: ModelConfig, theirs: str, ours: str, in_memory: bool) -> Iterator[Entry]:
    yield from fla.projections(theirs, ours)
    yield from [_joint_convolution(cfg, theirs, ours)] if in_memory else fla.convolutions(theirs, ours)
    yield Entry(f"{theirs}b_proj.weight", (f"{ours}beta.weight",))
    forget = f"{theirs}forget_gate." if in_memory else theirs
    for prefix, name in ((f"{forget}f", "decay"), (f"{theirs}g", "gate")):
        for index, side in enumerate("ab"):
            yield Entry(f"{prefix}_{side}_proj.weight", (f"{ours}{name}.{index}.weight",))
    yield Entry(f"{forget}dt_bias", (f"{ours}dt_bias",))
    yield Entry(f"{forget}A_log", (f"{ours}A_log",), lambda t: (t.flatten(),), lambda t: t[None, None, :, None])
    yield Entry(f"{theirs}o_norm.weight", (f"{ours}norm.weight",))


def _joint_convolution(cfg: ModelConfig, theirs: str, ours: str) -> Entry:
    """transformers runs the three convolutions as one."""

    def split(weight: Tensor) -> tuple[Tensor, ...]:
        return weight.squeeze(1).split(cfg.n_heads * cfg.d_k)

    def join(*parts: Tensor) -> Tensor:
        return torch.cat(parts).unsqueeze(1)

    return Entry(f"{theirs}conv1d.weight", tuple(f"{ours}convs.parts.{i}.weight" for i in range(3)), split, join)
