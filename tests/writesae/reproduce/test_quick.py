"""The whole reproduction, small, on a bundled model: every step runs, and every effect points the way it should."""

import subprocess
import sys

from writesae.reproduce.page import page
from writesae.reproduce.run import read
from writesae.reproduce.steps import STEPS
from writesae.reproduce.table import ROWS


def test_quick_reproduction_of_the_bundled_gated_deltanet(tmp_path):
    out = tmp_path / "runs" / "quick"
    # as a user runs it: in a process of its own, without the checks of every shape that these tests run under
    command = [sys.executable, "-m", "writesae.cli", "reproduce", "--model", "tiny-gated-deltanet", "--quick"]
    result = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    outcome = read(out)
    wrong = [(claim.text, claim.measured) for claim in outcome.claims if not claim.holds]
    assert wrong == [] and result.returncode == 0, result.stdout + result.stderr
    assert set(outcome.summaries) == set(STEPS)
    claimed = {claim.step for claim in outcome.claims}
    assert claimed == {row.step for row in ROWS if row.above is not None or row.below is not None}
    floors = [row for rows in outcome.summaries.values() for row in rows if row.get("floor_max") is not None]
    assert floors and max(row["floor_max"] for row in floors) < 1e-6  # nats or bits; single precision
    assert "| firings |" in page(out.parent)
