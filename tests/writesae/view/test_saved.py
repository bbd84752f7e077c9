"""A page that was written is read back as it was."""

import json
from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import torch

from tests.writesae.view.pages import small
from writesae.browser import render, write_page
from writesae.browser.page import packed
from writesae.view.live import live_page
from writesae.view.requests import BOUNDS
from writesae.view.saved import BLOCK, check_page, read_page
from writesae.view.session import session


@pytest.fixture(scope="module")
def made():
    return small()[:2]


@pytest.fixture(scope="module")
def page(made, tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("page") / "atoms.html", made[1])


def test_a_page_is_read_back(made, page):
    study, data = made
    again = read_page(page)
    check_page(again, study.sae, page)
    assert (again.about, again.words, again.files) == (json.loads(json.dumps(data.about)), data.words, data.files)
    pd.testing.assert_frame_equal(again.atoms, data.atoms[again.atoms.columns], check_dtype=False, rtol=1e-6)
    for name in ("word_ids", "key", "value", "leading", "histogram"):
        one, other = getattr(again, name), getattr(data, name)
        assert np.abs(one - other).max() <= 4e-5 * np.abs(other).max()
    for name in ("first", "random", "passage", "position", "at", "word"):
        assert np.array_equal(getattr(again.contexts, name), getattr(data.contexts, name))
    for name in ("promoted", "suppressed", "fires_on", "neighbours"):
        assert np.array_equal(getattr(again, name).index, getattr(data, name).index)
        assert np.allclose(getattr(again, name).number, getattr(data, name).number, rtol=1e-6)
    assert json.dumps(packed(again)["table"]) == json.dumps(packed(data)["table"])
    assert BLOCK.findall(render(again))[0] == BLOCK.findall(render(data))[0]


def test_errors(made, page, tmp_path):
    study, data = made
    text = page.read_text(encoding="utf-8")
    wrong = tmp_path / "wrong.html"
    for broken in (
        "<p>hello",
        text.replace('id="data-shapes"', 'id="data-other"'),
        text.replace('"u1"', '"O8"'),
        text.replace('"kinds":["register"', '"kinds":["other"'),
        text.replace('"shape":[24', '"shape":[25'),
        text.replace(
            '<script type="application/json" id="data-table">{', '<script type="application/json" id="data-table">['
        ),
    ):
        assert broken != text
        wrong.write_text(broken, encoding="utf-8")
        with pytest.raises(ValueError, match="is no page that `writesae report` of this version wrote") as caught:
            read_page(wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(OSError):
        read_page(tmp_path / "none.html")
    again = read_page(page)
    other = deepcopy(study.sae)
    with torch.no_grad():
        other.key_atoms[3] *= -1.0
        check_page(again, other, page)  # the sign of a side says nothing
        other.key_atoms[3] = other.key_atoms[4].clone()
    with pytest.raises(ValueError, match="shows the atoms of another dictionary"):
        check_page(again, other, page)
    other.config = type(other.config)(**{**other.config.to_dict(), "n_atoms": 25, "matryoshka": ()})
    with pytest.raises(ValueError, match="the page shows 24 atoms, but the dictionary has 25"):
        live_page(session(study.model, other), data, BOUNDS)
