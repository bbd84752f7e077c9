"""One row of the results: where its number stands in a summary, what the paper has, and which way it should point."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Summaries = Mapping[str, list[dict[str, Any]]]
"""By step, the rows of its summary, as `run.read` gives them."""

GDN, MAMBA, RWKV = "gated_delta_net", "mamba2", "rwkv7"
"""The rules for which the paper has figures."""

FORMATS = {
    "share": lambda value: f"{value:.1%}",
    "points": lambda value: f"{100 * value:+.1f} points",
    "nats": lambda value: f"{value:.2g} nats",
    "number": lambda value: f"{value:.3g}",
    "count": lambda value: f"{value:,.0f}",
    "r2": lambda value: f"{value:.4f}" if value > 0.99 else f"{value:.3f}",
}
"""How a number is written, by what it is."""


@dataclass(frozen=True)
class Found:
    """A number of a run."""

    value: float
    """The estimate."""
    low: float | None = None
    """Lower end of its 95% interval, where it has one."""
    high: float | None = None
    """Upper end."""


@dataclass(frozen=True)
class Row:
    """A quantity of one step."""

    step: str
    """The step whose summary holds it."""
    label: str
    """What it is, in words."""
    value: str
    """Its field in the summary."""
    where: Mapping[str, Any] = field(default_factory=dict)
    """Which row of the summary: fields and what they must be."""
    interval: str | None = None
    """The field of its interval [low, high]."""
    form: str = "share"
    """How it is written: a name of `FORMATS`."""
    paper: Mapping[str, str] = field(default_factory=dict)
    """The paper's figure by rule, as the paper has it."""
    above: float | None = None
    """The effect points the right way where the value is above this."""
    below: float | None = None
    """The effect points the right way where the value is below this."""

    def find(self, summaries: Summaries) -> Found | None:
        """The number in a run; None where its step was not run or has no such row."""
        for row in summaries.get(self.step, []):
            if all(_same(row.get(name), wanted) for name, wanted in self.where.items()):
                value = row.get(self.value)
                if value is None:
                    return None
                low, high = row.get(self.interval) or (None, None) if self.interval else (None, None)
                return Found(float(value), low, high)
        return None

    def written(self, found: Found | None) -> str:
        """The number in words, with its interval."""
        if found is None or not math.isfinite(found.value):
            return "-"
        write = FORMATS[self.form]
        if found.low is None or found.high is None:
            return write(found.value)
        return f"{write(found.value)} ({write(found.low)} to {write(found.high)})"


def _same(came: Any, wanted: Any) -> bool:
    if isinstance(wanted, float) and isinstance(came, int | float):
        return math.isclose(came, wanted)
    return came == wanted
