"""What models, states and caches show is what they are: against the config, the hook dictionary and the tensors themselves."""

import pytest
import torch

from hooked_recurrent import RecurrentState
from hooked_recurrent.display.model import ranges, size_of
from tests.hooked_recurrent.display.reading import Reader, table_of
from tests.hooked_recurrent.models import HYBRID, STACKS, tiny_model, tokens_of


@pytest.fixture(scope="module")
def hybrid():
    return tiny_model(HYBRID, seed=1).requires_grad_(False)


def numbers(text):
    """The layers that a table's "0–2, 4" names."""
    ends = [part.split("–") for part in text.split(", ")]
    return [layer for end in ends for layer in range(int(end[0]), int(end[-1]) + 1)]


@pytest.mark.parametrize("layer_types", STACKS.values(), ids=STACKS)
def test_the_table_of_layers_tells_the_model(layer_types):
    model = tiny_model(layer_types)
    rows = table_of(model._repr_html_())
    assert [layer for row in rows for layer in numbers(row["layers"])] == list(range(len(layer_types)))
    for row in rows:
        for layer in numbers(row["layers"]):
            block = model.blocks[layer]
            cfg = block.mixer.cfg if block.recurrent else model.cfg.attention
            widths = (cfg.d_k, cfg.d_v) if block.recurrent else (cfg.d_head, cfg.d_head)
            assert row["rule"] == layer_types[layer] and (int(row["d_k"]), int(row["d_v"])) == widths
            assert int(row["heads"]) == cfg.n_heads
            assert int(row["hooks"]) == len([name for name in model.hook_dict if name.startswith(f"blocks.{layer}.")])
            weights = sum(parameter.numel() for parameter in block.parameters())
            assert int(row["parameters"].replace(",", "")) == weights


def test_key_heads_are_those_of_the_keys():
    for layer_types in (("gated_delta_net",) * 2, ("mamba2",) * 2, ("gated_linear_attention",) * 2, HYBRID):
        assert {row["key heads"] for row in table_of(tiny_model(layer_types)._repr_html_())} == {"2"}
    assert table_of(tiny_model(("rwkv7",) * 2)._repr_html_())[0]["key heads"] == "4"


def test_layers_that_are_alike_share_a_row_and_others_do_not():
    assert [row["layers"] for row in table_of(tiny_model(("mamba2",) * 4)._repr_html_())] == ["0–3"]
    assert [row["layers"] for row in table_of(tiny_model(("mamba2",) * 12)._repr_html_())] == ["0–11"]
    assert [row["layers"] for row in table_of(tiny_model(HYBRID)._repr_html_())] == ["0", "1", "2"]


def test_the_model_in_a_line_and_the_long_way(hybrid):
    assert repr(hybrid) == (
        "HookedRecurrentModel('unnamed': 2 gated_delta_net layers (4 heads, d_k 3, d_v 5) + 1 attention layers "
        f"(4 heads, d_head 6); d_model 12, vocabulary 29; {hybrid.parameter_count():,} parameters, float64 on cpu; "
        f"{len(hybrid.hook_dict)} hooks)"
    )
    assert hybrid.long_repr().count("HookPoint(") == len(hybrid.hook_dict) and "(W_q)" not in repr(hybrid)


def test_the_facts_of_a_model(hybrid):
    text = Reader(hybrid._repr_html_()).text
    assert (
        f"{hybrid.parameter_count():,}, float64 on cpu" in text and "120 numbers per text, 2 layers of 4 [3, 5]" in text
    )
    assert "none" in text and "functions attached" not in text


def test_every_hook_is_in_the_hook_table_once(hybrid):
    found = []
    for row in hybrid.hook_table().itertuples():
        layers = numbers(row.layers) if row.layers else [None]
        found += [row.hook if layer is None else row.hook.format(l=layer) for layer in layers]
    assert sorted(found) == sorted(hybrid.hook_dict)
    shown = Reader(hybrid._repr_html_()).text
    assert all(hook in shown for hook in hybrid.hook_table()["hook"])


def test_attached_functions_are_counted(hybrid):
    with hybrid.hooks(fwd_hooks=[(f"blocks.{layer}.mixer.hook_z", lambda z, hook: None) for layer in (0, 2)]):
        table = hybrid.hook_table().set_index("hook")["attached"]
        assert table["blocks.{l}.mixer.hook_z"] == 2 == table.sum()
        assert "functions attached" in Reader(hybrid._repr_html_()).text


def test_a_state_shows_its_layers_and_the_size_of_its_matrices(hybrid):
    _, state = hybrid(tokens_of(hybrid), return_state=True)
    rows = table_of(state._repr_html_())
    assert [row["layer"] for row in rows] == ["0", "1", "2"]
    assert (
        rows[0]["matrix"] == "float64[2, 4, 3, 5]"
        and rows[1]["keys"] == "float64[2, 12, 2, 6]"
        and rows[1]["matrix"] == ""
    )
    matrix = state.layers[2].matrix
    assert float(rows[2]["mean |S|"]) == pytest.approx(matrix.norm(dim=(-2, -1)).mean().item(), rel=1e-3)
    assert rows[1]["mean |S|"] == "" and rows[1]["size"] == size_of(state.layers[1].tensors().values())
    Reader(RecurrentState(())._repr_html_())
    Reader(state.layers[0]._repr_html_())


def test_a_cache_shows_every_activation_with_its_size(hybrid):
    _, cache = hybrid.run_with_cache(tokens_of(hybrid))
    rows = table_of(cache._repr_html_())
    assert sum(len(numbers(row["layers"])) if row["layers"] else 1 for row in rows) == len(cache)
    of = {row["activation"]: row for row in rows}
    z = cache["blocks.2.mixer.hook_z"]
    assert (
        of["blocks.{l}.mixer.hook_z"]["layers"] == "0, 2"
        and of["blocks.{l}.mixer.hook_z"]["holds"] == "float64[2, 12, 4, 5]"
    )
    assert of["blocks.{l}.mixer.hook_z"]["size"] == f"{2 * z.numel() * 8 / 1024:.4g} KiB"
    assert f"activations{len(cache)}" in "".join(Reader(cache._repr_html_()).text.split())


def test_a_cache_tells_what_its_run_was(hybrid):
    _, state = hybrid(tokens_of(hybrid), return_state=True)
    _, cache = hybrid.run_with_cache(tokens_of(hybrid), state=state, positions=[13, 14], heads=[1])
    text = Reader(cache._repr_html_()).text
    assert "position 12" in text and "(13, 14)" in text and "(1,)" in text


@pytest.mark.parametrize(
    ("layers", "shown"), [([], ""), ([3], "3"), ([0, 1, 2], "0–2"), ([0, 2, 3, 7], "0, 2–3, 7"), (range(24), "0–23")]
)
def test_ranges(layers, shown):
    assert ranges(layers) == shown


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 bytes"), (100, "400 bytes"), (256, "1 KiB"), (384 << 10, "1.5 MiB"), (1 << 28, "1 GiB")]
)
def test_sizes(count, shown):
    assert size_of([torch.zeros(1).expand(count)]) == shown
