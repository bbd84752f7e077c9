"""docs/results.md: the paper's figures beside those of the runs in a folder.

    python -m writesae.reproduce.page results > docs/results.md

Words stand in templates/results.md; every number comes from a run, and the paper's from `table.py`.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from writesae.reproduce.claims import Claim
from writesae.reproduce.run import read
from writesae.reproduce.table import ROWS


@dataclass(frozen=True)
class Run:
    """One model's run, as the page needs it."""

    name: str
    """The model."""
    rule: str
    """Its rule, by which the paper's figures are found."""
    cell: str
    """The cell that was looked at, in words."""
    about: dict[str, Any]
    """The run's reproduce.json."""
    summaries: dict[str, list[dict[str, Any]]]
    """By step, the rows of its summary."""
    claims: list[Claim]
    """Which way its effects point."""
    seconds: dict[str, float]
    """By step, how long it took."""


def runs_in(folder: str | Path) -> list[Run]:
    """The runs in the subfolders of a folder, by name.

    Raises:
        ValueError: there is none, or one is not whole.
    """
    found = []
    for file in sorted(Path(folder).glob("*/reproduce.json")):
        outcome, about = read(file.parent), json.loads(file.read_text(encoding="utf-8"))
        name = Path(about["config"]["model"]).name
        cell = _cell(file.parent, outcome.summaries)
        found.append(Run(name, about["rule"], cell, about, outcome.summaries, outcome.claims, outcome.seconds))
    if not found:
        raise ValueError(f"no run in {folder}: writesae reproduce makes one")
    return found


def _cell(folder: Path, steps: Iterable[str]) -> str:
    """Layer and head of the first step whose result is of a single cell."""
    for step in steps:
        for result in json.loads((folder / f"{step}.json").read_text(encoding="utf-8"))["results"].values():
            if result["layer"] >= 0 and result["head"] >= 0:
                return f"layer {result['layer']}, head {result['head']}"
    return "-"


def table(runs: list[Run], step: str) -> str:
    """The rows of a step as a Markdown table: per model ours, and where the paper has a figure for its rule, the paper's."""
    rows = [row for row in ROWS if row.step == step]
    with_paper = [run for run in runs if any(run.rule in row.paper for row in rows)]
    heading, columns = [""], []
    for run in runs:
        heading.append(run.name)
        columns.append(("ours", run))
        if run in with_paper:
            heading.append(f"paper, {run.rule.replace('_', ' ')}")
            columns.append(("paper", run))
    lines = [f"| {' | '.join(heading)} |", f"|---|{'--:|' * len(columns)}"]
    for row in rows:
        cells = [
            row.written(row.find(run.summaries)) if which == "ours" else row.paper.get(run.rule, "")
            for which, run in columns
        ]
        lines.append(f"| {row.label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def say(runs: list[Run], step: str, label: str) -> str:
    """One row in words, all models one after the other: "91.0% (tiny-a), 80.0% (tiny-b)", without intervals.

    Raises `KeyError` for a row that does not exist: prose must not lose its numbers.
    """
    rows = [row for row in ROWS if (row.step, row.label) == (step, label)]
    if not rows:
        raise KeyError(f"no row {label!r} in step {step!r}")
    found = [(rows[0].find(run.summaries), run.name) for run in runs]
    return ", ".join(
        f"{rows[0].written(None if one is None else replace(one, low=None))} ({name})" for one, name in found
    )


def page(folder: str | Path) -> str:
    """The whole page."""
    runs = runs_in(folder)
    environment = Environment(
        loader=PackageLoader("writesae.reproduce"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("results.md")
    made = {"table": lambda step: table(runs, step), "say": lambda step, label: say(runs, step, label)}
    return template.render(runs=runs, **made).rstrip() + "\n"


if __name__ == "__main__":
    print(page(sys.argv[1] if len(sys.argv) > 1 else "results"), end="")
