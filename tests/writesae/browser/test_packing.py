"""Arrays come back as they were, in few bytes, and nothing in a block of data can end it."""

import base64
import json

import numpy as np
import pytest

from tests.writesae.browser.pages_for_tests import HOSTILE
from writesae.browser.packing import embedded, pack, pack_quantised


def unpack(packed):
    values = np.frombuffer(base64.b64decode(packed["data"]), f"<{packed['type']}").reshape(packed["shape"])
    return values * unpack(packed["scale"])[:, None].astype(float) if "scale" in packed else values


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0, 255], "u1"),
        ([0, 256], "u2"),
        ([65536], "u4"),
        ([-1, 127], "i1"),
        ([-1, 128], "i2"),
        ([-40000], "i4"),
        ([], "u1"),
        ([True, False], "u1"),
    ],
)
def test_whole_numbers_take_the_narrowest_type_that_holds_them(values, kind):
    array = np.array(values, dtype=bool if values and values[0] is True else np.int64)
    packed = pack(array)
    assert packed["type"] == kind and np.array_equal(unpack(packed), array)


def test_numbers_too_large_are_refused():
    with pytest.raises(ValueError, match="do not fit into 32 bits"):
        pack(np.array([2**33]))


def test_floats_keep_what_is_not_finite():
    back = unpack(pack(np.array([0.5, np.nan, -np.inf])))
    assert back[0] == 0.5 and np.isnan(back[1]) and back[2] == -np.inf


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_quantised_rows_are_within_half_a_step_of_their_own_size(low):
    array = np.random.default_rng(0).uniform(low, 1, (20, 30)) * 10.0 ** np.arange(-10, 10)[:, None]
    array[3] = 0
    packed, steps = pack_quantised(array), 65535 if low == 0 else 32767
    assert packed["type"] == ("u2" if low == 0 else "i2")
    assert (np.abs(unpack(packed) - array) <= 0.51 * np.abs(array).max(1, keepdims=True) / steps).all()


def test_no_text_can_end_the_block_that_holds_it():
    block = embedded({"text": HOSTILE})
    assert "<" not in block and block.isascii() and json.loads(block)["text"] == HOSTILE
