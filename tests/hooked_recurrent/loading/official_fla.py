"""Tiny random models of flash-linear-attention's own classes, which run here without its Triton kernels.

Their classes build, initialise, save and run the models. What they hand to kernels, which need a GPU, goes to the
package's own naive recurrences and gates instead, and for convolutions, norms and SwiGLU to plain torch.
"""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from fla.layers import delta_net, gla, kda
from fla.models import DeltaNetConfig, DeltaNetForCausalLM, GLAConfig, GLAForCausalLM, KDAConfig, KDAForCausalLM
from fla.modules import FusedRMSNormGated, RMSNorm, ShortConvolution
from fla.modules.mlp import SwiGLULinear
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.kda.gate import naive_kda_gate, naive_kda_lowerbound_gate
from fla.ops.kda.naive import naive_recurrent_kda
from torch.nn import functional

VOCABULARY = 101
CLASSES = {
    "delta_net": (DeltaNetConfig, DeltaNetForCausalLM),
    "gla": (GLAConfig, GLAForCausalLM),
    "kda": (KDAConfig, KDAForCausalLM),
}
# Sizes whose heads have d_k != d_v.
SIZES = {
    "delta_net": {"num_heads": 4, "expand_k": 0.75, "use_gate": True},
    "gla": {"num_heads": 4, "use_short_conv": True},
    "kda": {"num_heads": 4, "head_dim": 6, "expand_v": 4 / 3},
}


def official(kind, **options):
    """A model of their class with its own initialisation, but with layers that have work to do and memories of many lengths."""
    config_class, model_class = CLASSES[kind]
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    config = config_class(**(sizes | {"initializer_range": 0.2} | SIZES[kind] | options))
    torch.manual_seed(0)
    model = model_class(config)
    for module in model.modules():
        if hasattr(module, "gate_fn"):  # where the gate is not part of the norm
            module.gate_fn = functional.silu
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("dt_bias"):
                weight.uniform_(-5.0, 0.0)
            elif name.endswith("A_log"):
                weight.uniform_(-1.0, 1.0)
            elif name.endswith("embeddings.weight"):
                weight.normal_(std=1.0)
            elif weight.ndim == 1:
                weight.add_(0.3 * torch.randn_like(weight))
    return model.eval().requires_grad_(False)


def l2_normalized(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def run_delta_rule(q, k, v, beta, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel):
    assert use_qk_l2norm_in_kernel and cu_seqlens is None and initial_state is None
    sides = (side.transpose(1, 2) for side in (l2_normalized(q), l2_normalized(k), v, beta))
    read, state = delta_rule_recurrence(*sides)
    return read.transpose(1, 2), state


def run_gla(q, k, v, initial_state, output_final_state, state_v_first, cu_seqlens, gk=None, g=None):
    assert cu_seqlens is None and initial_state is None
    return naive_recurrent_gla(q, k, v, g if gk is None else gk, output_final_state=True)


def run_kda(q, k, v, g, beta, A_log, dt_bias, lower_bound, allow_neg_eigval, initial_state, **options):
    assert options["use_qk_l2norm_in_kernel"] and options["use_gate_in_kernel"] and initial_state is None
    if lower_bound is None:
        decay = naive_kda_gate(g, A_log, dt_bias)
    else:
        decay = naive_kda_lowerbound_gate(g, A_log, dt_bias, lower_bound)
    strength = beta.sigmoid() * (2 if allow_neg_eigval else 1)
    return naive_recurrent_kda(l2_normalized(q), l2_normalized(k), v, decay, strength, output_final_state=True)


def convolve(self, x, cache=None, output_final_state=False, cu_seqlens=None):
    assert cache is None and cu_seqlens is None
    out = functional.conv1d(x.mT, self.weight, self.bias, padding=self.kernel_size[0] - 1, groups=self.groups)
    out = out[..., : x.shape[1]].mT
    return (functional.silu(out) if self.activation else out), None


def rms_norm(self, x, residual=None, prenorm=False):
    total = x if residual is None else x + residual
    out = functional.rms_norm(total, (self.hidden_size,), self.weight, self.eps)
    return (out, total) if prenorm else out


def gated_rms_norm(self, x, g):
    activation = {"swish": functional.silu, "sigmoid": torch.sigmoid}[self.activation]
    return functional.rms_norm(x, (self.hidden_size,), self.weight, self.eps) * activation(g)


def swiglu_linear(self, x, y, weight, bias):
    return functional.linear(functional.silu(x) * y, weight, bias)


@contextmanager
def without_kernels():
    """Their classes, with everything that needs a GPU replaced."""
    replaced = [
        *((delta_net, name, run_delta_rule) for name in ("chunk_delta_rule", "fused_recurrent_delta_rule")),
        *((gla, name, run_gla) for name in ("chunk_gla", "fused_recurrent_gla")),
        *((kda, name, run_kda) for name in ("chunk_kda", "fused_recurrent_kda")),
        (ShortConvolution, "forward", convolve),
        (RMSNorm, "forward", rms_norm),
        (FusedRMSNormGated, "forward", gated_rms_norm),
        (SwiGLULinear, "forward", swiglu_linear),
    ]
    with ExitStack() as stack:
        for owner, name, stand_in in replaced:
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield


def logits_of(model, tokens):
    """Their logits."""
    with without_kernels():
        return model(input_ids=tokens, use_cache=False).logits


def tokens_of(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (batch, length), generator=generator)
