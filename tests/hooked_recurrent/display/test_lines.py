"""What notebooks show: one line with shapes, for whatever holds tensors."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from hooked_recurrent import RecurrentState
from hooked_recurrent.display.lines import brief, span
from hooked_recurrent.memory import effective_attention, half_life, retention, spectrum
from hooked_recurrent.patching import Sweep, Trunk
from tests.hooked_recurrent.display.reading import Reader, table_of
from tests.hooked_recurrent.models import HYBRID, tiny_config, tiny_model, tokens_of


def test_one_line_each():
    model = tiny_model(HYBRID, seed=1).requires_grad_(False)
    tokens = tokens_of(model)
    (_, state), cache = model.run_with_cache(tokens, return_state=True)
    results = [effective_attention(cache, 0), half_life(cache, 0), retention(cache, 0, [3]), spectrum(cache, 0)]
    trunk = Trunk.grow(model, tokens[:1], [0, 3])
    for shown in map(repr, [cache, state, state.layers[0], cache.factors(0), trunk, *results]):
        assert "\n" not in shown and "tensor(" not in shown and len(shown) < 400
    assert (
        repr(cache)
        == f"RecurrentCache({len(cache)} activations; batch 2, positions (0, 1, 2, ..., 11), heads (0, 1, 2, 3))"
    )
    assert repr(results[0]) == (
        "EffectiveAttention(heads=(0, 1, 2, 3), coefficient=float64[2, 4, 12, 12], write_value=float64[2, 12, 4, 5])"
    )
    assert repr(cache.factors(0)).startswith("Factors(log_decay=float64[2, 12, 4], write_key=float64[2, 12, 4, 3], ")


def test_a_state_names_each_kind_of_layer_once():
    model = tiny_model(HYBRID, seed=1).requires_grad_(False)
    _, state = model(tokens_of(model), return_state=True)
    assert repr(state) == (
        "RecurrentState(position=12, batch_size=2, layers: "
        "2 x LayerState(matrix=float64[2, 4, 3, 5], conv_tail=float64[2, 3, 32]), "
        "1 x LayerState(keys=float64[2, 12, 2, 6], values=float64[2, 12, 2, 6]))"
    )
    assert repr(RecurrentState(())) == "RecurrentState(position=0, batch_size=None, layers: )"


def test_a_small_cache_names_what_it_holds():
    model = tiny_model(seed=1).requires_grad_(False)
    options = {"names_filter": "hook_embed", "positions": [3, 5], "remove_batch_dim": True}
    _, cache = model.run_with_cache(tokens_of(model, batch=1), **options)
    assert repr(cache) == "RecurrentCache(hook_embed; no batch axis, positions (3, 5), heads (0, 1, 2, 3))"


def test_a_sweep_names_its_axes():
    axes = {"row": tuple(range(10)), "layer": (0, 2)}
    sweep = Sweep("deleted", "write", axes, torch.zeros(10, 2), (0.5,) * 10, estimate=torch.ones(10, 2))
    shown = (
        "Sweep('deleted', site='write', values [row 10, layer 2], with estimate, baseline=(0.5, 0.5, 0.5, ..., 0.5))"
    )
    assert repr(sweep) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (pd.DataFrame({"a": [1, 2], "b": [3, 4]}), "2x2 table"),
        (np.zeros((2, 3), dtype=np.float32), "float32[2, 3]"),
        (list(range(9)), "[0, 1, 2, ..., 8]"),
        (("x" * 200,) * 9, f"({', '.join([repr('x' * 200)[:40] + '...'] * 3)}, ..., {repr('x' * 200)[:40]}...)"),
        ("x" * 200, "'" + "x" * 39 + "..."),
        ({"a": 1}, "1 entries"),
        (3, "3"),
    ],
)
def test_brief(value, shown):
    assert brief(value) == shown


def test_a_table_of_the_fields_with_the_range_of_tensors():
    factors = tiny_model(seed=1).run_with_cache(torch.tensor([[1, 2, 3]]))[1].factors(0)
    rows = {row["field"]: row for row in table_of(factors._repr_html_())}
    assert rows["write_key"]["holds"] == brief(factors.write_key) and "erase_strength" not in rows
    low, high = (float(end) for end in rows["write_value"]["from to"].split(" to "))
    assert (low, high) == pytest.approx(tuple(map(float, factors.write_value.aminmax())), rel=1e-3)
    assert span(torch.zeros(0)) == span(torch.tensor([True])) == span(torch.zeros(1).expand(1 << 23)) == ""


def test_a_config_shows_what_was_chosen_and_hides_its_defaults():
    rows = table_of(tiny_config()._repr_html_())
    assert {"d_model": "12", "d_vocab": "29"}.items() <= {row["field"]: row["value"] for row in rows}.items()
    assert "norm_eps" not in [row["field"] for row in rows]
    reader = Reader(tiny_config()._repr_html_())
    assert "norm_eps" in reader.text and "details" in reader.tags


def test_a_config_of_many_layers_is_one_line():
    shown = repr(replace(tiny_config(), layer_types=("gated_delta_net",) * 48))
    assert len(shown) < 800 and "48" not in shown and "..., 'gated_delta_net')" in shown
