"""The outcome of a partition: a row per atom, the mixtures that were fitted, what they amount to, and hosts compared."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from writesae.evaluation.describing.distributions import Mixture, bimodality_coefficient, ks_clustered
from writesae.evaluation.result import Result
from writesae.evaluation.statistics import holm, interval

FORMS = ("additive", "net")
REGISTER, BUNDLE, NULL = "register", "bundle", "null"
_ALIGNED = 0.3
_DRAWS = 500


@dataclass(frozen=True, repr=False)
class PartitionResult(Result):
    """A row per atom of the dictionary; cosines are signed Frobenius cosines to the native write, medians over firings.

    Columns: atom, firings, frequency, max_coefficient, steps_since_active, alive and alive_{criterion}; per form of the write
    cosine_, null_ (another token's write), strongest_cosine_ and strongest_null_ (mean |cosine| at the largest coefficients),
    the labels mixture_ and threshold_, component_ (of the mixture of lowest BIC, by rising mean; -1 where not alive); and for
    rank-1 atoms cosine_key, cosine_value and strongest_geometric.
    """

    kind = "partition"

    firings: dict[str, list] = field(default_factory=dict)
    """Columns atom, cosine_{form} and null_{form} of a seeded choice of single firings."""
    mixtures: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Per form the fitted mixtures of 1, 2, .. components, with their BIC (lower is better)."""
    matches: list[dict[str, Any]] = field(default_factory=list)
    """How much of the dictionary those of other seeds hold."""
    shape: list[int] = field(default_factory=list)
    """d_k and d_v of the atoms."""
    tokens: int = 0
    """How many tokens the firings were counted over."""

    def fits(self, form: str = "additive") -> list[Mixture]:
        """The mixtures of one form. `KeyError` for another form than "additive" and "net"."""
        if form not in self.mixtures:
            raise KeyError(f"no form {form!r}; this result has {', '.join(self.mixtures)}")
        return [
            Mixture(fit["bic"], *map(tuple, (fit["weights"], fit["means"], fit["deviations"])))
            for fit in self.mixtures[form]
        ]

    def labels(self, form: str = "additive", cut: str = "mixture") -> pd.Series:
        """register, bundle or null per atom, by the two-component "mixture" or by the "threshold". `KeyError` for others."""
        name = f"{cut}_{form}"
        if cut not in ("mixture", "threshold") or name not in self.table:
            raise KeyError(f"no labels {name!r}; there are mixture and threshold, of {' and '.join(FORMS)}")
        return self.table.set_index("atom")[name]

    def gaussian_null(self) -> dict[str, float]:
        """Mean |cosine| of independent random directions: of the key side, of the value side, and of the outer products."""
        key, value = (math.sqrt(2 / math.pi / d) for d in self.shape)
        return {"key": key, "value": value, "write": key * value}

    def summary(self, n_resamples: int = _DRAWS) -> list[dict[str, Any]]:
        """A row per form of the write. Intervals redraw atoms. BICs: lower is better."""
        return [self._summarise(form, n_resamples) for form in FORMS]

    def _summarise(self, form: str, n_resamples: int) -> dict[str, Any]:
        alive = self.table[self.table["alive"]]
        cosine = alive[f"cosine_{form}"].astype(float)
        fits = self.fits(form)
        row: dict[str, Any] = {
            "form": form,
            "n_atoms": len(self.table),
            "n_tokens": self.tokens,
            "criterion": self.config["alive"],
            "n_alive": len(alive),
            **{f"n_{name}": int(self.table[name].sum()) for name in self.table if name.startswith("alive_")},
            "n_null": len(self.table) - len(alive),
            "median_cosine": float(cosine.median()),
            "median_cosine_interval": interval(cosine, alive["atom"], "median", n_resamples),
            "null_median_cosine": float(alive[f"null_{form}"].median()),
            "mean_strongest": float(alive[f"strongest_cosine_{form}"].mean()),
            "null_strongest": float(alive[f"strongest_null_{form}"].mean()),
            "gaussian_null": self.gaussian_null()["write"],
            "share_above_0.3": float((alive[f"strongest_cosine_{form}"] > _ALIGNED).mean()),
            "bic": [fit.bic for fit in fits],
            "bic_rule": "lower is better",
            "components": min(fits, key=lambda fit: fit.bic).n_components,
            "bic_2_minus_1": fits[1].bic - fits[0].bic if len(fits) > 1 else float("nan"),
            "bimodality": bimodality_coefficient(cosine),
            **self._groups(alive, form),
            **{f"register_at_{cut:g}": int((cosine > cut).sum()) for cut in self.config["thresholds"]},
            **self._against_null(form, n_resamples),
        }
        if form == "additive":
            for match in self.matches:
                name = f"seed_{match['other'] + 1}_{match['atoms']}"
                row[f"matched_{name}"], row[f"matched_{name}_null"] = match["share"], match["null_share"]
        return row

    def _groups(self, alive: pd.DataFrame, form: str) -> dict[str, Any]:
        """Sizes and median cosines of both groups, by both cuts."""
        found: dict[str, Any] = {}
        for cut in ("mixture", "threshold"):
            for label in (REGISTER, BUNDLE):
                group = alive.loc[alive[f"{cut}_{form}"] == label, f"cosine_{form}"].astype(float)
                found[f"{label}_{cut}"] = len(group)
                found[f"cosine_{label}_{cut}"] = float(group.median()) if len(group) else float("nan")
        return found

    def _against_null(self, form: str, n_resamples: int) -> dict[str, Any]:
        """Single firings against those of the empirical null, and register against bundle; atoms are the clusters.

        Both groups were cut by this very cosine, so their difference says how sharp the cut is, not that there is one.
        """
        kept = pd.DataFrame(self.firings)
        own = kept[kept["atom"].isin(self.table.loc[self.table["alive"], "atom"])]
        label = own["atom"].map(self.labels(form, "threshold"))
        pairs = {
            "null": (own, f"cosine_{form}", own, f"null_{form}"),
            "groups": (own[label == REGISTER], f"cosine_{form}", own[label == BUNDLE], f"cosine_{form}"),
        }
        found: dict[str, Any] = {}
        for name, (first, of_first, second, of_second) in pairs.items():
            if min(first["atom"].nunique(), second["atom"].nunique()) < 2:
                continue
            apart = ks_clustered(first[of_first], second[of_second], first["atom"], second["atom"], n_resamples)
            found |= {f"ks_{name}": apart.statistic, f"ks_{name}_interval": [apart.low, apart.high]}
            found[f"ks_{name}_p"] = apart.p_value
        return found

    def figure(self, form: str = "additive") -> Figure:
        """Histogram of the alive atoms' cosines with the mixtures, and the BICs."""
        figure = Figure(figsize=(8.4, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 1))
        alive = self.table[self.table["alive"]]
        self._histogram(left, alive, form)
        fits = self.fits(form)
        right.plot([fit.n_components for fit in fits], [fit.bic for fit in fits], marker="o", color="black")
        best = min(fits, key=lambda fit: fit.bic)
        right.plot([best.n_components], [best.bic], marker="o", markersize=11, fillstyle="none", color="tab:red")
        right.set(xlabel="components", ylabel="BIC (lower is better)", xticks=[fit.n_components for fit in fits])
        return figure

    def _histogram(self, axes: Axes, alive: pd.DataFrame, form: str) -> None:
        cosine = alive[f"cosine_{form}"].astype(float)
        edges = np.linspace(min(0.0, cosine.min()), max(cosine.max(), 0.2), 41).tolist()
        for label, colour in ((REGISTER, "tab:blue"), (BUNDLE, "tab:orange")):
            group = cosine[alive[f"mixture_{form}"] == label]
            axes.hist(group, edges, color=colour, alpha=0.7, label=f"{label} ({len(group)})")
        axes.hist(
            alive[f"null_{form}"].astype(float), edges, histtype="step", color="grey", label="another token's write"
        )
        grid = np.linspace(edges[0], edges[-1], 400)
        fits = self.fits(form)
        for count in sorted({2, min(fits, key=lambda fit: fit.bic).n_components}):
            if count <= len(fits):
                height = fits[count - 1].densities(grid).sum(0) * len(cosine) * (edges[1] - edges[0])
                axes.plot(
                    grid, height, linestyle="-" if count == 2 else "--", color="black", label=f"{count} Gaussians"
                )
        axes.axvline(self.config["threshold"], color="black", linewidth=0.8, linestyle=":")
        axes.set(xlabel=f"cosine to the {form} native write, median over firings", ylabel="atoms")
        axes.legend(frameon=False)


def compare_hosts(
    partitions: Mapping[str, PartitionResult], form: str = "additive", n_resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Single firings of each pair of hosts by Kolmogorov and Smirnov's statistic, atoms as clusters, p-values by Holm.

    A row per pair: first, second, ks, low, high, p, p_holm, p_naive (every firing taken for independent), n_first, n_second
    atoms. Firings are as many per atom as each partition kept. Raises `ValueError` for fewer than two partitions.
    """
    if len(partitions) < 2:
        raise ValueError(f"hosts are compared in pairs: give two partitions or more, got {len(partitions)}")
    rows = []
    for (first, one), (second, other) in combinations(partitions.items(), 2):
        name = f"cosine_{form}"
        groups = one.firings[name], other.firings[name], one.firings["atom"], other.firings["atom"]
        apart = ks_clustered(*groups, n_resamples=n_resamples, seed=seed)
        rows.append(
            {
                "first": first,
                "second": second,
                "ks": apart.statistic,
                "low": apart.low,
                "high": apart.high,
                "p": apart.p_value,
                "p_naive": apart.p_naive,
                "n_first": apart.clusters[0],
                "n_second": apart.clusters[1],
            }
        )
    table = pd.DataFrame(rows)
    return table.assign(p_holm=holm(table["p"]))
