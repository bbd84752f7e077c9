"""Tiny random models and random inputs that the tests share; all of it is drawn from seeds.

`RULES` is the one list of rules: whatever must hold for every rule is tested over it (a test of the registry sees to it that
none is left out). `STACKS` are the models made of them, and one hybrid with softmax layers.
"""

import pytest
import torch

from hooked_recurrent import (
    AttentionConfig,
    DeltaNetConfig,
    Factors,
    GatedDeltaNetConfig,
    GatedLinearAttentionConfig,
    HookedRecurrentModel,
    KimiDeltaAttentionConfig,
    Mamba2Config,
    ModelConfig,
    RWKV7Config,
)


def gated_delta_net(n_heads, n_key_heads, d_k, d_v, conv_size):
    return {
        "mixer": GatedDeltaNetConfig(n_heads=n_heads, n_key_heads=n_key_heads, d_k=d_k, d_v=d_v, conv_size=conv_size),
        "d_mlp": 16,
    }


def mamba2(n_heads, n_key_heads, d_k, d_v, conv_size):
    sizes = {"n_heads": n_heads, "n_groups": n_key_heads, "d_k": d_k, "d_v": d_v, "conv_size": conv_size}
    return {
        "mixer": Mamba2Config(**sizes, bias=True, dt_limit=(0.002, 1.0)),
        "d_mlp": None,
        "norm_offset": 0.0,
        "residual_in_fp32": True,
    }


def rwkv7(n_heads, n_key_heads, d_k, d_v, conv_size):
    ranks = {"decay_rank": 2, "iclr_rank": 3, "value_rank": 2, "gate_rank": 4}
    return {
        "mixer": RWKV7Config(n_heads=n_heads, d_k=d_k, d_v=d_v, **ranks),
        "d_mlp": 16,
        "mlp": "channel_mix",
        "norm": "layer",
        "embed_norm": True,
    }


def delta_net(n_heads, n_key_heads, d_k, d_v, conv_size):
    mixer = DeltaNetConfig(n_heads=n_heads, d_k=d_k, d_v=d_v, conv_size=conv_size)
    return {"mixer": mixer, "d_mlp": 16, "norm_offset": 0.0}


def gated_linear_attention(n_heads, n_key_heads, d_k, d_v, conv_size):
    sizes = {"n_heads": n_heads, "n_key_value_heads": n_key_heads, "d_k": d_k, "d_v": d_v, "conv_size": conv_size}
    mixer = GatedLinearAttentionConfig(**sizes, decay_rank=3, decay_divisor=4.0)
    return {"mixer": mixer, "d_mlp": 16, "norm_offset": 0.0}


def kimi_delta_attention(n_heads, n_key_heads, d_k, d_v, conv_size):
    sizes = {"n_heads": n_heads, "n_key_heads": n_key_heads, "d_k": d_k, "d_v": d_v, "conv_size": conv_size}
    return {"mixer": KimiDeltaAttentionConfig(**sizes), "d_mlp": 16, "norm_offset": 0.0}


# Per rule, the fields of its tiny ModelConfig from five sizes.
RULES = {
    "gated_delta_net": gated_delta_net,
    "mamba2": mamba2,
    "rwkv7": rwkv7,
    "delta_net": delta_net,
    "gated_linear_attention": gated_linear_attention,
    "kimi_delta_attention": kimi_delta_attention,
}
SOFTMAX = "attention"
ALL_LINEAR = ("gated_delta_net",) * 2
HYBRID = ("gated_delta_net", SOFTMAX, "gated_delta_net")
STACKS = {**{rule: (rule, rule) for rule in RULES}, "hybrid": HYBRID}
over_stacks = pytest.mark.parametrize("layer_types", STACKS.values(), ids=STACKS)


def tiny_config(layer_types=ALL_LINEAR, *, n_heads=4, n_key_heads=2, d_k=3, d_v=5, conv_size=4, tied=True):
    attention = AttentionConfig(n_heads=4, n_key_value_heads=2, d_head=6, rotary_dims=4)
    rule = next(kind for kind in layer_types if kind != SOFTMAX)
    return ModelConfig(
        d_model=12,
        d_vocab=29,
        layer_types=layer_types,
        attention=attention if SOFTMAX in layer_types else None,
        tied_embeddings=tied,
        **RULES[rule](n_heads, n_key_heads, d_k, d_v, conv_size),
    )


def tiny_model(layer_types=ALL_LINEAR, *, seed=0, dtype=torch.float64, tokenizer=None, **sizes):
    """A model whose states live long and whose layers all matter: its projections are scaled up from their start."""
    torch.manual_seed(seed)
    model = HookedRecurrentModel(tiny_config(layer_types, **sizes), tokenizer)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "conv" not in name:
                weight.normal_(std=weight.shape[1] ** -0.5)
            elif name.endswith(("A_log", "dt_bias")):
                weight.uniform_(-3.0, 0.5)  # decays from about 0.5 to 0.999 a token
            elif weight.ndim == 1:
                weight.add_(0.3 * torch.randn_like(weight))
    return model.to(dtype).eval()


def tokens_of(model, batch=2, length=12, seed=0):
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(model.cfg.d_vocab, (batch, length), generator=generator)


def random_factors(
    length=7,
    *,
    batch=2,
    heads=2,
    d_k=3,
    d_v=5,
    terms=None,
    erase="none",
    vector_decay=False,
    strong=False,
    full_beta=False,
    dtype=torch.float64,
    seed=0,
):
    """Random factors; `erase` is "none", "tied" (a delta rule's own) or "decoupled", `strong` decays reach e^-20 a step."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(batch, length, heads, *shape, generator=generator, dtype=torch.float64)

    def unit(*shape):
        x = normal(*shape)
        return x / x.norm(dim=-1, keepdim=True)

    channels = (d_k,) if vector_decay else ()
    uniform = torch.rand(batch, length, heads, *channels, generator=generator, dtype=torch.float64)
    log_decay = -20.0 * uniform**4 if strong else -0.5 * uniform
    beta = torch.ones(batch, length, heads, dtype=torch.float64)
    if not full_beta:
        beta = torch.rand(batch, length, heads, generator=generator, dtype=torch.float64)
    several = () if terms is None else (terms,)
    key, value = unit(*several, d_k), normal(*several, d_v)
    decay = log_decay.exp()
    roles = {"log_decay": log_decay, "write_key": key, "write_value": value, "query": normal(d_k)}
    if erase == "tied":
        roles["erase_strength"] = -(decay.mean(-1) if vector_decay else decay) * beta
    elif erase == "decoupled":
        roles["probe"] = unit(d_k)
        # near -decay * beta * probe, as in every rule here: a free erase would make the state grow without bound
        along = roles["probe"] + 0.1 * unit(d_k)
        roles["erase"] = -(decay if vector_decay else decay[..., None]) * beta[..., None] * along
    return Factors(**{name: tensor.to(dtype) for name, tensor in roles.items()})


def random_state(factors, *, size=1.0, seed=0):
    generator = torch.Generator().manual_seed(500 + seed)
    zero = factors.zero_state()
    return size * torch.randn(zero.shape, generator=generator, dtype=torch.float64).to(zero.dtype)


def distance(a, b):
    """Largest difference relative to the scale of b."""
    scale = b.abs().max().clamp(min=1e-300)
    return ((a - b).abs().max() / scale).item()
