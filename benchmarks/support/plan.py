"""What the larger Qwen3.5 models would need, computed from their configs; nothing of it is measured.

Sizes: 0.8B is the shape that the other benchmarks use. 4B: config.json of a fine-tuned copy (huggingface.co/halen214/st01,
32 layers, hidden 2560, MLP 9216, 32 linear value heads) and apxml.com/models/qwen35-4b (16 attention heads over 4); its
embeddings are taken to be tied, which alone gives four billion weights. 27B: the table of a quantised copy
(huggingface.co/TevunahAi/Qwen3.5-27B-TevunahAi-GPTQ, 64 layers, hidden 5120, MLP 17408, 24 attention heads over 4) and the
defaults of Qwen3_5Config in Modular's MAX (48 linear value heads over 16 key heads). The text model alone: no vision tower and
no head for several tokens.
"""

import torch

from .plain import Qwen3_5ForCausalLM, Qwen3_5TextConfig
from .report import Row

VOCABULARY, TOKENS, ATOMS = 248320, 1024, 2048
GIB = 2**30
GPUS = (16, 24, 40, 48, 80, 141)
"""Memory of common GPUs in GiB."""


def full_config(layers: int, hidden: int, mlp: int, heads: tuple[int, int], linear: tuple[int, int], tied: bool):
    """A Qwen3.5 text config: every fourth layer attends; `heads` and `linear` are (query or value, key) heads."""
    return Qwen3_5TextConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        linear_num_value_heads=linear[0],
        linear_num_key_heads=linear[1],
        tie_word_embeddings=tied,
    )


CONFIGS = {
    "Qwen3.5-0.8B": full_config(24, 1024, 3584, (8, 2), (16, 16), True),
    "Qwen3.5-4B": full_config(32, 2560, 9216, (16, 4), (32, 16), True),
    "Qwen3.5-27B": full_config(64, 5120, 17408, (24, 4), (48, 16), False),
}


def parameters_of(config: Qwen3_5TextConfig) -> int:
    """Weights of the text model, a tied matrix counted once; nothing is allocated."""
    with torch.device("meta"):
        model = Qwen3_5ForCausalLM(config)
    model.tie_weights()
    return sum(weight.numel() for weight in model.parameters())


def computed(name: str, config: Qwen3_5TextConfig) -> Row:
    """The plan of one model in bfloat16, with states, factors and dictionary in float32.

    A step of the dictionary holds weights, gradients and Adam's two moments. Room for activations is what `run_edits` reckons
    with, per token of a batch, and six times a layer's factors for the temporaries of its scan.
    """
    linear = config.layer_types.count("linear_attention")
    heads, d_k, d_v = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    weights = parameters_of(config)
    states = 4 * linear * heads * d_k * d_v
    factors = 4 * TOKENS * heads * (4 * d_k + d_v + 1)
    attended = 2 * 2 * (config.num_hidden_layers - linear) * config.num_key_value_heads * config.head_dim * TOKENS
    dictionary = 4 * 4 * ATOMS * (2 * (d_k + d_v) + 1)
    activations = 2 * TOKENS * (16 * config.hidden_size + 4 * config.intermediate_size) + 6 * factors
    needed = 2 * weights + states + attended + factors + dictionary + activations
    return {
        "model": name,
        "parameters": weights,
        "weights in bf16, MB": 2 * weights,
        "states of a text, MB": states,
        "keys and values of 1,024 tokens, MB": attended,
        "a layer's factors over 1,024 tokens, MB": factors,
        "dictionary and Adam, MB": dictionary,
        "room for activations, MB": activations,
        "in all, MB": needed,
        "fits a GPU of": next((f"{size} GiB" for size in GPUS if needed < 0.9 * size * GIB), "none of them"),
    }


def plan() -> list[Row]:
    """A row per model."""
    return [computed(name, config) for name, config in CONFIGS.items()]
