"""Norms against torch's own and against transformers' classes."""

import pytest
import torch
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from hooked_recurrent.layers.norm import GatedRMSNorm, RMSNorm, l2_normalize


def randomised(module):
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn_like(weight))
    return module


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_equals_torch(offset):
    norm = randomised(RMSNorm(7, eps=1e-3, offset=offset)).double()
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    expected = torch.nn.functional.rms_norm(x, (7,), offset + norm.weight, eps=1e-3)
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)


def test_rms_norm_starts_as_a_plain_norm():
    x = torch.randn(3, 8)
    for offset in (0.0, 1.0):
        torch.testing.assert_close(RMSNorm(8, 1e-6, offset)(x), torch.nn.functional.rms_norm(x, (8,), eps=1e-6))


def test_rms_norm_equals_transformers():
    theirs = randomised(qwen.Qwen3_5RMSNorm(7, eps=1e-5))
    ours = RMSNorm(7, eps=1e-5)
    ours.weight.data.copy_(theirs.weight)
    x = 3 * torch.randn(2, 5, 7)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_compute_in_float32_and_return_what_they_were_given(dtype):
    norm = randomised(RMSNorm(64, eps=1e-6)).to(dtype)
    x = (100 * torch.randn(4, 64)).to(dtype)
    exact = torch.nn.functional.rms_norm(x.double(), (64,), 1 + norm.weight.double(), eps=1e-6)
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x), exact.to(dtype), rtol=0.01, atol=0.01)
    gated = randomised(GatedRMSNorm(64, eps=1e-6)).to(dtype)
    assert gated(x.float(), x).dtype == dtype


def test_gated_rms_norm_equals_transformers():
    theirs = randomised(qwen.Qwen3_5RMSNormGated(7, eps=1e-5))
    ours = GatedRMSNorm(7, eps=1e-5)
    ours.weight.data.copy_(theirs.weight)
    x, gate = 3 * torch.randn(2, 5, 4, 7), 3 * torch.randn(2, 5, 4, 7)
    expected = theirs(x.reshape(-1, 7), gate.reshape(-1, 7)).reshape(x.shape)
    torch.testing.assert_close(ours(x, gate), expected, rtol=1e-6, atol=1e-6)


def test_a_gate_may_have_another_activation():
    theirs = randomised(kimi.KimiLinearRMSNormGated(7, eps=1e-5))
    ours = GatedRMSNorm(7, eps=1e-5, activation=torch.sigmoid)
    ours.weight.data.copy_(theirs.weight)
    x, gate = 3 * torch.randn(2, 5, 4, 7), 3 * torch.randn(2, 5, 4, 7)
    torch.testing.assert_close(ours(x, gate), theirs(x, gate), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_gate_first_equals_transformers(groups):
    theirs = randomised(mamba2.MambaRMSNormGated(12, group_size=12 // groups, eps=1e-3))
    ours = GatedRMSNorm(12, eps=1e-3, groups=groups, gate_first=True)
    ours.weight.data.copy_(theirs.weight)
    x, gate = 3 * torch.randn(2, 5, 12), 3 * torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(x, gate), theirs(x, gate), rtol=1e-6, atol=1e-6)
    ours.gate_first = False
    parts = torch.nn.functional.rms_norm(x.unflatten(-1, (groups, -1)), (12 // groups,), eps=1e-3).flatten(-2)
    torch.testing.assert_close(
        ours(x, gate), ours.weight * parts * torch.nn.functional.silu(gate), rtol=1e-5, atol=1e-6
    )


def test_a_norm_gives_the_dtype_of_its_weight():
    """A float32 residual stream meets bfloat16 layers."""
    norm = RMSNorm(64, eps=1e-6).to(torch.bfloat16)
    assert norm(torch.randn(3, 64)).dtype == torch.bfloat16


def test_hooks_of_a_norm():
    norm = RMSNorm(7, eps=1e-6)
    seen = {}
    norm.hook_scale.add_hook(lambda tensor, hook: seen.__setitem__("scale", tensor))
    norm.hook_normalized.add_hook(lambda tensor, hook: 0 * tensor)
    x = torch.randn(2, 5, 7)
    assert norm(x).eq(0).all()
    torch.testing.assert_close(seen["scale"], (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())


def test_l2_normalize():
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(l2_normalize(x).norm(dim=-1), torch.ones(2, 5, dtype=torch.float64), rtol=1e-6, atol=0)
    assert l2_normalize(torch.zeros(3)).eq(0).all()
    torch.testing.assert_close(l2_normalize(x), qwen.l2norm(x), rtol=1e-12, atol=1e-12)
    tiny = torch.full((4,), 1e-4, dtype=torch.float64)  # eps sits inside the root, where it is felt by small vectors
    torch.testing.assert_close(l2_normalize(tiny), tiny / (4e-8 + 1e-6) ** 0.5, rtol=1e-12, atol=0)
