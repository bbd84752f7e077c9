"""Which way every effect should point, and whether it does, read off the rows of the results."""

from dataclasses import dataclass

from writesae.reproduce.rows import Row, Summaries
from writesae.reproduce.table import ROWS


@dataclass(frozen=True)
class Claim:
    """One effect and its direction."""

    step: str
    """The step that measured it."""
    text: str
    """What should hold, in words."""
    measured: str
    """What was measured, in words."""
    holds: bool
    """Whether the estimate points the right way."""
    certain: bool
    """Whether the whole 95% interval does; False where there is none."""


def claims_of(summaries: Summaries) -> list[Claim]:
    """The claims of all steps that were run, in the order of the results."""
    return [claim for row in ROWS if (claim := _claim(row, summaries)) is not None]


def _claim(row: Row, summaries: Summaries) -> Claim | None:
    if row.above is None and row.below is None:
        return None
    if row.step not in summaries:
        return None
    if row.where.get("run") not in (None, *(line.get("run") for line in summaries[row.step])):
        return None  # a part of the step that this run, being quick, leaves out
    found = row.find(summaries)
    if found is None:  # a summary that lost its row must not pass for one that agrees
        return Claim(row.step, row.label, "no such row", False, False)
    limits, words = [], []
    if row.above is not None:
        words.append(f"above {row.above:g}")
        limits.append((found.value > row.above, found.low is not None and found.low > row.above))
    if row.below is not None:
        words.append(f"below {row.below:g}")
        limits.append((found.value < row.below, found.high is not None and found.high < row.below))
    text = f"{row.label}: {' and '.join(words)}"
    return Claim(row.step, text, row.written(found), all(h for h, _ in limits), all(c for _, c in limits))
