"""Bad input to every public function, as a new user gives it: one sentence that says what came, what was expected, what to do.

The rows are in `tests/bad_input/`. They are evaluated in a process of their own, all in one, because there the shape checks are
off which the tests turn on for this one: a user meets our own messages.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad_input import dictionaries, recurrent

HERE = Path(__file__).parent
ROWS = [*recurrent.ROWS, *dictionaries.ROWS]
MOST = 420
"""Characters of the longest message: two sentences, with a list of names in one of them."""


def evaluated(expressions):
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(HERE / "bad_input" / "world.py")],
        input=json.dumps(expressions),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def outcomes():
    """What every row came to, by its expression."""
    expressions = [row[0] for row in ROWS]
    return dict(zip(expressions, evaluated(expressions), strict=True))


def complaints(outcome, kinds, fragments):
    """What is wrong with an outcome, in words."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    message = outcome["message"]
    if not any(kind.__name__ in outcome["classes"] for kind in kinds):
        yield f"{(outcome['classes'] or ['nothing'])[0]} instead of {kinds}"
    yield from (f"lacks {fragment!r}" for fragment in fragments if fragment not in message)
    if "Traceback" in message or "\n" in message:
        yield "is no single line"
    if len(message) > MOST or len(re.findall(r"[.;!?] [A-Z]", message)) > 1:
        yield "is more than two sentences"


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_bad_input_is_said_in_a_sentence(row, outcomes):
    expression, kinds, *fragments = row
    outcome = outcomes[expression]
    assert list(complaints(outcome, kinds, fragments)) == [], outcome


def test_no_row_is_there_twice():
    assert len({row[0] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(
    ("outcome", "complaint"),
    [
        ({"classes": [], "message": "no error, but Tensor"}, "nothing instead of"),
        ({"classes": ["KeyError", "Exception"], "message": "7 of 4"}, "KeyError instead of"),
        ({"classes": ["ValueError"], "message": "7"}, "lacks 'of 4'"),
        ({"classes": ["ValueError"], "message": "7 of 4\nTraceback"}, "no single line"),
        ({"classes": ["ValueError"], "message": "7 of 4. One more. And more"}, "two sentences"),
    ],
)
def test_a_message_that_falls_short_is_noticed(outcome, complaint):
    assert any(complaint in word for word in complaints(outcome, ValueError, ["7", "of 4"]))
