"""The passage test (WriteSAE, arXiv:2605.12770): leave out every write that some atoms stand for, at once, over whole passages.

A replacement test changes one write. Here every firing of a set of atoms in a passage loses its native write in one run, and
the price is the change in bits per token on that passage. If those writes hardly matter where they are deleted, but do where
something else of their size is written, the direction of a write counts and not only its absence. Conditions:

    native             every one of these writes put back in place of itself: the numerical floor
    delete             none of them is made
    atom               each is replaced by the strongest atom of the set there, at its coefficient
    random_gaussian    each is replaced by a random outer product of its own norm, Gaussian factors
    random_empirical   the same, each coordinate of a factor drawn from the native writes
    delete_other       as many others of the passage's writes are deleted, drawn at random: is it these, or any?

The paper deletes the additive write, the erase stays; so do we. The last condition the paper does not have. It needs as many
writes at which no atom of the set fires; where these are too few, the passage has no such row. Under a TopK sparsifier a
large set fires on nearly every token, so the test is also made with the firings of the strongest atom alone (pool
"dominant", against "listed": decision D2).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel, WriteEdit
from hooked_recurrent.config import StrictConfig, require_positive
from hooked_recurrent.patching.forks import run_edits
from writesae.config import require_one_of
from writesae.evaluation.firings import CellWrites, check_passages, encode_cell
from writesae.evaluation.replacing.population import BUNDLE, REGISTER, median_cosines
from writesae.evaluation.replacing.substitutes import DELETE, NATIVE, POOLS
from writesae.evaluation.result import Result, Told
from writesae.evaluation.statistics import cluster_bootstrap, paired_wilcoxon
from writesae.sae.write_sae import WriteSAE

SIDES = (REGISTER, BUNDLE, "all")
ATOM, GAUSSIAN, EMPIRICAL, OTHER = "atom", "random_gaussian", "random_empirical", "delete_other"
CONDITIONS = (NATIVE, DELETE, ATOM, GAUSSIAN, EMPIRICAL, OTHER)


@dataclass(frozen=True)
class PassageTestConfig(StrictConfig):
    """Whose firings lose their writes, and how often the random conditions are drawn."""

    atoms: tuple[int, ...] | None = None
    """The set of atoms; None takes those of `side`."""
    side: str = REGISTER
    """Without `atoms`: "register" atoms, "bundle" atoms, or "all" that fire."""
    most: int | None = None
    """At most so many of the side's atoms, drawn at random: a whole side may fire everywhere, and leave no other writes."""
    threshold: float = 0.05
    """Median cosine to the native writes (on these passages) from which on an atom is a register."""
    pools: tuple[str, ...] = POOLS
    """What a firing of the set is: "listed", one of them is active; "dominant", the strongest atom there is one of them."""
    draws: int = 3
    """Times each random condition is drawn; a passage's change is the mean over them."""
    first_position: int = 8
    """Earliest position that is edited and whose next token counts."""
    seed: int = 2026
    """Seed of the random conditions."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"PassageTestConfig.threshold is a cosine between 0 and 1, got {self.threshold!r}")
        require_positive("PassageTestConfig", draws=self.draws, first_position=self.first_position)
        require_one_of("PassageTestConfig", "side", self.side, SIDES)
        for pool in self.pools:
            require_one_of("PassageTestConfig", "pools", pool, POOLS)
        if self.most is not None:
            require_positive("PassageTestConfig", most=self.most)
        if self.atoms is not None and not self.atoms:
            raise ValueError("PassageTestConfig.atoms is empty; give atoms, or None for those of a side")


@dataclass(frozen=True, repr=False)
class PassageTestResult(Result):
    """A row per passage, pool, condition and draw.

    Columns: passage, pool, condition, draw; n_edits and n_tokens; native_bits and bits per token; change, their difference;
    write_norm, the mean norm of the edited native writes.
    """

    kind = "passage_test"
    atoms: list[int] = field(default_factory=list)
    """The set of atoms whose firings were edited."""

    def changes(self, pool: str) -> pd.DataFrame:
        """Change in bits per token, a row per passage and a column per condition; draws are averaged."""
        rows = self.table[self.table["pool"] == pool]
        if rows.empty:
            raise KeyError(f"no pool {pool!r}; this result has {', '.join(self.table['pool'].unique())}")
        return rows.groupby(["passage", "condition"])["change"].mean().unstack()

    def summary(self, n_resamples: int = 5000) -> list[dict[str, Any]]:
        """A row per pool and condition: mean change in bits per token with its interval over passages, against deletion.

        ratio is the mean change over that of deletion (on the passages that have both), worse in how many passages the
        condition costs more than deletion, wilcoxon_p of the two over passages.
        """
        rows = []
        for pool in self.table["pool"].unique():
            changes = self.changes(str(pool))
            mine = self.table[self.table["pool"] == pool].groupby("condition")
            for condition in (name for name in CONDITIONS if name in changes):
                both = changes[[DELETE, condition]].dropna() if condition != DELETE else changes[[DELETE]].dropna()
                about = {"pool": pool, "condition": condition, "n_passages": len(both)}
                about["edits_per_passage"] = float(mine["n_edits"].mean()[condition])
                about["share_edited"] = float((mine["n_edits"].sum() / mine["n_tokens"].sum())[condition])
                about["floor_max"] = float(changes[NATIVE].abs().max())
                rows.append(about | _against_deletion(both, condition, n_resamples))
        return rows

    def figure(self) -> Figure:
        """Change in bits per token of every passage under every condition, a panel per pool."""
        pools = list(self.table["pool"].unique())
        figure = Figure(figsize=(5 * len(pools), 4), layout="constrained")
        for axes, pool in zip(np.atleast_1d(figure.subplots(1, len(pools))), pools, strict=True):
            changes = self.changes(pool)
            names = [name for name in CONDITIONS if name in changes]
            for place, name in enumerate(names):
                axes.plot([place] * len(changes), changes[name], "o", alpha=0.4, markersize=4)
                axes.plot([place - 0.3, place + 0.3], [changes[name].mean()] * 2, "k-")
            axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
            axes.set(title=f"{pool} firings", ylabel="change in bits per token")
            axes.set_yscale("symlog", linthresh=1e-4)
        return figure


@torch.no_grad()
def passage_test(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    tokens: Int[Tensor, "passage pos"],
    *,
    layer: int,
    head: int,
    config: PassageTestConfig | None = None,
    on_progress: Told | None = None,
) -> PassageTestResult:
    """Delete or exchange the native write at every firing of a set of atoms, passage by passage.

    Args:
        model: any HookedRecurrentModel.
        sae: a dictionary of the cell.
        tokens: held-out passages.
        layer, head: the cell.
        config: which atoms, which conditions.
        on_progress: called with (passages done, passages in all).

    Raises:
        ValueError, IndexError: for a cell that does not exist or does not fit, atoms that the dictionary does not have, a set
            that is empty or never fires, passages that end before first_position.
    """
    config = PassageTestConfig.given(config)
    check_passages(tokens)
    if tokens.shape[1] < config.first_position + 2:
        need = config.first_position + 2
        raise ValueError(f"passages have {tokens.shape[1]} tokens; this test needs at least {need}")
    for atom in config.atoms or ():
        if not 0 <= atom < sae.config.n_atoms:
            raise IndexError(f"atom {atom} is outside this dictionary of {sae.config.n_atoms} atoms")
    writes = encode_cell(model, sae, tokens, layer, head)
    atoms = config.atoms or _of_side(sae, writes, config)
    test = _Test(model, sae, tokens, layer, head, config, writes, torch.tensor(atoms))
    plans = [plan for passage in range(len(tokens)) for plan in test.plans(passage)]
    if not plans:
        raise ValueError(f"none of the {len(atoms)} atoms fires on these passages from {config.first_position} on")
    rows: list[dict[str, Any]] = []
    for passage in range(len(tokens)):
        rows += test.measure(passage, [plan for plan in plans if plan.passage == passage])
        if on_progress is not None:
            on_progress(passage + 1, len(tokens))
    return PassageTestResult(pd.DataFrame(rows), layer, head, config.to_dict(), atoms=sorted(atoms))


@dataclass(frozen=True)
class _Plan:
    """One condition on one passage: the edited positions, and what is written there (None: nothing)."""

    passage: int
    pool: str
    condition: str
    draw: int
    positions: Int[Tensor, " edited"]
    key: Float[Tensor, "edited rank d_k"] | None = None
    value: Float[Tensor, "edited rank d_v"] | None = None

    def edits(self, layer: int, head: int) -> Iterator[WriteEdit]:
        """As edits of a model's one text; a matrix of several terms is its first term with the others added."""
        if self.key is None or self.value is None:
            yield WriteEdit(layer, head, self.positions, DELETE)  # type: ignore[arg-type]
            return
        for term in range(self.key.shape[1]):
            key, value = self.key[:, term], self.value[:, term]
            yield WriteEdit(layer, head, self.positions, "add" if term else "replace", key, value)


