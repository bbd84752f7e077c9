"""Attention of many rows to one past that they share, which is not copied for few new positions."""

import pytest
import torch

from hooked_recurrent import AttentionConfig, LayerState
from hooked_recurrent.layers import attention
from hooked_recurrent.layers.attention import FEW, GatedAttention, attend_to_shared
from tests.hooked_recurrent.models import distance

ROWS, PAST = 3, 7


def layer_of(dtype=torch.float64, kv_heads=2):
    torch.manual_seed(0)
    layer = GatedAttention(AttentionConfig(4, kv_heads, 6, 4), d_model=12).requires_grad_(False)
    for weight in layer.parameters():
        weight.normal_(std=0.5)
    return layer.to(dtype)


def sides(length, kv_heads, dtype=torch.float64):
    shapes = [(ROWS, length, 4), *[(ROWS, length, kv_heads)] * 2, *[(PAST, kv_heads)] * 2]
    return [torch.randn(*shape, 6, dtype=torch.float64).to(dtype) for shape in shapes]


def copied(layer, query, key, value, past_key, past_value):
    key, value = (
        torch.cat([past.expand(ROWS, -1, -1, -1), new], dim=1) for past, new in ((past_key, key), (past_value, value))
    )
    return layer._attend(query, key, value, PAST)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, FEW, FEW + 5])
def test_equals_attention_to_copies(length, kv_heads):
    some = sides(length, kv_heads)
    assert distance(attend_to_shared(*some), copied(layer_of(kv_heads=kv_heads), *some)) <= 1e-12
    narrow = [side.bfloat16() for side in some]
    made = attend_to_shared(*narrow)
    assert made.dtype == torch.bfloat16 and distance(made.double(), attend_to_shared(*some)) <= 3e-2


@pytest.mark.parametrize(
    ("length", "rows", "stops", "hook", "shared"),
    [
        (1, ROWS, (), None, True),
        (FEW, ROWS, (), None, True),
        (FEW + 1, ROWS, (), None, False),
        (FEW, 1, (), None, False),
        (FEW, ROWS, (FEW,), None, False),
        (FEW, ROWS, (), "hook_pattern", False),
        (FEW, ROWS, (), "hook_attn_scores", False),
    ],
)
def test_when_the_past_is_not_copied(monkeypatch, length, rows, stops, hook, shared):
    """Few new positions of several rows, where nobody wants the state after or the pattern; the output is the same."""
    layer, calls = layer_of(), []
    monkeypatch.setattr(attention, "attend_to_shared", lambda *s: (calls.append(1), attend_to_shared(*s))[1])
    x = torch.randn(rows, length, 12, dtype=torch.float64)
    past = LayerState(keys=torch.randn(1, PAST, 2, 6).double(), values=torch.randn(1, PAST, 2, 6).double())
    if hook is not None:
        getattr(layer, hook).add_hook(lambda tensor, hook: None)
    positions = torch.arange(PAST, PAST + length)
    found, states = layer(x, past, positions, stops)
    assert bool(calls) == shared and len(states) == len(stops)
    each = past.map(lambda tensor: tensor.expand(rows, -1, -1, -1))
    expected, _ = layer(x, each, positions, stops)
    assert distance(found, expected) <= 1e-12
