"""The benchmark of imports runs its sides in processes of their own and divides by the right one."""

import pytest
from import_time import BASE, SIDES, import_times, run


def test_a_row_per_side_over_the_base():
    rows = import_times({"nothing": "pass", "sleep": "import time; time.sleep(0.4)"}, "nothing", repeats=1)
    assert [row["import"] for row in rows] == ["nothing", "sleep"]
    assert rows[0]["median / nothing"] == 1.0 and rows[1]["quickest"] > 0.4
    assert rows[1]["median / nothing"] == rows[1]["median"] / rows[0]["median"]


def test_a_side_that_fails_says_why():
    with pytest.raises(RuntimeError, match="No module named 'not_there'"):
        run("import not_there")


def test_the_sides_hold_the_base():
    assert SIDES[BASE] == "import torch, transformer_lens" and "import hooked_recurrent" in SIDES.values()