@dataclass(frozen=True)
class _Test:
    model: HookedRecurrentModel
    sae: WriteSAE
    tokens: Tensor
    layer: int
    head: int
    config: PassageTestConfig
    writes: CellWrites
    atoms: Tensor

    def plans(self, passage: int) -> Iterator[_Plan]:
        """Every condition of a passage. All that is random is drawn here, from the seed, the passage and the pool alone."""
        for pool in self.config.pools:
            here, slots = self._firings(passage, pool)
            if not len(here):
                continue
            yield _Plan(passage, pool, DELETE, 0, here)
            key, value = (side[passage, here][:, None] for side in (self.writes.key, self.writes.value))
            yield _Plan(passage, pool, NATIVE, 0, here, key, value)
            yield self._by_atoms(passage, pool, here, slots)
            numbers = np.random.SeedSequence([self.config.seed, passage, POOLS.index(pool)]).generate_state(1)
            generator = torch.Generator().manual_seed(int(numbers[0]))
            for draw in range(self.config.draws):
                yield from self._random(passage, pool, draw, here, generator)

    def _firings(self, passage: int, pool: str) -> tuple[Tensor, Tensor]:
        """Positions at which the set fires, and which slot of the code is its strongest atom there."""
        codes, first = self.writes.codes, self.config.first_position
        indices, values = (side[passage].cpu() for side in (codes.indices, codes.values))
        mine = torch.isin(indices, self.atoms) & (values > 0)
        if pool == "dominant":
            slots = values.argmax(-1)
            fires = mine.gather(1, slots[:, None])[:, 0]
        else:
            slots, fires = torch.where(mine, values, -1.0).argmax(-1), mine.any(-1)
        fires[:first] = False
        fires[-1] = False  # its next token is not known
        here = fires.nonzero()[:, 0]
        return here, slots[here]

    def _by_atoms(self, passage: int, pool: str, here: Tensor, slots: Tensor) -> _Plan:
        codes = self.writes.codes
        indices, values = (side[passage][here.to(side.device), slots] for side in (codes.indices, codes.values))
        key, value = self.sae.key_atoms[indices], self.sae.value_atoms[indices]
        return _Plan(passage, pool, ATOM, 0, here, key, value * values[:, None, None].to(value))

    def _random(self, passage: int, pool: str, draw: int, here: Tensor, generator: torch.Generator) -> Iterator[_Plan]:
        norms = self.writes.norms[passage, here]
        sides = (self.writes.key, self.writes.value)
        gaussian = [torch.randn(len(here), side.shape[-1], generator=generator).to(side) for side in sides]
        empirical = [_mixed(side.flatten(0, 1), len(here), generator) for side in sides]
        for name, (key, value) in ((GAUSSIAN, gaussian), (EMPIRICAL, empirical)):
            size = (key.norm(dim=-1) * value.norm(dim=-1)).clamp_min(torch.finfo(key.dtype).tiny)
            value = value * (norms / size)[:, None]
            yield _Plan(passage, pool, name, draw, here, key[:, None], value[:, None])
        free = torch.ones(self.tokens.shape[1], dtype=torch.bool)
        free[: self.config.first_position] = free[-1] = False
        free[here] = False
        others = free.nonzero()[:, 0]
        if len(others) >= len(here):
            picked = others[torch.randperm(len(others), generator=generator)[: len(here)]]
            yield _Plan(passage, pool, OTHER, draw, picked.sort().values)

    def measure(self, passage: int, plans: list[_Plan]) -> list[dict[str, Any]]:
        """Run the plans of a passage side by side; bits per token from first_position on."""
        if not plans:
            return []
        text, first = self.tokens[passage : passage + 1], self.config.first_position
        native = _bits(self.model(text)[0], text[0])
        floor = native[first:].mean()
        edits = [list(plan.edits(self.layer, self.head)) for plan in plans]
        rows: list[dict[str, Any]] = [{} for _ in plans]
        for fork in run_edits(self.model, text, edits, horizon=None):
            plan, edited = plans[fork.index], native.clone()
            edited[fork.position :] = _bits(fork.logits, text[0, fork.position :])
            bits = edited[first:].mean()
            rows[fork.index] = {
                "passage": passage,
                "pool": plan.pool,
                "condition": plan.condition,
                "draw": plan.draw,
                "n_edits": len(plan.positions),
                "n_tokens": len(native) - first,
                "native_bits": float(floor),
                "bits": float(bits),
                "change": float(bits - floor),
                "write_norm": float(self.writes.norms[passage, plan.positions].mean()),
            }
        return rows


