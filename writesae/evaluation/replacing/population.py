"""The replacement test over many atoms (the population test of WriteSAE, arXiv:2605.12770): do a few atoms win, or do all?

A firing-level win rate is carried by the atoms that fire most. Here every atom counts once: its win rate over its own firings,
where it has some, and then the mean over atoms. Atoms are sorted by their median cosine to the native writes that they stand
in for: a register (0.05 or more) has the direction of the writes, a bundle atom has not, and whether that decides who
wins is the question. `population_of` answers it from any replacement test; `population` first chooses atoms from every
stretch of cosines, so that the rare kinds are there too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.config import StrictConfig, require_positive
from writesae.config import require_one_of
from writesae.evaluation.firings import CellWrites, check_passages, encode_cell
from writesae.evaluation.replacing.exchange import READINGS
from writesae.evaluation.replacing.replacement import ReplacementConfig, replacement
from writesae.evaluation.replacing.replacement_result import ATOM_COLUMN, ReplacementResult
from writesae.evaluation.replacing.substitutes import DELETE, POOLS, SCALES
from writesae.evaluation.result import Result, Told
from writesae.evaluation.statistics import interval
from writesae.sae.samples import Factored
from writesae.sae.write_sae import WriteSAE

EDGES = (0.0, 0.05, 0.2, 0.3)
"""Where one stretch of cosines ends and the next begins (the paper's)."""
BINS = ("< 0", "0 to 0.05", "0.05 to 0.2", "0.2 to 0.3", ">= 0.3")
"""Their names, lowest first."""
REGISTER, BUNDLE = "register", "bundle"
_AT_ONCE = 4096  # writes whose atoms are gathered at once


@dataclass(frozen=True)
class PopulationConfig(StrictConfig):
    """Which atoms are tested, on how many firings, and what counts."""

    n_atoms: int = 100
    """Most atoms tested, as evenly over the stretches of cosines as these have atoms."""
    per_atom: int = 30
    """Most firings of one atom (30 in the paper)."""
    min_firings: int = 5
    """Firings that an atom must have been tested on for its win rate to count (5 in the paper)."""
    threshold: float = 0.05
    """Median cosine from which on an atom is a register; below it is a bundle atom."""
    pool: str = "listed"
    """Which atom stands in: "listed", the one whose firing it is, or "dominant", the strongest there (decision D2)."""
    scale: str = "coef"
    """At which size: "coef", its coefficient, or "norm", the native write's norm (decision D3)."""
    horizon: int = 16
    """Tokens after the firing over which the horizon reading averages."""
    readings: tuple[str, ...] = READINGS
    """Which of "in_recurrence", "cache" and "horizon" are measured."""
    first_position: int = 8
    """Earliest position of a firing."""
    form: str | None = None
    """What the native write is: "additive", or "net" with the erase (decision D1); None takes the dictionary's."""
    seed: int = 2026
    """Seed of the choice of atoms and firings, and of the random controls."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"PopulationConfig.threshold is a cosine between 0 and 1, got {self.threshold!r}")
        require_positive("PopulationConfig", n_atoms=self.n_atoms, per_atom=self.per_atom, min_firings=self.min_firings)
        require_one_of("PopulationConfig", "pool", self.pool, POOLS)
        require_one_of("PopulationConfig", "scale", self.scale, SCALES)
        self.replacement(None)

    def replacement(self, atoms: tuple[int, ...] | None) -> ReplacementConfig:
        """The replacement test of these atoms (None: of all) that this amounts to."""
        return ReplacementConfig(
            atoms=atoms,
            per_atom=self.per_atom,
            total=self.n_atoms * self.per_atom,
            horizon=self.horizon,
            first_position=self.first_position,
            readings=self.readings,
            seed=self.seed,
            form=self.form,
        )


@dataclass(frozen=True, repr=False)
class PopulationResult(Result):
    """A replacement test (the table is its table, a row per firing and reading), atom by atom."""

    kind = "population"

    @property
    def replacement(self) -> ReplacementResult:
        """The replacement test that this looks at."""
        return ReplacementResult(self.table, self.layer, self.head, self.config, self.about)

    def atoms(self, reading: str = "in_recurrence") -> pd.DataFrame:
        """A row per atom that counts: atom, firings, wins, win_rate, median_cosine, median_coefficient, side, bin."""
        found = self.replacement.by_atom(reading, self.config["pool"], self.config["scale"])
        found = found[found["firings"] >= self.config["min_firings"]].reset_index(drop=True)
        cosine = found["median_cosine"].to_numpy()
        sides = np.where(cosine >= self.config["threshold"], REGISTER, BUNDLE)
        return found.assign(side=sides, bin=[BINS[index] for index in bins(cosine)])

    def summary(self, n_resamples: int = 5000) -> list[dict[str, Any]]:
        """Per reading a row for all atoms, one per side and one per stretch of cosines.

        win_rate is the mean over atoms (by_atom its interval), firing_rate that over the firings of these atoms (by_passage its
        interval). The row of all atoms also has the Mann-Whitney p of register against bundle atoms, and how the win rate goes
        with the cosine (Pearson, Spearman, and their p).
        """
        return [row for reading in self.table["reading"].unique() for row in self._of(str(reading), n_resamples)]

    def _of(self, reading: str, n_resamples: int) -> list[dict[str, Any]]:
        atoms = self.atoms(reading)
        column = ATOM_COLUMN[self.config["pool"]]
        rows = self.replacement.reading(reading)
        won = rows[f"kl_atom_{self.config['pool']}_{self.config['scale']}"] < rows[f"kl_{DELETE}"]
        firings = pd.DataFrame({"atom": rows[column], "passage": rows["passage"], "won": won.astype(float)})
        parts = {"all": atoms}
        parts |= {side: atoms[atoms["side"] == side] for side in (REGISTER, BUNDLE)}
        parts |= {name: atoms[atoms["bin"] == name] for name in BINS}
        summary = [
            {"reading": reading, "part": name, **_part(part, firings, n_resamples)} for name, part in parts.items()
        ]
        summary[0] |= _trends(atoms) | {"floor_max": self.replacement.floor(reading)[1]}
        return summary

    def figure(self, reading: str = "in_recurrence") -> Figure:
        """Win rate of every atom over its median cosine, and the means of the stretches."""
        atoms = self.atoms(reading)
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for side, part in atoms.groupby("side"):
            axes.scatter(part["median_cosine"], part["win_rate"], 2 * part["firings"], alpha=0.5, label=str(side))
        means = atoms.groupby("bin")[["median_cosine", "win_rate"]].mean().sort_values("median_cosine")
        axes.plot(means["median_cosine"], means["win_rate"], "k_-", markersize=14, label="mean of a stretch")
        axes.axhline(0.5, color="grey", linewidth=0.8)
        axes.axvline(self.config["threshold"], color="grey", linewidth=0.8, linestyle=":")
        axes.set(xlabel="median cosine of atom and native write", ylabel="share of firings won against deletion")
        axes.set(ylim=(-0.03, 1.03), title=f"layer {self.layer}, head {self.head}, {reading}")
        axes.legend()
        return figure


def population_of(result: ReplacementResult, config: PopulationConfig | None = None) -> PopulationResult:
    """Look at a replacement test atom by atom; only min_firings, threshold, pool and scale of the config matter.

    Raises `ValueError` where no atom was tested on min_firings firings.
    """
    config = PopulationConfig.given(config)
    read = {name: getattr(config, name) for name in ("min_firings", "threshold", "pool", "scale")}
    run = {**config.to_dict(), **result.config, **read}
    found = PopulationResult(result.table, result.layer, result.head, run, result.about)
    reading = str(result.table["reading"].iloc[0])
    most = result.by_atom(reading, config.pool, config.scale)["firings"].max()
    if most < config.min_firings:
        raise ValueError(f"no atom was tested on {config.min_firings} firings; the most of any atom is {most}")
    return found


@torch.no_grad()
def population(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    tokens: Int[Tensor, "passage pos"],
    *,
    layer: int,
    head: int,
    config: PopulationConfig | None = None,
    on_progress: Told | None = None,
) -> PopulationResult:
    """The replacement test over atoms of every stretch of cosines.

    Args:
        model: any HookedRecurrentModel.
        sae: a dictionary of the cell.
        tokens: held-out passages.
        layer, head: the cell.
        config: which atoms, how many firings, what counts.
        on_progress: called with (firings done, firings in all).

    Raises:
        ValueError, IndexError: as `replacement`, and where no atom fires often enough.
    """
    config = PopulationConfig.given(config)
    check_passages(tokens)
    writes = encode_cell(model, sae, tokens, layer, head)
    last = tokens.shape[1] - 2 - config.horizon
    cosines = median_cosines(sae, writes, first=config.first_position, last=last)
    atoms = stratified(cosines, config.n_atoms, config.seed) if cosines else None
    result = replacement(
        model, sae, tokens, layer=layer, head=head, config=config.replacement(atoms), on_progress=on_progress
    )
    return population_of(result, config)


@torch.no_grad()
def firing_cosines(sae: WriteSAE, writes: CellWrites) -> Float[Tensor, "passage pos k"]:
    """Frobenius cosine, signed, of every active atom with the write that it fires on; 0 for silent slots.

    For atoms of rank 1 it is cos(v_i, k_t) cos(w_i, value_t).
    """
    codes = writes.codes.reshape(torch.Size([writes.norms.numel()]))
    samples = Factored(writes.key.flatten(0, 1), writes.value.flatten(0, 1)).to(dtype=sae.dtype)
    pairs = zip(samples.blocks(_AT_ONCE), codes.indices.split(_AT_ONCE), strict=True)
    inner = torch.cat([sae.decoder.inner_at(block, indices) for block, indices in pairs])
    size = writes.norms.reshape(-1, 1).to(inner) * sae.atom_norms()[codes.indices]
    cosine = inner / size.clamp_min(torch.finfo(inner.dtype).tiny) * codes.active
    return cosine.reshape(writes.codes.indices.shape)


def median_cosines(sae: WriteSAE, writes: CellWrites, *, first: int = 0, last: int | None = None) -> dict[int, float]:
    """Per atom that fires at positions first..last, the median over its firings of its cosine to the native write."""
    stop = None if last is None else last + 1
    active = writes.codes.active[:, first:stop]
    found = pd.DataFrame(
        {
            "atom": writes.codes.indices[:, first:stop][active].cpu().numpy(),
            "cosine": firing_cosines(sae, writes)[:, first:stop][active].double().cpu().numpy(),
        }
    )
    return {int(str(atom)): float(cosine) for atom, cosine in found.groupby("atom")["cosine"].median().items()}


def bins(cosines: Sequence[float] | np.ndarray) -> np.ndarray:
    """Which stretch (an index into `BINS`) each cosine lies in; an edge belongs to the upper one."""
    return np.digitize(np.asarray(cosines, dtype=float), EDGES)


def stratified(cosines: dict[int, float], count: int, seed: int) -> tuple[int, ...]:
    """At most `count` atoms, drawn at random and as evenly from the stretches of cosines as these have atoms; sorted."""
    names = np.array(sorted(cosines))
    order = np.random.default_rng(seed).permutation(len(names))
    place = bins([cosines[int(atom)] for atom in names[order]])
    turn = np.empty(len(order), dtype=int)  # the how-manieth of its stretch each atom is
    for stretch in np.unique(place):
        turn[place == stretch] = np.arange((place == stretch).sum())
    chosen = np.lexsort((np.arange(len(order)), turn))[:count]
    return tuple(sorted(int(atom) for atom in names[order][chosen]))


def _part(atoms: pd.DataFrame, firings: pd.DataFrame, n_resamples: int) -> dict[str, Any]:
    if atoms.empty:
        return {"n_atoms": 0, "n_firings": 0}
    mine = firings[firings["atom"].isin(atoms["atom"])]
    rates = atoms["win_rate"]
    return {
        "n_atoms": len(atoms),
        "n_firings": len(mine),
        "win_rate": float(rates.mean()),
        "by_atom": interval(rates, atoms["atom"], n_resamples=n_resamples),
        "median": float(rates.median()),
        "range": [float(rates.min()), float(rates.max())],
        "firing_rate": float(mine["won"].mean()),
        "by_passage": interval(mine["won"], mine["passage"], n_resamples=n_resamples),
        "n_passages": int(mine["passage"].nunique()),
    }


def _trends(atoms: pd.DataFrame) -> dict[str, float]:
    """How the win rate goes with the side and with the cosine; NaN where there is nothing to compare."""
    rates, cosine = atoms["win_rate"].to_numpy(), atoms["median_cosine"].to_numpy()
    register, bundle = (rates[(atoms["side"] == side).to_numpy()] for side in (REGISTER, BUNDLE))
    nan = float("nan")
    both = len(register) > 0 and len(bundle) > 0
    found = {"mann_whitney_p": float(stats.mannwhitneyu(register, bundle).pvalue) if both else nan}
    varied = len(atoms) > 2 and np.ptp(rates) > 0 and np.ptp(cosine) > 0
    for name, test in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        r, p = test(rates, cosine) if varied else (nan, nan)
        found |= {name: float(r), f"{name}_p": float(p)}
    return found
