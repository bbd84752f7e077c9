"""What a sweep gives back: table, heat map, file."""

from dataclasses import replace

import pytest
import torch

from hooked_recurrent.patching import Sweep
from tests.hooked_recurrent.display.reading import Reader, table_of


def sweep_of(**axes):
    shape = [len(along) for along in axes.values()]
    rows = shape[0] if "row" in axes else 1
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return Sweep(
        "clean z in the corrupted run", "z", {name: tuple(along) for name, along in axes.items()}, values,
        baseline=(0.5,) * rows, target=(2.5,) * rows, estimate=values - 0.6, settings={"form": "additive"},
    )  # fmt: skip


def test_effect_and_recovered():
    sweep = sweep_of(layer=[0, 2], position=range(3))
    assert torch.equal(sweep.effect(), sweep.values - 0.5)
    assert torch.equal(sweep.recovered(), (sweep.values - 0.5) / 2.0)
    with pytest.raises(ValueError, match="has no target run"):
        replace(sweep, target=None).recovered()
    with pytest.raises(ValueError, match="the same metric"):
        replace(sweep, target=(0.5,)).recovered()


def test_table():
    sweep = sweep_of(layer=[0, 2], head=[1], position=[4, 7, 8])
    table = sweep.to_dataframe()
    assert list(table.columns) == ["layer", "head", "position", "metric", "effect", "recovered", "estimate"]
    row = table[(table.layer == 2) & (table.position == 7)].iloc[0]
    assert row.metric == sweep.values[1, 0, 1].item() and row.estimate == sweep.estimate[1, 0, 1].item()
    bare = replace(sweep, target=None, estimate=None).to_dataframe()
    assert list(bare.columns) == ["layer", "head", "position", "metric", "effect"]


def test_mean_over_rows():
    sweep = replace(sweep_of(row=[0, 1], layer=[0], position=range(3)), baseline=(0.0, 1.0), target=(1.0, 3.0))
    assert torch.equal(sweep.effect()[1], sweep.values[1] - 1.0)
    mean = sweep.mean("row")
    assert torch.equal(mean.values, sweep.values.mean(0)) and mean.baseline == (0.5,) and mean.target == (2.0,)
    with pytest.raises(ValueError, match="there is no axis 'row'; the axes are layer, position"):
        mean.mean("row")


@pytest.mark.parametrize("axes", [{"layer": [0, 2]}, {"layer": [0, 2], "position": [1, 3]}, None])
def test_heat_map_shows_the_numbers(axes):
    sweep = sweep_of(**(axes or {"layer": [0, 2], "head": range(4), "position": range(5)}))
    labels = ["a", "$b$", "c\n", "d", "e"]
    for what in ("effect", "recovered", "metric", "estimate"):
        figure = sweep.figure(what, labels)
        shown = [image.get_array() for axes in figure.axes for image in axes.get_images()]
        expected = {"effect": sweep.effect(), "recovered": sweep.recovered(), "metric": sweep.values}
        numbers = expected.get(what, sweep.estimate)
        assert torch.equal(torch.stack([torch.tensor(panel) for panel in shown]).flatten(), numbers.flatten())
    if "position" in sweep.axes:
        *others, lowest = [axes for axes in figure.axes if axes.get_images()]
        assert not any(panel.get_xticklabels() for panel in others)
        ticks = [label.get_text() for label in lowest.get_xticklabels()]
        assert ticks == [f"{place} {labels[place]!r}" for place in sweep.axes["position"]]
    figure.canvas.draw()
    with pytest.raises(ValueError, match="there is no 'effects' to draw"):
        sweep.figure("effects")


def test_rows_are_drawn_as_their_mean():
    sweep = sweep_of(row=[0, 1], layer=[0, 1], position=range(3))
    (image,) = sweep.figure("metric").axes[0].get_images()
    assert torch.equal(torch.tensor(image.get_array()), sweep.values.mean(0))


def test_files_come_back_bit_for_bit(tmp_path):
    sweep = sweep_of(layer=[0, 2], head=[1], position=[4, 7, 8])
    back = Sweep.load(sweep.save(tmp_path / "sweep.json"))
    assert torch.equal(back.values, sweep.values) and torch.equal(back.estimate, sweep.estimate)
    assert replace(back, values=sweep.values, estimate=sweep.estimate) == sweep
    text = (tmp_path / "sweep.json").read_text()
    for broken, words in (
        (text[:-30], "is no whole JSON file"),
        ('{"format": "other"}', "is no saved sweep"),
        ("[]", "is no"),
    ):
        (tmp_path / "broken.json").write_text(broken)
        with pytest.raises(ValueError, match=words):
            Sweep.load(tmp_path / "broken.json")


def test_a_notebook_shows_the_largest_effects():
    sweep = sweep_of(layer=[0, 2], head=[1], position=range(9))
    rows = table_of(sweep._repr_html_())
    effects = sweep.effect().flatten()
    order = effects.abs().sort(descending=True).indices[:10]
    assert [float(row["effect"]) for row in rows] == pytest.approx(effects[order].tolist(), rel=1e-3)
    places = [(int(row["layer"]), int(row["position"])) for row in rows]
    assert places == [([0, 2][int(place) // 9], int(place) % 9) for place in order]
    text = Reader(sweep._repr_html_()).text
    assert "clean z in the corrupted run" in text and "layer 2, head 1, position 9" in text and "(2.5,)" in text
