"""What dictionaries and codes show: counts and places against the numbers themselves."""

import numpy as np
import pytest
import torch

from tests.hooked_recurrent.display.reading import Reader, table_of
from tests.writesae.sae.test_write_sae import sae_of, writes
from writesae import Codes, Factored, WriteSAE, WriteSAEConfig, atoms_html
from writesae.sae.plots import activation_histogram, firing_rates, training_curves

PROVENANCE = {
    "model": "<b>tiny",
    "hook": "blocks.1.mixer.hook_write",
    "head": 2,
    "form": "net",
    "training": {"steps": 50, "dead_after": 7},
    "metrics": {"train": {"fvu": 0.25, "l0": 5.0}, "heldout": {"fvu": 0.5, "loss_recovered": 0.75}},
}
CODES = Codes(torch.tensor([[3, 1], [1, 0], [5, 3]]), torch.tensor([[2.0, 0.5], [4.0, 0.0], [0.25, 1.5]]))
WORDS = ["<b>", " x", "\n"]


@pytest.fixture
def trained():
    sae = sae_of()
    sae.provenance = PROVENANCE
    sae.steps_since_active[:4] = torch.tensor([6, 7, 8, 100])
    return sae


def test_a_line_for_a_terminal(trained):
    assert repr(trained) == (
        "WriteSAE(24 atoms, 21 alive, rank 1, 8 x 6; bilinear encoder, outer_product decoder, topk, k 5; "
        "blocks.1.mixer.hook_write, head 2 (net) of <b>tiny)"
    )
    assert repr(sae_of(rank=2)) == (
        "WriteSAE(24 atoms, rank 2, 8 x 6; bilinear encoder, outer_product decoder, topk, k 5)"
    )


def test_a_card_for_a_notebook(trained):
    markup = trained._repr_html_()
    text = Reader(markup).text
    for shown in (
        "8 x 6, rank 1",
        "topk, k 5",
        "21 fired in the last 7 steps",
        "hook_write, head 2 (net) of <b>tiny",
    ):
        assert shown in text
    assert table_of(markup) == [
        {"measure": "fvu", "train": "0.25", "heldout": "0.5"},
        {"measure": "l0", "train": "5", "heldout": ""},
        {"measure": "loss_recovered", "train": "", "heldout": "0.75"},
    ]
    weights = sum(parameter.numel() for parameter in trained.parameters())
    assert f"{weights:,} float64" in text and "how it was trained" in text


def test_a_dictionary_without_a_past_claims_none():
    text = Reader(sae_of()._repr_html_()).text
    assert "alive" not in text and "trained" not in text
    dense = WriteSAE(WriteSAEConfig(d_k=3, d_v=4, n_atoms=6, k=2, encoder="linear", decoder="dense"))
    assert "rank" not in Reader(dense._repr_html_()).text


def test_an_atom_as_a_picture_with_its_factors():
    sae = sae_of()
    arrays = [image.get_array() for axes in sae.figure(3).axes for image in axes.images]
    assert np.allclose(arrays[0], sae.atom(3).AB.detach()) and np.allclose(
        arrays[1][:, 0], sae.key_atoms[3, 0].detach()
    )
    assert np.allclose(arrays[2][0], sae.value_atoms[3, 0].detach())
    with pytest.raises(IndexError, match="atom 24 is outside"):
        sae.figure(24)


def test_the_coefficients_of_one_atom_and_the_busiest_ones():
    assert CODES.of(1).tolist() == [0.5, 4.0, 0.0] and CODES.of(0).tolist() == [0.0] * 3
    assert CODES.busiest(2) == [1, 3] and CODES.busiest(9) == [1, 3, 5]
    sae, (key, value) = sae_of(), writes(30)
    codes = sae.encode(key.view(5, 6, 8), value.view(5, 6, 6))
    assert torch.equal(codes.of(4), codes.dense(24)[..., 4])
    assert codes.busiest(24)[0] == int(codes.dense(24).sum((0, 1)).argmax())
    assert torch.equal(codes[2].values, codes.values[2]) and torch.equal(codes[2, 1:3].indices, codes.indices[2, 1:3])
    with pytest.raises(IndexError, match="the last axis is that of k"):
        codes[1, 2, 0]


def test_a_text_shaded_by_atoms():
    view = atoms_html(WORDS, CODES, mark=1)
    assert [row.name for row in view.rows] == ["atom 1", "atom 3", "atom 5"]
    assert view.rows[1].values.tolist() == [2.0, 0.0, 1.5] and "<b>" in Reader(str(view)).text
    assert [row.name for row in atoms_html(WORDS, CODES, [0]).rows] == ["atom 0"]
    with pytest.raises(ValueError, match=r"the codes of one text \[pos, k\], got \(1, 3, 2\)"):
        atoms_html(WORDS, CODES.reshape(torch.Size([1, 3])))
    with pytest.raises(ValueError, match="no atom fires in this text"):
        atoms_html(WORDS, Codes(CODES.indices, torch.zeros(3, 2)))


def test_a_histogram_holds_every_firing():
    axes = activation_histogram(CODES, 3, bins=4).axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 2
    assert axes.get_title() == "atom 3 fires at 2 of 3 tokens (66.667%)"
    with pytest.raises(ValueError, match="atom 0 fires at none of these 3 tokens"):
        activation_histogram(CODES, 0)


def test_rates_from_the_busiest_down():
    axes = firing_rates(CODES, 8).axes[0]
    assert axes.lines[0].get_ydata() == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    assert axes.get_title() == "3 of 8 atoms fire" and axes.get_yscale() == "log"
    firing_rates(Codes(CODES.indices, torch.zeros(3, 2)), 8).canvas.draw()


def test_training_curves_show_the_log():
    log = [{"step": 10, "fvu": 0.5, "l0": 4.0, "dead": 3}, {"step": 20, "fvu": 0.25, "l0": 4.0, "dead": 0}]
    figure = training_curves(log)
    assert [axes.get_ylabel() for axes in figure.axes] == ["unexplained variance", "active atoms", "dead atoms"]
    assert [list(axes.lines[0].get_ydata()) for axes in figure.axes] == [[0.5, 0.25], [4, 4], [3, 0]]
    assert list(figure.axes[0].lines[0].get_xdata()) == [10, 20]
    with pytest.raises(ValueError, match="the log has no lines"):
        training_curves([])


def test_samples_and_losses_are_one_line():
    key, value = writes(10)
    assert repr(Factored(key, value)) == "Factored(10 matrices 8 x 6, float64 on cpu)"
    shown = repr(sae_of().loss(key, value))
    assert "\n" not in shown and "tensor(" not in shown and len(shown) < 400
    assert repr(CODES) == "Codes(indices=int64[3, 2], values=float32[3, 2])"
