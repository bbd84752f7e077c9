"""Random models of Qwen3.5-0.8B's layer shape for the benchmarks: transformers', ours, transformer_lens's bridge.

Hidden 1024, 16 linear heads of 128 x 128, 8 attention heads of 256 over 2 key/value heads, MLP 3584, a vocabulary of 1,000 that
keeps the unembedding out of the time.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from hooked_recurrent import HookedRecurrentModel

from .plain import Qwen3_5ForCausalLM, Qwen3_5TextConfig

LINEAR, FULL = "linear_attention", "full_attention"
VOCABULARY = 1000
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
"""The shape of a quick run."""


def config_of(kinds: Sequence[str], quick: bool = False, vocabulary: int = VOCABULARY) -> Qwen3_5TextConfig:
    """The config of a stack of these kinds of layers."""
    shape = SMALL if quick else SHAPE
    return Qwen3_5TextConfig(
        vocab_size=vocabulary,
        num_hidden_layers=len(kinds),
        layer_types=list(kinds),
        tie_word_embeddings=True,
        **shape,
    )


def random_model(kinds: Sequence[str], quick: bool = False) -> Qwen3_5ForCausalLM:
    """transformers' model with random weights and long memories."""
    torch.manual_seed(0)
    model = Qwen3_5ForCausalLM(config_of(kinds, quick)).eval().requires_grad_(False)
    lengthen_memories(model)
    return model


@torch.no_grad()
def lengthen_memories(model: Qwen3_5ForCausalLM) -> None:
    """Slow the decay of every linear layer: with transformers' own start every write is forgotten at once."""
    for layer in model.model.layers:
        if hasattr(layer, "linear_attn"):
            layer.linear_attn.dt_bias.fill_(-5.0)
            layer.linear_attn.A_log.fill_(-1.0)


def bridge_of(model: Qwen3_5ForCausalLM) -> Any:
    """transformer_lens's bridge around a copy of the model."""
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = HookedRecurrentModel.from_pretrained("tiny-gated-deltanet").tokenizer  # it asks for one; none is used
    return TransformerBridge.boot_transformers(
        "Qwen/Qwen3.5", hf_model=copy.deepcopy(model), tokenizer=tokenizer, device="cpu"
    )


def state_hook(bridge: Any, layer: int) -> str:
    """The name of the bridge's hook on the states of a layer, which is fired under `eager_scan` alone."""
    return next(name for name in bridge.hook_dict if name.startswith(f"blocks.{layer}.") and "hook_ssm_state" in name)
