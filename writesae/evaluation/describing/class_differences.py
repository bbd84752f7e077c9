"""Do register and bundle atoms act differently? A replacement test split by a partition's labels (arXiv:2605.12770, app. G).

Both results are of the same dictionary and cell. Every measure becomes one number per atom, its mean or median over the atom's
tested firings, and the atoms of the two groups are compared: medians, Cliff's delta over all pairs, Mann and Whitney's test,
and Holm's adjustment over the measures. A positive delta means that register atoms have more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from hooked_recurrent.config import StrictConfig, require_positive
from writesae.config import require_one_of
from writesae.evaluation.describing.distributions import correlation
from writesae.evaluation.describing.partition_result import BUNDLE, FORMS, REGISTER, PartitionResult
from writesae.evaluation.replacing.replacement_result import ReplacementResult
from writesae.evaluation.replacing.substitutes import DELETE, SCALES
from writesae.evaluation.result import Result
from writesae.evaluation.statistics import Interval, cliffs_delta, cluster_bootstrap, holm

MEASURES = {
    "delta_kl": "KL of deleting the write minus KL of the atom, nats, median over firings",
    "kl_delete": "KL of deleting the write, nats, median over firings",
    "kl_atom": "KL of the atom, nats, median over firings",
    "flip_delete": "share of firings whose most likely token changes when the write is deleted",
    "flip_atom": "the same share with the atom in its place",
    "firings": "tokens of the partition's text at which the atom fires",
}
"""What is compared, in words."""
CORRELATIONS = {
    "spearman(cosine, firings)": ("cosine", "firings", "spearman"),
    "pearson(cosine, flip_delete)": ("cosine", "flip_delete", "pearson"),
}
"""The paper's two correlations over the atoms of both groups."""


@dataclass(frozen=True)
class ClassDifferencesConfig(StrictConfig):
    """Which numbers of the two results are compared."""

    reading: str = "in_recurrence"
    """Reading of the replacement test."""
    scale: str = "coef"
    """Scale of the listed atom: "coef" or "norm"."""
    form: str = "additive"
    """Form of the write whose cosines the labels follow."""
    cut: str = "mixture"
    """"mixture", the two Gaussians' labels, or "threshold"."""
    min_tested: int = 1
    """Fewest tested firings of an atom that counts."""
    n_resamples: int = 2000
    """Resamples of every interval."""
    seed: int = 0
    """Seed of the resamples."""

    def __post_init__(self) -> None:
        require_one_of("ClassDifferencesConfig", "scale", self.scale, SCALES)
        require_one_of("ClassDifferencesConfig", "form", self.form, FORMS)
        require_one_of("ClassDifferencesConfig", "cut", self.cut, ("mixture", "threshold"))
        require_positive("ClassDifferencesConfig", min_tested=self.min_tested, n_resamples=self.n_resamples)


@dataclass(frozen=True, repr=False)
class ClassDifferencesResult(Result):
    """A row per atom of the two groups that was tested: atom, label, cosine, tested, and the measures."""

    kind = "class_differences"

    def group(self, label: str) -> pd.DataFrame:
        """The rows of "register" or "bundle"; `KeyError` for another label."""
        if label not in (REGISTER, BUNDLE):
            raise KeyError(f"no group {label!r}; there are {REGISTER} and {BUNDLE}")
        return self.table[self.table["label"] == label]

    def summary(self) -> list[dict[str, Any]]:
        """A row per measure, then one per correlation. Intervals redraw atoms, within each group."""
        rows = [self._measured(name) for name in MEASURES]
        for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
            row["p_holm"] = float(adjusted)
        return rows + [self._correlated(name) for name in CORRELATIONS]

    def _measured(self, name: str) -> dict[str, Any]:
        groups = {label: self.group(label)[name].to_numpy(dtype=float) for label in (REGISTER, BUNDLE)}
        first, second = groups.values()
        row: dict[str, Any] = {"measure": name}
        for label, values in groups.items():
            found = cluster_bootstrap(values, np.arange(len(values)), "median", *self._draws())
            row |= {f"n_{label}": len(values), f"median_{label}": found.estimate}
            row[f"interval_{label}"] = [found.low, found.high]
        delta = _difference(first, second, cliffs_delta, *self._draws())
        row |= {"cliffs_delta": delta.estimate, "delta_interval": [delta.low, delta.high]}
        row["p"] = float(stats.mannwhitneyu(first, second, alternative="two-sided").pvalue)
        return row

    def _correlated(self, name: str) -> dict[str, Any]:
        first, second, method = CORRELATIONS[name]
        columns = [self.table[side].to_numpy(dtype=float) for side in (first, second)]
        row: dict[str, Any] = {"measure": name, "n": len(self.table)}
        if any(np.ptp(column) == 0 for column in columns):
            return row | {"correlation": float("nan")}
        found = correlation(columns[0], columns[1], self.table["atom"], method, *self._draws())
        return row | {"correlation": found.estimate, "correlation_interval": [found.low, found.high]}

    def _draws(self) -> tuple[int, int]:
        return self.config["n_resamples"], self.config["seed"]

    def figure(self) -> Figure:
        """Both groups' values, a panel per measure."""
        figure = Figure(figsize=(8.4, 4.6), layout="constrained")
        for axes, name in zip(figure.subplots(2, 3).ravel(), MEASURES, strict=True):
            values = [self.group(label)[name].to_numpy(dtype=float) for label in (REGISTER, BUNDLE)]
            axes.boxplot(values, tick_labels=[REGISTER, BUNDLE], showfliers=False)
            if name == "firings":
                axes.set_yscale("log")
            axes.set_title(name.replace("_", " "))
        return figure


