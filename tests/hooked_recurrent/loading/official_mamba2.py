"""Tiny random Mamba-2 models of transformers' own class, and the same weights in the layout of state-spaces/mamba."""

import json
import math

import torch
from safetensors.torch import save_file
from transformers.models import mamba2

VOCABULARY = 101


def config(**changes):
    """12 != 8: the state size differs from the head dimension, so that no axis error can hide."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "expand": 2,
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 12,
        "n_groups": 2,
        "num_hidden_layers": 3,
        "chunk_size": 64,
        "tie_word_embeddings": False,
    }
    return mamba2.Mamba2Config(**(sizes | changes))


def official(**changes):
    """A Mamba2ForCausalLM whose every parameter matters: none stays at 0 or 1, and memories last 1 to 500 tokens."""
    torch.manual_seed(0)
    model = mamba2.Mamba2ForCausalLM(config(**changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("dt_bias"):
                weight.uniform_(-5.0, 0.0)
            elif name.endswith("A_log"):
                weight.uniform_(-1.0, 1.0)
            elif weight.ndim == 1:
                weight.add_(0.3 * torch.randn_like(weight))
            elif name.endswith("embeddings.weight"):
                weight.normal_(std=1.0)
    return model.eval().requires_grad_(False)


def logits_of(model, tokens):
    """Their logits. use_cache=False: a whole text in one call."""
    return model(input_ids=tokens, use_cache=False).logits


def tokens_of(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (batch, length), generator=generator)


def original_config(hf, **ssm):
    """The config.json that state-spaces/mamba would write for this model; only what is not its default in ssm_cfg."""
    options = {"layer": "Mamba2", "d_state": hf.state_size, "headdim": hf.head_dim, "ngroups": hf.n_groups, **ssm}
    options |= {"bias": True} if hf.use_bias else {}
    options |= {} if hf.use_conv_bias else {"conv_bias": False}
    if tuple(hf.time_step_limit) != (0.0, math.inf):
        options["dt_limit"] = list(hf.time_step_limit)
    return {
        "d_model": hf.hidden_size,
        "d_intermediate": 0,
        "n_layer": hf.num_hidden_layers,
        "vocab_size": hf.vocab_size,
        "ssm_cfg": options,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": hf.tie_word_embeddings,
    }


def save_original(model, folder, *, as_bin=True, **config_changes):
    """The model as state-spaces/mamba writes it: its config, and pytorch_model.bin or safetensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(original_config(model.config) | config_changes))
    rename = {"backbone.embeddings.weight": "backbone.embedding.weight"}
    tensors = {rename.get(name, name): tensor.clone() for name, tensor in model.state_dict().items()}
    if as_bin:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder
