"""What a sweep found: a metric per site, with named axes."""

import json
from dataclasses import asdict, dataclass, field, replace
from operator import ne
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from hooked_recurrent.display import brief
from hooked_recurrent.display.html import card, table
from hooked_recurrent.files import write_text
from hooked_recurrent.patching.plots import heat_map

FORMAT = "hooked_recurrent.sweep.v1"
# The largest effects that a notebook shows.
SHOWN = 10


@dataclass(frozen=True, repr=False)
class Sweep:
    """The metric of every changed run, on named axes, beside those of the unchanged ones."""

    kind: str
    """What was done, in words, e.g. "clean write in the corrupted run"."""
    site: str
    """What was changed."""
    axes: dict[str, tuple[int, ...]]
    """Per axis of `values` its name ("row", "layer", "head", "position") and the numbers along it."""
    values: Float[Tensor, "*axes"]
    """The metric of each run (float64)."""
    baseline: tuple[float, ...]
    """The metric of the unchanged run, per row."""
    target: tuple[float, ...] | None = None
    """The metric of the run that the values were taken from, per row; None where there is no such run."""
    estimate: Float[Tensor, "*axes"] | None = None
    """What a first-order estimate makes of the same runs (`attribution=True`); None where none was asked for."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Whatever else the sweep was told."""

    def effect(self) -> Float[Tensor, "*axes"]:
        """By how much each run changed the metric: values - baseline."""
        return self.values - self.per_row(self.baseline)

    def recovered(self) -> Float[Tensor, "*axes"]:
        """The share of the way from the baseline to the target: 0 for no effect, 1 where the clean metric is back.

        Raises:
            ValueError: for a sweep without a target, or one whose target equals its baseline.
        """
        if self.target is None:
            raise ValueError(f"this sweep ({self.kind}) has no target run to compare with: see effect()")
        span = self.per_row(self.target) - self.per_row(self.baseline)
        if (span == 0).any():
            raise ValueError("the clean and the corrupted run have the same metric, so nothing can be recovered")
        return self.effect() / span

    def mean(self, axis: str) -> "Sweep":
        """The mean over one axis, for instance the rows."""
        if axis not in self.axes:
            raise ValueError(f"there is no axis {axis!r}; the axes are {', '.join(self.axes)}")
        place = list(self.axes).index(axis)
        made = {name: getattr(self, name) for name in ("values", "estimate")}
        made = {name: None if tensor is None else tensor.mean(place) for name, tensor in made.items()}
        if axis == "row":
            made["baseline"] = (float(np.mean(self.baseline)),)
            made["target"] = None if self.target is None else (float(np.mean(self.target)),)
        return replace(self, axes={name: along for name, along in self.axes.items() if name != axis}, **made)

    def to_dataframe(self) -> pd.DataFrame:
        """A row per run: its place on the axes, metric, effect, and where there are such recovered and estimate (an effect).

        There is no `recovered` where the clean and the corrupted run of any row have the same metric.
        """
        table = pd.DataFrame(index=[0])  # where every axis was averaged over
        if self.axes:
            table = pd.MultiIndex.from_product(self.axes.values(), names=list(self.axes)).to_frame(index=False)
        columns = {"metric": self.values, "effect": self.effect()}
        if self.target is not None and all(map(ne, self.target, self.baseline)):
            columns["recovered"] = self.recovered()
        if self.estimate is not None:
            columns["estimate"] = self.estimate
        return table.assign(**{name: tensor.flatten().numpy() for name, tensor in columns.items()})

    def figure(self, what: str = "effect", labels: list[str] | None = None) -> Figure:
        """A heat map of `effect`, `recovered`, `metric` or `estimate`; of three axes one panel per layer, of rows the mean.

        Args:
            what: which column of `to_dataframe`.
            labels: a label for every position of the text, such as `model.to_str_tokens(text)`.
        """
        if "row" in self.axes:
            return self.mean("row").figure(what, labels)
        choices = {"effect": self.effect, "recovered": self.recovered, "metric": lambda: self.values}
        if what == "estimate" and self.estimate is not None:
            shown = self.estimate
        elif what in choices:
            shown = choices[what]()
        else:
            raise ValueError(f"there is no {what!r} to draw; expected one of {', '.join([*choices, 'estimate'])}")
        return heat_map(shown, self.axes, f"{self.kind}: {what}", labels)

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, atomically; float64 values come back bit for bit."""
        about = {**asdict(self), "values": self.values.tolist(), "format": FORMAT}
        about["estimate"] = None if self.estimate is None else self.estimate.tolist()
        write_text(Path(path), json.dumps(about) + "\n")
        return Path(path)

    @staticmethod
    def load(path: str | Path) -> "Sweep":
        """Read a file that `save` wrote; anything else is one clear error."""
        path = Path(path)
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"no saved sweep at {path}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no whole JSON file ({error})") from None
        if not isinstance(about, dict) or about.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is no saved sweep: its format is not {FORMAT!r}")
        about["axes"] = {name: tuple(along) for name, along in about["axes"].items()}
        shape = tuple(len(along) for along in about["axes"].values())
        for name in ("values", "estimate"):
            if about[name] is not None:
                about[name] = torch.tensor(about[name], dtype=torch.float64).reshape(shape)
        for name in ("baseline", "target"):
            about[name] = None if about[name] is None else tuple(about[name])
        return Sweep(**about)

    def per_row(self, numbers: tuple[float, ...]) -> Tensor:
        """One number per row, in a shape that broadcasts to the axes."""
        shape = [len(along) if name == "row" else 1 for name, along in self.axes.items()]
        return torch.tensor(numbers, dtype=torch.float64).reshape(shape)

    def _repr_html_(self) -> str:
        """What was done, the unchanged runs, and the places with the largest effects."""
        metrics = {"metric unchanged": self.baseline, "metric of the target run": self.target}
        facts = {
            "site": self.site,
            "runs": self.values.numel(),
            "axes": ", ".join(f"{name} {len(along)}" for name, along in self.axes.items()),
            **{name: brief(tuple(round(one, 4) for one in along)) for name, along in metrics.items() if along},
            **{name: brief(value) for name, value in self.settings.items()},
        }
        rows = self.to_dataframe()
        largest = rows.reindex(rows["effect"].abs().sort_values(ascending=False, kind="stable").index[:SHOWN])
        return card("Sweep", facts, [table(largest.to_dict("records"))], note=f"{self.kind}; largest effects first")

    def __repr__(self) -> str:
        """One line: what was done, the axes with their sizes, and the metric of the unchanged runs."""
        axes = ", ".join(f"{name} {len(along)}" for name, along in self.axes.items())
        metrics = {"baseline": self.baseline, "target": self.target}
        short = {name: brief(tuple(round(one, 4) for one in along)) for name, along in metrics.items() if along}
        runs = ", ".join(f"{name}={numbers}" for name, numbers in short.items())
        estimate = "" if self.estimate is None else ", with estimate"
        return f"Sweep({self.kind!r}, site={self.site!r}, values [{axes}]{estimate}, {runs})"
