"""Pictures hold the numbers that they were given."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from transformer_lens import FactoredMatrix

from hooked_recurrent.display import matrix_map
from hooked_recurrent.display.figures import label
from hooked_recurrent.memory import changes, effective_attention, half_life, plots, retention, spectrum
from tests.hooked_recurrent.memory.runs import HEADS, LAYER, cache_of
from tests.hooked_recurrent.models import tiny_model, tokens_of

MATRIX = torch.arange(15.0).view(3, 5) - 4
TOKENS = ["$x$", "a\n", "\u202e", " if", "$", "\x00", "_", "^", "é"]


def images(figure):
    """What is drawn, in the order of drawing."""
    assert isinstance(figure, Figure)
    figure.canvas.draw()
    return [image.get_array() for axes in figure.axes for image in axes.images if image.get_array().size]


def test_a_matrix_as_it_is_with_zero_in_the_middle():
    figure = matrix_map(MATRIX.clone().requires_grad_(), title="$x")
    assert np.array_equal(images(figure)[0], MATRIX.numpy())
    image = figure.axes[0].images[0]
    assert (image.norm.vmin, image.norm.vmax) == (-10, 10) and figure.axes[0].get_title() == "$x"


def test_one_of_a_batch():
    assert np.array_equal(images(matrix_map(torch.stack([MATRIX, -MATRIX]), row=-1))[0], -MATRIX.numpy())


def test_the_factors_of_a_product_stand_beside_it():
    key, value = torch.tensor([1.0, -2.0, 0.0]), torch.arange(5.0)
    whole, left, foot = images(matrix_map(FactoredMatrix(key[:, None], value[None])))[:3]
    assert np.array_equal(whole, torch.outer(key, value).numpy())
    assert np.array_equal(left[:, 0], key.numpy()) and np.array_equal(foot[0], value.numpy())
    two = FactoredMatrix(torch.randn(3, 2), torch.randn(2, 5))
    assert len([axes for axes in matrix_map(two).axes if axes.images]) == 1  # which factors would it show?


@pytest.mark.parametrize(
    ("matrix", "more", "error", "words"),
    [
        (torch.zeros(2, 2, 3, 5), {}, ValueError, r"expected a matrix .* got \(2, 2, 3, 5\)"),
        ([[1.0]], {}, ValueError, "got list"),
        (torch.zeros(2, 3, 5), {"row": 2}, IndexError, "row 2 is out of range: there are 2"),
        (MATRIX, {"key": torch.zeros(5)}, ValueError, r"the key beside .* must have 3 numbers, got \(5,\)"),
        (MATRIX, {"value": torch.zeros(3)}, ValueError, "the value beside"),
    ],
)
def test_what_is_no_matrix_is_refused(as_users_run, matrix, more, error, words):
    with pytest.raises(error, match=words):
        matrix_map(matrix, **more)


def test_labels_show_what_cannot_be_seen():
    assert label("a\n\t\x00\u202e$") == "a\\n\\t␀U+202E$"


def test_states_and_writes_of_a_run():
    model = tiny_model(seed=1).requires_grad_(False)
    (_, state), cache = model.run_with_cache(tokens_of(model), return_state=True)
    assert np.array_equal(images(state.figure(1, 2, row=1))[0], state.layers[1].matrix[1, 2].numpy())
    assert np.array_equal(images(plots.state_map(cache, 1, 2, 5))[0], cache.state(1, 2, 5)[0].numpy())
    whole, key, value = images(plots.write_map(cache, 0, 3, -1, row=1))[:3]
    assert np.array_equal(whole, cache.write(0, 3, -1)[1].AB.numpy())
    assert np.array_equal(key[:, 0], cache["blocks.0.mixer.hook_write_key"][1, -1, 3].numpy())
    assert plots.write_map(cache, 0, 3, -1).axes[0].get_title() == "layer 0, head 3: the write at 11"


def test_states_without_a_matrix_or_a_place_are_refused():
    model = tiny_model(("gated_delta_net", "attention"), seed=1)
    _, state = model(tokens_of(model), return_state=True)
    with pytest.raises(ValueError, match="no matrix memory to draw"):
        state.figure(1, 0)
    with pytest.raises(IndexError, match="layer 2 is out of range"):
        state.figure(2, 0)
    with pytest.raises(IndexError, match="head 4 is out of range"):
        state.figure(0, 4)


@pytest.mark.parametrize("rule", ["gated_delta_net", "rwkv7"])  # one decay per head, and one per key channel
def test_lines_over_tokens(rule):
    cache = cache_of(rule)
    lives, found = half_life(cache, LAYER), changes(cache, LAYER)
    left = lives.log_decay.exp() if lives.log_decay.ndim == 3 else lives.log_decay.exp().mean(-1)
    for figure, numbers in (
        (plots.decay_over_time(lives, row=1, tokens=TOKENS), left),
        (found.figure(row=1, tokens=TOKENS), found.squared_size().sqrt()),
    ):
        images(figure)
        lines = [line.get_ydata() for line in figure.axes[0].lines]
        assert len(lines) == HEADS and all(np.array_equal(lines[h], numbers[1, :, h].numpy()) for h in range(HEADS))
        assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == [label(token) for token in TOKENS]


def test_every_result_draws_itself_its_first_head_by_default():
    cache = cache_of("gated_delta_net")
    attention = effective_attention(cache, LAYER, [2, 3])
    assert np.array_equal(images(attention.figure())[0], attention.coefficient[0, 0].numpy())
    assert np.array_equal(images(attention.figure(3, tokens=TOKENS))[0], attention.coefficient[0, 1].numpy())
    kept = retention(cache, LAYER, [1], positions=[2])
    assert np.array_equal(kept.figure().axes[0].lines[0].get_ydata(), kept.remaining[0, 0, 2:, 0].numpy())
    found = spectrum(cache, LAYER, [1])
    assert np.array_equal(found.figure().axes[0].lines[0].get_ydata(), found.singular_values[0, 0, :, 0].numpy())
    lives = half_life(cache, 0)
    assert len(lives.figure(half_life(cache, LAYER)).axes[0].get_yticklabels()) == 2 * HEADS
    for result in (attention, kept, found):
        with pytest.raises(IndexError, match="head 0 is not in this result"):
            result.figure(0)
