"""The softmax layer against transformers' Qwen3.5 attention, its rotary embedding and its cache."""

import pytest
import torch
from transformers.models.qwen3_5 import configuration_qwen3_5 as configuration
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from hooked_recurrent import AttentionConfig, LayerState
from hooked_recurrent.layers.attention import GatedAttention, rotary_angles, rotate
from hooked_recurrent.layers.mlp import SwiGLU
from tests.hooked_recurrent.models import distance


def hf_config(**changes):
    sizes = {
        "hidden_size": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    }
    config = configuration.Qwen3_5TextConfig(**(sizes | changes))
    config._attn_implementation = "eager"
    return config


def pair(bias=False):
    """Their layer and ours with the same random weights."""
    theirs = qwen.Qwen3_5Attention(hf_config(attention_bias=bias), layer_idx=0)
    ours = GatedAttention(AttentionConfig(4, 2, 8, 4, rope_theta=100.0, bias=bias, norm_eps=1e-5), d_model=12)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(0.5 * torch.randn_like(weight))
        query, gate = theirs.q_proj.weight.unflatten(0, (4, 16)).split(8, dim=1)
        ours.q.weight.copy_(query.flatten(0, 1))
        ours.gate.weight.copy_(gate.flatten(0, 1))
        if bias:
            query, gate = theirs.q_proj.bias.unflatten(0, (4, 16)).split(8, dim=1)
            ours.q.bias.copy_(query.flatten())
            ours.gate.bias.copy_(gate.flatten())
        for mine, name in ((ours.k, "k_proj"), (ours.v, "v_proj"), (ours.out, "o_proj"), (ours.q_norm, "q_norm")):
            mine.load_state_dict(getattr(theirs, name).state_dict())
        ours.k_norm.load_state_dict(theirs.k_norm.state_dict())
    for module in ours.modules():
        module.requires_grad_(False)
    return theirs.requires_grad_(False), ours


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("length", [1, 9])
def test_equals_transformers(bias, length):
    theirs, ours = pair(bias)
    x = torch.randn(2, length, 12)
    positions = torch.arange(length)
    cos_sin = qwen.Qwen3_5TextRotaryEmbedding(hf_config())(x, positions[None].expand(3, 2, -1))
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    expected, _ = theirs(x, position_embeddings=cos_sin, attention_mask=mask)
    out, _ = ours(x, LayerState(), positions, (length,))
    assert distance(out, expected) <= 2e-6


def test_rotary_angles_equal_transformers():
    positions = torch.tensor([0, 1, 17, 4000])
    cos, sin = qwen.Qwen3_5TextRotaryEmbedding(hf_config())(torch.zeros(1, 4, 12), positions[None].expand(3, 1, -1))
    angles = rotary_angles(positions, 4, 100.0)
    torch.testing.assert_close(angles.cos[:, 0], cos[0])
    torch.testing.assert_close(angles.sin[:, 0], sin[0])
    x = torch.randn(1, 4, 3, 8)
    expected, _ = qwen.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(rotate(x, angles), expected)


def test_rotation_keeps_lengths_and_tells_only_distances():
    x, y = torch.randn(1, 1, 1, 10, dtype=torch.float64), torch.randn(1, 1, 1, 10, dtype=torch.float64)

    def product(p, q):
        angles = [rotary_angles(torch.tensor([place]), 6, 50.0) for place in (p, q)]
        return (rotate(x, angles[0]) * rotate(y, angles[1])).sum()

    assert abs(product(9, 4) - product(25, 20)) <= 1e-5  # the angles themselves are float32
    assert abs(product(9, 4) - product(9, 5)) > 1e-3
    turned = rotate(x, rotary_angles(torch.tensor([11]), 6, 50.0))
    assert torch.equal(turned[..., 6:], x[..., 6:])
    torch.testing.assert_close(turned.norm(), x.norm(), rtol=1e-6, atol=0)
    assert torch.equal(rotate(x, rotary_angles(torch.tensor([11]), 0, 50.0)), x)


def test_the_cache_and_the_written_out_pattern_give_the_same():
    _, ours = pair()
    ours = ours.double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    whole, (full,) = ours(x, LayerState(), torch.arange(9), (9,))
    state, pieces = LayerState(), []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        out, (state,) = ours(x[:, start:stop], state, torch.arange(start, stop), (stop - start,))
        pieces.append(out)
    assert distance(torch.cat(pieces, dim=1), whole) <= 1e-12
    assert distance(state.keys, full.keys) <= 1e-12 and state.keys.shape == (2, 9, 2, 8)
    patterns = []
    ours.hook_pattern.add_hook(lambda tensor, hook: patterns.append(tensor.clone()))
    written, states = ours(x, LayerState(), torch.arange(9), (3, 9))
    assert distance(written, whole) <= 1e-12
    assert torch.equal(states[0].values, full.values[:, :3]) and torch.equal(states[1].keys, full.keys)
    assert patterns[0].triu(1).eq(0).all()
    torch.testing.assert_close(patterns[0].sum(-1), torch.ones(2, 4, 9, dtype=torch.float64))


def test_w_o_per_head():
    _, ours = pair()
    z = torch.randn(2, 3, 4, 8)
    torch.testing.assert_close(ours.out(z.flatten(2)), torch.einsum("bphv,hvm->bpm", z, ours.W_O))


def test_the_mlp_equals_transformers():
    theirs = qwen.Qwen3_5MLP(hf_config(), intermediate_size=20).requires_grad_(False)
    ours = SwiGLU(12, 20).requires_grad_(False)
    for name in ("gate", "up", "down"):
        getattr(ours, name).weight.copy_(getattr(theirs, f"{name}_proj").weight)
    x = torch.randn(2, 3, 12)
    torch.testing.assert_close(ours(x, None, (3,))[0], theirs(x))