def _of_side(sae: WriteSAE, writes: CellWrites, config: PassageTestConfig) -> tuple[int, ...]:
    cosines = median_cosines(sae, writes, first=config.first_position)
    wanted = {REGISTER: (config.threshold, math.inf), BUNDLE: (-math.inf, config.threshold)}
    low, high = wanted.get(config.side, (-math.inf, math.inf))
    atoms = tuple(atom for atom, cosine in cosines.items() if low <= cosine < high)
    if not atoms:
        raise ValueError(f"no {config.side} atom fires on these passages (threshold {config.threshold})")
    if config.most is not None:
        atoms = tuple(np.random.default_rng(config.seed).permutation(sorted(atoms))[: config.most].tolist())
    return atoms


def _mixed(rows: Float[Tensor, "write d"], count: int, generator: torch.Generator) -> Float[Tensor, "count d"]:
    """Rows each of whose coordinates comes from another random row."""
    picks = torch.randint(len(rows), (count, rows.shape[1]), generator=generator).to(rows.device)
    return rows.gather(0, picks)


def _bits(logits: Float[Tensor, "pos d_vocab"], text: Int[Tensor, " pos"]) -> Float[Tensor, " next"]:
    """Bits of every token but the first, in float64, given what came before it."""
    logprobs = logits[:-1].double().log_softmax(-1)
    return -logprobs.gather(1, text[1:, None])[:, 0] / math.log(2)


def _against_deletion(changes: pd.DataFrame, condition: str, n_resamples: int) -> dict[str, Any]:
    mine = changes[condition].to_numpy()
    found: dict[str, Any] = {"change": float(mine.mean()), "by_passage": [float("nan")] * 2}
    if len(mine) > 1:
        interval = cluster_bootstrap(mine, changes.index.to_numpy(), n_resamples=n_resamples)
        found["by_passage"] = [interval.low, interval.high]
    found["median"] = float(np.median(mine))
    if condition != DELETE:
        deleted = changes[DELETE].to_numpy()
        found["ratio"] = float(mine.mean() / deleted.mean()) if deleted.mean() else float("nan")
        found["worse"] = int((mine > deleted).sum())
        found["wilcoxon_p"] = paired_wilcoxon(mine, deleted).p_value if len(mine) > 1 else float("nan")
    return found
