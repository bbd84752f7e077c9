"""The pictures show the numbers, take any token as a label, and leave pyplot alone."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from hooked_recurrent import WriteEdit
from hooked_recurrent.memory import HalfLives, effective_attention, half_life, plots, retention, spectrum
from tests.hooked_recurrent.memory.runs import LAYER, cache_of, vectors
from tests.hooked_recurrent.models import RULES

TOKENS = ["$x$", "a\n", "\t", " if", "$", "\\frac{", "_", "^", "é"]
SHOWN = ["$x$", "a\\n", "\\t", " if", "$", "\\frac{", "_", "^", "é"]


def drawn(figure):
    """The figure, once everything in it has been drawn."""
    assert isinstance(figure, Figure)
    figure.canvas.draw()
    return figure


@pytest.mark.parametrize("rule", RULES)
def test_every_picture_of_every_rule(rule):
    cache = cache_of(rule)
    pictures = [
        plots.attention_map(effective_attention(cache, LAYER), 1, tokens=TOKENS),
        plots.attention_map(effective_attention(cache, LAYER), 1, contributions=True),
        plots.retention_curves(retention(cache, LAYER, positions=[0, 4, -1]), 2, tokens=TOKENS),
        plots.spectrum_over_time(spectrum(cache, LAYER), 3, row=1, tokens=TOKENS),
        plots.half_life_strip(half_life(cache, 0), half_life(cache, LAYER, [2])),
    ]
    for figure in pictures:
        drawn(figure)


def test_the_map_shows_the_coefficients_and_the_tokens_as_they_are():
    result = effective_attention(cache_of("gated_delta_net"), LAYER, [2, 3])
    axes = drawn(plots.attention_map(result, 3, row=1, tokens=TOKENS)).axes[0]
    image = axes.images[0]
    assert np.array_equal(image.get_array(), result.coefficient[1, 1].numpy())
    assert -image.norm.vmin == image.norm.vmax == result.coefficient[1, 1].abs().max()  # zero is the middle: white
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == SHOWN
        assert not any(label.get_parse_math() for label in labels)
    lengths = plots.attention_map(result, 3, row=1, contributions=True).axes[0].images[0]
    assert np.array_equal(lengths.get_array(), result.contribution_norm()[1, 1].numpy()) and lengths.norm.vmin == 0


def test_the_map_takes_one_of_several_write_terms():
    result = effective_attention(cache_of("mamba2", edits=[WriteEdit(LAYER, 1, 4, "add", **vectors(2))]), LAYER)
    image = plots.attention_map(result, 1, term=1).axes[0].images[0]
    assert np.array_equal(image.get_array(), result.coefficient[0, 1, :, :, 1].numpy())
    with pytest.raises(IndexError, match="write term 2 is out of range: there are 2"):
        plots.attention_map(result, 1, term=2)


def test_a_long_text_has_labels_that_can_be_read():
    result = effective_attention(cache_of("mamba2", length=100), LAYER)
    axes = plots.attention_map(result, 0, tokens=[str(i) for i in range(100)]).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == [str(i) for i in range(0, 100, 3)]


def test_curves_start_at_their_writes():
    result = retention(cache_of("rwkv7"), LAYER, positions=[5, 2])
    above, below = drawn(plots.retention_curves(result, 0, tokens=TOKENS)).axes
    for axes, values in ((above, result.remaining), (below, result.cosine)):
        for column, (line, position) in enumerate(zip(axes.lines, (5, 2), strict=True)):
            assert np.array_equal(line.get_xdata(), np.arange(9 - position))
            assert np.array_equal(line.get_ydata(), values[0, 0, position:, column].numpy())
    assert [text.get_text() for text in above.get_legend().get_texts()] == ["5 \\frac{", "2 \\t"]


def test_the_spectrum_is_drawn_in_the_order_of_positions():
    result = spectrum(cache_of("mamba2"), LAYER, positions=[6, 1, 3])
    above, below = drawn(plots.spectrum_over_time(result, 2, tokens=TOKENS)).axes
    for rank, line in enumerate(above.lines):
        assert line.get_xdata().tolist() == [1, 3, 6]
        assert np.array_equal(line.get_ydata(), result.singular_values[0, 2, [1, 2, 0], rank].numpy())
    assert np.array_equal(below.lines[0].get_ydata(), result.effective_rank()[0, 2, [1, 2, 0]].numpy())
    assert np.array_equal(below.lines[2].get_ydata(), result.stable_rank()[0, 2, [1, 2, 0]].numpy())
    assert [label.get_text() for label in below.get_xticklabels()] == [SHOWN[1], SHOWN[3], SHOWN[6]]


@pytest.mark.filterwarnings("error")
def test_heads_that_never_decay_are_named():
    rates = torch.tensor([[[-0.1, 0.0], [-0.2, 0.0]]])
    axes = drawn(plots.half_life_strip(HalfLives(3, (0, 5), rates))).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["layer 3, head 0", "layer 3, head 5, no decay"]
    medians = [line.get_xdata()[0] for line in axes.lines[::2]]
    assert medians[0] == pytest.approx(np.log(2) / 0.15) and np.isnan(medians[1])
    drawn(plots.half_life_strip(HalfLives(None, (0,), torch.zeros(1, 3, 1))))
    with pytest.raises(ValueError, match="at least one result of half_life"):
        plots.half_life_strip()


def test_bad_heads_rows_and_labels():
    result = effective_attention(cache_of("mamba2"), LAYER, [1, 2])
    with pytest.raises(IndexError, match=r"head 0 is not in this result, which holds \(1, 2\)"):
        plots.attention_map(result, 0)
    with pytest.raises(IndexError, match="batch row 2 is out of range: there are 2"):
        plots.attention_map(result, 1, row=2)
    with pytest.raises(ValueError, match="got 3 labels, expected 9"):
        plots.attention_map(result, 1, tokens=["a", "b", "c"])
    with pytest.raises(ValueError, match="got 3 labels, expected more than 5"):
        plots.spectrum_over_time(spectrum(cache_of("mamba2"), LAYER, positions=5), 0, tokens=["a", "b", "c"])


def test_pyplot_is_never_touched():
    code = "import sys, hooked_recurrent.memory.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
