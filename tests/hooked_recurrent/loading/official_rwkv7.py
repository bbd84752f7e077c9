"""Random RWKV-7 checkpoints in RWKV-LM's layout, and the packages that run them: rwkv, rwkv7_hf and flash-linear-attention."""

import contextlib
import io
import os
from functools import lru_cache
from unittest import mock

import torch

VOCABULARY = 101
RANKS = {"w": 16, "a": 12, "v": 8, "g": 20}
MIX_POWERS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}


def official_tensors(d_head=64, d_model=128, n_layers=3, d_vocab=VOCABULARY, d_mlp=256, seed=0):
    """The state dict that RWKV-LM would write.

    Its x070 initialisation (ramps of the decay, zigzags inside heads, orthogonal second halves of the projections of low
    rank), except that nothing stays 0 or faint and no two parts stay equal, as after training: what it starts at zero is
    orthogonal or uniform, projections pass their input on at full size (those of low rank at half), and vectors are
    jittered by a tenth of a unit. So a tensor that is forgotten or mistaken for another changes the logits.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tensors = {"emb.weight": uniform(d_vocab, d_model, 1.0), "head.weight": ortho(d_vocab, d_model, 0.5)}
        for norm in ("ln_out", "blocks.0.ln0", *(f"blocks.{i}.ln{j}" for i in range(n_layers) for j in (1, 2))):
            tensors |= {f"{norm}.weight": torch.ones(d_model), f"{norm}.bias": torch.zeros(d_model)}
        for layer in range(n_layers):
            block = f"blocks.{layer}."
            mixer = mixer_tensors(layer, n_layers, d_model, d_head)
            tensors |= {f"{block}att.{name}": tensor for name, tensor in mixer.items()}
            ramp = torch.arange(d_model) / d_model
            tensors[f"{block}ffn.x_k"] = (1 - ramp ** (1 - layer / n_layers) ** 4).view(1, 1, -1)
            tensors[f"{block}ffn.key.weight"] = uniform(d_mlp, d_model, 0.5 / d_model**0.5)
            tensors[f"{block}ffn.value.weight"] = ortho(d_model, d_mlp, 0.5)
    for tensor in tensors.values():
        if tensor.ndim != 2 or tensor.shape[1] == d_head:
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return tensors


def mixer_tensors(layer, n_layers, d_model, d_head):
    """RWKV-LM's initialisation of a time mix."""
    depth, rest = layer / max(n_layers - 1, 1), 1 - layer / n_layers
    place = torch.arange(d_model)
    linear, around = place / (d_model - 1) - 0.5, 2 * (place % d_head) / (d_head - 1) - 1
    zigzag = around * around.abs()
    vectors = {
        **{f"x_{part}": 1 - (place / d_model) ** (power * rest) for part, power in MIX_POWERS.items()},
        "w0": -5.5 + 6 * (linear + 0.5) ** (1 + depth**0.3) + 2.5 * zigzag,
        "a0": -0.19 + 0.3 * zigzag + 0.4 * linear,
        "v0": 0.73 - 0.4 * linear,
        "k_k": 0.71 - 0.1 * linear,
        "k_a": torch.full((d_model,), 1.02),
    }
    tensors = {name: vector.view(1, 1, -1).clone() for name, vector in vectors.items()}
    for part, rank in RANKS.items():
        tensors[f"{part}1"], tensors[f"{part}2"] = ortho(d_model, rank, 1.0), ortho(rank, d_model, 0.5)
    tensors["r_k"] = torch.full((d_model // d_head, d_head), -0.04)
    for name in ("receptance", "key", "value", "output"):
        tensors[f"{name}.weight"] = uniform(d_model, d_model, (3 / d_model) ** 0.5)
    tensors["ln_x.weight"] = torch.full((d_model,), ((1 + layer) / n_layers) ** 0.7)
    tensors["ln_x.bias"] = torch.zeros(d_model)
    if layer == 0:  # in some real files the first layer has these, which nothing reads
        tensors |= {name: torch.full_like(tensors[name], 3.0) for name in ("v0", "v1", "v2")}
    return tensors


def ortho(rows, columns, scale):
    gain = (rows / columns) ** 0.5 if rows > columns else 1.0
    return torch.nn.init.orthogonal_(torch.empty(rows, columns), gain=gain * scale)


def uniform(rows, columns, size):
    return torch.empty(rows, columns).uniform_(-size, size)


def tokens_of(length, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (batch, length), generator=generator)


@lru_cache
def rwkv_package():
    """The class of the `rwkv` package that runs RWKV-7. Importing it changes settings of torch, which are put back."""
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    benchmark = torch.backends.cudnn.benchmark
    with contextlib.redirect_stdout(io.StringIO()):
        from rwkv.model import RWKV
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
    torch.backends.cudnn.benchmark = benchmark
    return RWKV


def run_rwkv(file):
    """The `rwkv` package on a .pth file in float32: a function of (list of tokens, state) to (all logits, state)."""
    with contextlib.redirect_stdout(io.StringIO()):
        model = rwkv_package()(str(file.with_suffix("")), "cpu fp32")

    def run(tokens, state=None):
        logits, state = model.forward(tokens, state, full_output=True)
        return logits.view(len(tokens), -1), state

    return run


def convert(file, folder, vocabulary=None):
    """The folder that rwkv7_hf's own converter makes of a .pth file, with the code and tokenizer that it puts there."""
    from rwkv7_hf import converter

    options = ["--input", str(file), "--output", str(folder), "--precision", "fp32"]
    with contextlib.redirect_stdout(io.StringIO()):
        converter.main([*options, *(["--vocab-file", str(vocabulary)] if vocabulary else [])])
    return folder


def fla_model(folder):
    """flash-linear-attention's model of a folder, and the report of its loading."""
    from fla.models.rwkv7 import RWKV7ForCausalLM

    model, report = RWKV7ForCausalLM.from_pretrained(folder, output_loading_info=True)
    return model.eval().requires_grad_(False), report


def run_fla(model, tokens):
    """Its logits on a CPU: its kernels, which need a GPU, are replaced by its own references for them in plain torch."""
    from fla.layers import rwkv7 as layer
    from fla.models.rwkv7 import modeling_rwkv7 as modeling
    from fla.modules.token_shift import token_shift_ref
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
    from fla.ops.rwkv7.fused_addcmul import torch_addcmul_rwkv7
    from fla.ops.rwkv7.fused_k_update import k_update_ref
    from fla.ops.rwkv7.gate_output_correction import gate_output_correction_ref

    def shift(x, cu_seqlens=None, cache=None, output_cache=True):
        assert cache is None
        return token_shift_ref(x), None

    def recurrence(r, w, k, v, a=None, b=None, kk=None, scale=1.0, initial_state=None, **_):
        assert scale == 1.0 and initial_state is None
        a, b = (-kk, kk * a) if kk is not None else (a, b)
        by_head = [tensor.transpose(1, 2) for tensor in (r * r.shape[-1] ** 0.5, k, v, a, b, w)]
        read, state = dplr_recurrence(*by_head)
        return read.transpose(1, 2), state

    with contextlib.ExitStack() as stack, torch.no_grad():
        for owner, name, plain in (
            (layer, "token_shift", shift),
            (modeling, "token_shift", shift),
            (layer, "fused_addcmul_rwkv7", torch_addcmul_rwkv7),
            (layer, "fused_k_rwkv7", k_update_ref),
            (layer, "chunk_rwkv7", recurrence),
            (layer, "fused_mul_recurrent_rwkv7", recurrence),
            (layer, "gate_output_correction", gate_output_correction_ref),
        ):
            stack.enter_context(mock.patch.object(owner, name, plain))
        for block in model.model.layers:
            stack.enter_context(mock.patch.object(block.ffn, "act_fn", lambda x: x.relu().square()))
        return model(input_ids=tokens, use_cache=False).logits
