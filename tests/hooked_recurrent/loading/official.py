"""Tiny random models of transformers' own classes, with their own initialisation."""

import torch
from transformers.models import qwen3_5, qwen3_next

LAYERS = {
    "linear": ["linear_attention"] * 3,
    "hybrid": ["linear_attention"] * 3 + ["full_attention"],
}
VOCABULARY = 101


def sizes(layers="linear", value_heads=4, **changes):
    """Keyword arguments that the text configs of both families understand."""
    kinds = LAYERS[layers]
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": len(kinds),
        "layer_types": list(kinds),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "linear_num_key_heads": 2,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": 12,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    } | changes


def text_model(**options):
    """A Qwen3_5ForCausalLM."""
    return awake(qwen3_5.Qwen3_5ForCausalLM, qwen3_5.Qwen3_5TextConfig(**sizes(**options)))


def multimodal_model(**options):
    """A Qwen3_5ForConditionalGeneration with the smallest vision tower that its config allows."""
    text = sizes(**options)
    tied = text["tie_word_embeddings"]
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 2}
    vision |= {"out_hidden_size": text["hidden_size"], "num_position_embeddings": 16}
    config = qwen3_5.Qwen3_5Config(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=tied,
        image_token_id=VOCABULARY - 1,
        video_token_id=VOCABULARY - 2,
        vision_start_token_id=VOCABULARY - 3,
        vision_end_token_id=VOCABULARY - 4,
    )
    return awake(qwen3_5.Qwen3_5ForConditionalGeneration, config)


def next_model(**options):
    """A dense Qwen3NextForCausalLM."""
    config = qwen3_next.Qwen3NextConfig(**sizes(**options), num_experts=0)
    return awake(qwen3_next.Qwen3NextForCausalLM, config)


MODELS = {"text": text_model, "multimodal": multimodal_model, "next": next_model}


def awake(model_class, config):
    """Official weights, but with decays of 1 to 500 tokens and embeddings of size 1, so that the layers have work to do."""
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("dt_bias"):
                weight.uniform_(-6.0, 0.0)
            elif name.endswith("embed_tokens.weight"):
                weight.normal_(std=1.0)
            elif name.endswith("norm.weight"):
                weight.add_(0.1 * torch.randn_like(weight))
    return model.eval().requires_grad_(False)


def logits_of(model, tokens):
    """Their logits. use_cache=False: their cache cannot tell its length without a softmax layer."""
    return model(input_ids=tokens, use_cache=False).logits


def tokens_of(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY - 4, (batch, length), generator=generator)
