"""Figures say what their numbers say, stay small, and bring nothing but themselves."""

import base64
import re
import xml.etree.ElementTree as ElementTree
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from writesae.report import figures
from writesae.report.svg import ROLES, power_of_ten

RNG = np.random.default_rng(0)
WINS = pd.DataFrame({"atom": [3, 1, 2], "wins": [1, 9, 5], "total": [10, 10, 10]})
LOG = pd.DataFrame({"step": [0, 10, 20], "fvu": [0.9, 0.3, 0.2], "dead": [500, 10, 0]})
HALF_LIVES = pd.DataFrame({"layer": [0, 0, 2], "head": [0, 1, 0], "median": [0.4, 300.0, np.inf]})
QUARTILES = HALF_LIVES.assign(lower_quartile=[0.0, 200.0, 1e5], upper_quartile=[2.0, np.inf, np.inf])
DRAWINGS = {
    "scatter": lambda: figures.kl_scatter(np.array([1e-3, 0.0, 1e-2]), np.array([1e-2, 1e-4, 0.0]), np.full(3, 1e-6)),
    "ratios": lambda: figures.ratio_density({"deletion": 10 ** RNG.normal(size=50), "random": np.ones(5)}),
    "wins": lambda: figures.win_rates(WINS),
    "conditions": lambda: figures.condition_strip({"a": RNG.random(9), "b": np.zeros(3)}, {"a": "#010105"}),
    "training": lambda: figures.training_curves(LOG),
    "training, no dead": lambda: figures.training_curves(LOG.drop(columns="dead")),
    "training, one row": lambda: figures.training_curves(LOG.iloc[:1]),
    "half-lives": lambda: figures.half_life_strip(HALF_LIVES, (2, 0)),
    "half-lives with bars": lambda: figures.half_life_strip(QUARTILES),
    "half-lives, all endless": lambda: figures.half_life_strip(HALF_LIVES.iloc[2:]),
    "heat map": lambda: figures.atom_heat_map(np.arange(3.0), np.array([1.0, -1.0]), 'an "atom" <1>'),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", DRAWINGS)
def test_every_figure_is_one_clean_piece_of_svg(name):
    markup = DRAWINGS[name]()
    root = ElementTree.fromstring(markup)
    assert root.tag == "svg" and root.get("role") == "img" and root.get("aria-label")
    assert re.fullmatch(r"0 0 [\d.]+ [\d.]+", root.get("viewBox"))
    assert "http" not in markup and "<style" not in markup and "xlink" not in markup
    tags = {element.tag for element in root.iter()}
    assert tags <= {"svg", "g", "path", "use", "defs", "clipPath", "rect", "text", "tspan", "image"}
    assert not [role for role in ROLES if role in markup], "every colour role has become a variable"
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', markup))
    assert used <= set(ids), "every reference inside the figure finds its target"


def test_figures_are_the_same_bytes_every_time():
    assert figures.win_rates(WINS) == figures.win_rates(WINS)


def dots(markup: str, colour: str) -> int:
    return len(re.findall(rf"<use [^>]*fill: var\(--{colour},", markup))


def test_scatter_has_a_dot_per_firing_coloured_by_its_winner():
    delete = np.full(40, 1e-2)
    atom = np.where(np.arange(40) < 30, 1e-3, 1e-1)
    atom[0] = 1e-2  # a tie goes to deletion
    markup = figures.kl_scatter(atom, delete)
    in_legend = 1
    assert dots(markup, "atom") == 29 + in_legend
    assert dots(markup, "delete") == 11 + in_legend


def test_large_tables_are_thinned_evenly():
    rows = figures.thinned(100_000)
    assert len(rows) == figures.MOST_POINTS
    assert rows[0] == 0 and rows[-1] == 99_999
    assert np.diff(rows).max() - np.diff(rows).min() <= 1
    assert figures.thinned(5).tolist() == [0, 1, 2, 3, 4]
    assert figures.thinned(1).tolist() == [0]


def test_ratio_density_names_its_medians():
    markup = figures.ratio_density({"deletion": np.array([1.0, 4.0, 16.0]), "random": np.array([8.0, 8.0, 8.0, 8.0])})
    assert "deletion (median ×4)" in markup
    assert "random (median ×8)" in markup


def test_win_rates_stand_best_first():
    labels = re.findall(r">(\d+)</text>", figures.win_rates(WINS))
    assert labels[:3] == ["1", "2", "3"]


def decoded(markup: str) -> list[Image.Image]:
    pieces = re.findall(r"data:image/png;base64,([^\"]+)", markup)
    return [Image.open(BytesIO(base64.b64decode(piece))).convert("RGBA") for piece in pieces]


def test_heat_map_pixels_are_the_outer_product():
    key, value = np.array([1.0, -0.25, 0.0]), np.array([0.5, 2.0])
    outer, key_strip, value_strip = decoded(figures.atom_heat_map(key, value, "x"))
    assert (outer.size, key_strip.size, value_strip.size) == ((2, 3), (1, 3), (2, 1))
    matrix = np.outer(key, value)
    for (row, column), entry in np.ndenumerate(matrix):
        red, _, blue, alpha = outer.getpixel((column, row))
        assert alpha == pytest.approx(255 * np.sqrt(abs(entry) / 2), abs=9)
        if entry:
            assert (red > blue) == (entry > 0)


def test_heat_map_of_higher_rank_sums_its_products_and_draws_no_strips():
    key, value = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    (outer,) = decoded(figures.atom_heat_map(key, value, "x"))
    assert [outer.getpixel((column, 0))[3] for column in range(3)] == [255, 0, 0]
    assert [outer.getpixel((column, 1))[3] for column in range(3)] == [0, 255, 0]


def test_heat_map_refuses_what_is_no_atom():
    with pytest.raises(ValueError, match="rank 2 but value_factor has rank 1"):
        figures.atom_heat_map(np.ones((2, 3)), np.ones(3), "x")
    with pytest.raises(ValueError, match="not finite"):
        figures.atom_heat_map(np.array([np.nan]), np.ones(3), "x")


def test_power_of_ten_labels():
    assert [power_of_ten(value) for value in (1e-3, 1.0, 1e12, 2e-3)] == ["10⁻³", "10⁰", "10¹²", ""]