def class_differences(
    replacement: ReplacementResult, partition: PartitionResult, *, config: ClassDifferencesConfig | None = None
) -> ClassDifferencesResult:
    """Compare register and bundle atoms in a replacement test; nothing is run.

    Args:
        replacement: the test; its listed atoms count (a dominant atom's firings are chosen by the atom itself).
        partition: of the same dictionary and cell.
        config: which reading, scale, labels.

    Raises:
        ValueError: results of different cells, or fewer than two tested atoms in one of the groups.
        KeyError: a reading that the test does not have.
    """
    config = ClassDifferencesConfig.given(config)
    if (replacement.layer, replacement.head) != (partition.layer, partition.head):
        one, other = (f"layer {result.layer}, head {result.head}" for result in (replacement, partition))
        raise ValueError(f"the replacement test is of {one}, the partition of {other}")
    rows = replacement.reading(config.reading)
    table = _by_atom(rows, f"atom_listed_{config.scale}")
    atoms = partition.table.set_index("atom")
    unknown = table.index.difference(atoms.index)
    if len(unknown):
        raise ValueError(
            f"atom {unknown[0]} was tested, but the partition has {len(atoms)} atoms: another dictionary's"
        )
    table["label"] = partition.labels(config.form, config.cut).reindex(table.index)
    table["cosine"] = atoms[f"cosine_{config.form}"].reindex(table.index).astype(float)
    table["firings"] = atoms["firings"].reindex(table.index)
    table = table[table["label"].isin((REGISTER, BUNDLE)) & (table["tested"] >= config.min_tested)]
    counts = table["label"].value_counts()
    for label in (REGISTER, BUNDLE):
        if counts.get(label, 0) < 2:
            raise ValueError(
                f"{counts.get(label, 0)} tested atoms are {label} by the {config.cut} of {config.form} cosines; "
                "a comparison needs two in each group"
            )
    return ClassDifferencesResult(
        table.reset_index(), partition.layer, partition.head, config.to_dict(), dict(replacement.about)
    )


def _by_atom(rows: pd.DataFrame, condition: str) -> pd.DataFrame:
    """One row per listed atom, from one row per firing."""
    columns = {
        "delta_kl": rows[f"kl_{DELETE}"] - rows[f"kl_{condition}"],
        "kl_delete": rows[f"kl_{DELETE}"],
        "kl_atom": rows[f"kl_{condition}"],
        "flip_delete": rows[f"flip_{DELETE}"],
        "flip_atom": rows[f"flip_{condition}"],
    }
    grouped = pd.DataFrame({"atom": rows["atom"], **columns}).groupby("atom")
    table = pd.DataFrame({"tested": grouped.size()})
    for name in columns:
        table[name] = grouped[name].mean() if name.startswith("flip") else grouped[name].median()
    return table


def _difference(
    first: np.ndarray,
    second: np.ndarray,
    statistic: Callable[[np.ndarray, np.ndarray], float],
    n_resamples: int,
    seed: int,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of a two-sample statistic, the values of each group redrawn within it (scipy's bootstrap)."""
    found = stats.bootstrap(
        (first, second),
        statistic,
        vectorized=False,
        n_resamples=n_resamples,
        method="percentile",
        confidence_level=confidence,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(
        statistic(first, second), float(found.low), float(found.high), "bootstrap within groups", confidence
    )
