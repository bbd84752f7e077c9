"""Selectivity, the paper's measure (arXiv:2605.12770, appendix G), with the check that shows how little it says.

An atom is added to the memory at one of its firings, and so is a control matrix of the same norm; selectivity is 1 minus the
share of tokens that are among the K most shifted of both. Any two directions that differ shift different tokens of a large
vocabulary most, so the measure is near 1 whatever they are. The check is the same number between two random controls: if it
is as high, the atom's own says nothing about the atom. The atom at half its norm shows what two of a kind give.

    atom~gaussian        the paper's: an atom against a random outer product
    atom~orthogonal      against a random one whose sides are orthogonal to the atom's
    atom~other_atom      against another atom of the dictionary, which does not fire here
    gaussian~gaussian    THE CHECK: two random outer products
    gaussian~orthogonal  another pair of random ones
    atom~half_atom       against itself at half the norm
"""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel, WriteEdit
from hooked_recurrent.config import StrictConfig, require_positive
from hooked_recurrent.edits import Edit
from hooked_recurrent.patching.forks import run_edits
from writesae.config import require_one_of
from writesae.evaluation.firings import CellWrites, Firing, check_passages, encode_cell, sample_firings
from writesae.evaluation.low_rank import LowRank
from writesae.evaluation.result import Result, Told
from writesae.evaluation.statistics import interval
from writesae.sae.write_sae import WriteSAE

ADDED = ("atom", "half_atom", "other_atom", "gaussian", "second_gaussian", "orthogonal")
PAIRS = {
    "atom~gaussian": ("atom", "gaussian"),
    "atom~orthogonal": ("atom", "orthogonal"),
    "atom~other_atom": ("atom", "other_atom"),
    "gaussian~gaussian": ("gaussian", "second_gaussian"),
    "gaussian~orthogonal": ("gaussian", "orthogonal"),
    "atom~half_atom": ("atom", "half_atom"),
}
CHECK = "gaussian~gaussian"
_HIGH = 0.99


@dataclass(frozen=True)
class SelectivityConfig(StrictConfig):
    """Which firings, how strong an edit, which tokens count as shifted most."""

    sizes: tuple[int, ...] = (1, 5, 10, 20, 30, 32)
    """Sizes K of the token sets."""
    epsilon: float = 1.0
    """Frobenius norm of what is added, in units of `scale`."""
    scale: str = "unit"
    """"unit": the norm is epsilon itself (the paper's); "norm": epsilon times that of the native write."""
    ranked: str = "absolute"
    """Whether tokens are ranked by the "absolute" shift of their logits, or as they were "raised"."""
    per_atom: int = 2
    """Most firings of one atom."""
    total: int = 200
    """Most firings in all."""
    first_position: int = 8
    """Earliest position of a firing."""
    seed: int = 0
    """Seed of the firings and the controls."""

    def __post_init__(self) -> None:
        require_one_of("SelectivityConfig", "scale", self.scale, ("unit", "norm"))
        require_one_of("SelectivityConfig", "ranked", self.ranked, ("absolute", "raised"))
        require_positive("SelectivityConfig", epsilon=self.epsilon, per_atom=self.per_atom, total=self.total)
        require_positive("SelectivityConfig", first_position=self.first_position)
        if not self.sizes:
            raise ValueError("SelectivityConfig.sizes is empty; it needs one size of a token set at least")
        for size in self.sizes:
            require_positive("SelectivityConfig", sizes=size)


@dataclass(frozen=True, repr=False)
class SelectivityResult(Result):
    """A row per firing and pair: passage, position, atom, pair, cosine of the two matrices, shift_first and shift_second (root
    mean square of the logits' shifts), floor (the same, of an edit that changes nothing), and selectivity_{K}."""

    kind = "selectivity"

    vocabulary: int = 0
    """Tokens that the sets are drawn from."""

    def summary(self, n_resamples: int = 2000) -> list[dict[str, Any]]:
        """A row per pair and K. Intervals redraw passages; `chance` is that of two sets drawn blindly.

        minus_check is the mean difference, firing by firing, from the two random controls' selectivity: what the atom adds.
        """
        rows = []
        for pair in PAIRS:
            own = self.table[self.table["pair"] == pair]
            check = self.table[self.table["pair"] == CHECK]
            for size in self.config["sizes"]:
                values = own[f"selectivity_{size}"].to_numpy(dtype=float)
                apart = values - check[f"selectivity_{size}"].to_numpy(dtype=float)
                row = {"pair": pair, "K": size, "selectivity": float(values.mean())}
                row["interval"] = interval(values, own["passage"], n_resamples=n_resamples)
                row |= {"share_above_0.99": float((values > _HIGH).mean()), "chance": 1 - size / self.vocabulary}
                row |= {"minus_check": float(apart.mean())}
                row["minus_check_interval"] = interval(apart, own["passage"], n_resamples=n_resamples)
                row |= {"n": len(values), "n_passages": int(own["passage"].nunique())}
                rows.append(row | {"floor": float(own["floor"].max())})
        return rows

    def figure(self) -> Figure:
        """Selectivity against K, a line per pair."""
        figure = Figure(figsize=(5.4, 3.6), layout="constrained")
        axes = figure.subplots()
        rows = self.summary(n_resamples=200)
        for pair in PAIRS:
            mine = [row for row in rows if row["pair"] == pair]
            style: dict[str, Any] = {"color": "black", "linewidth": 2.5} if pair == CHECK else {}
            axes.plot([row["K"] for row in mine], [row["selectivity"] for row in mine], marker="o", label=pair, **style)
        axes.set(xlabel="K", ylabel="1 - overlap of the K most shifted tokens", ylim=(-0.02, 1.02))
        axes.legend(frameon=False)
        return figure


@torch.no_grad()
def selectivity(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    tokens: Int[Tensor, "passage pos"],
    *,
    layer: int,
    head: int,
    config: SelectivityConfig | None = None,
    on_progress: Told | None = None,
) -> SelectivityResult:
    """Compare the tokens that atoms and random matrices of equal norm shift most, at firings, in the logits at t.

    Args:
        model: any HookedRecurrentModel.
        sae: a dictionary of the cell whose atoms are outer products.
        tokens: held-out passages.
        layer, head: the cell.
        config: firings, strength, sizes of the sets.
        on_progress: told (edits done, edits in all).

    Raises:
        ValueError, IndexError: before anything is edited, for a cell or dictionary that does not fit, sets larger than the
            vocabulary, a dictionary of one atom, and passages on which no atom fires.
    """
    config = SelectivityConfig.given(config)
    check_passages(tokens)
    if max(config.sizes) > model.cfg.d_vocab:
        raise ValueError(f"a set of {max(config.sizes)} tokens is larger than the vocabulary, {model.cfg.d_vocab}")
    if sae.config.decoder == "dense":
        raise ValueError("the dictionary's atoms are dense matrices; this test compares outer products")
    if sae.config.n_atoms < 2:
        raise ValueError("an atom is compared with another one of its dictionary, and this one has a single atom")
    writes = encode_cell(model, sae, tokens, layer, head)
    firings = sample_firings(
        writes,
        first=config.first_position,
        last=tokens.shape[1] - 1,
        atoms=None,
        per_atom=config.per_atom,
        total=config.total,
        seed=config.seed,
    )
    if not firings:
        raise ValueError("no atom fires on these passages")
    generator = torch.Generator().manual_seed(config.seed)
    added = [_draw(sae, writes, firing, config, generator) for firing in firings]
    interventions: list[list[Edit]] = []
    for firing, matrices in zip(firings, added, strict=True):
        where: dict[str, Any] = {"layer": layer, "head": head, "position": firing.position, "batch": firing.passage}
        interventions.append([WriteEdit(op="scale", scale=1.0, **where)])
        interventions += [_adding(matrices[name], where) for name in ADDED]
    each = 1 + len(ADDED)
    plain: dict[int, Tensor] = {}  # of the passage that the forks are at: they come passage by passage
    kept: dict[int, dict[int, Tensor]] = {}
    rows: dict[int, list[dict[str, Any]]] = {}
    for fork in run_edits(model, tokens, interventions, horizon=0, on_progress=on_progress):
        index, place = divmod(fork.index, each)
        kept.setdefault(index, {})[place] = fork.logits[0].double()
        if len(kept[index]) == each:
            if fork.row not in plain:
                plain = {fork.row: model(tokens[fork.row : fork.row + 1])[0]}
            native = plain[fork.row][fork.position].double()
            rows[index] = _compared(firings[index], added[index], kept.pop(index), native, config)
    table = pd.DataFrame([row for index in sorted(rows) for row in rows[index]])
    return SelectivityResult(table, layer, head, config.to_dict(), vocabulary=model.cfg.d_vocab)


def _draw(
    sae: WriteSAE, writes: CellWrites, firing: Firing, config: SelectivityConfig, generator: torch.Generator
) -> dict[str, LowRank]:
    """What is added at a firing, all of one norm but for the half atom."""
    atom = LowRank(sae.key_atoms[firing.atom].detach(), sae.value_atoms[firing.atom].detach())
    here = writes.codes.indices[firing.passage, firing.position]
    active = here[writes.codes.values[firing.passage, firing.position] > 0].tolist()
    silent = [i for i in range(sae.config.n_atoms) if i not in active] or [
        i for i in range(sae.config.n_atoms) if i != firing.atom
    ]
    other = silent[int(torch.randint(len(silent), (1,), generator=generator))]

    def gaussian() -> LowRank:
        sides = (torch.randn(1, d, generator=generator) for d in (sae.config.d_k, sae.config.d_v))
        return LowRank(*(side.to(atom.key) for side in sides))

    first, second, third = gaussian(), gaussian(), gaussian()
    norm = config.epsilon
    if config.scale == "norm":
        norm *= float(writes.norms[firing.passage, firing.position])
    matrices = {
        "atom": atom,
        "other_atom": LowRank(sae.key_atoms[other].detach(), sae.value_atoms[other].detach()),
        "gaussian": first,
        "second_gaussian": second,
        "orthogonal": LowRank(_without(third.key, atom.key), _without(third.value, atom.value)),
    }
    return {name: matrix.at_norm(norm) for name, matrix in matrices.items()} | {"half_atom": atom.at_norm(norm / 2)}


def _without(side: Float[Tensor, "one d"], basis: Float[Tensor, "rank d"]) -> Float[Tensor, "one d"]:
    """The part of a vector orthogonal to some others."""
    directions = torch.linalg.qr(basis.double().T).Q
    return (side.double() - side.double() @ directions @ directions.T).to(side)


def _adding(matrix: LowRank, where: dict[str, Any]) -> list[Edit]:
    return [
        WriteEdit(op="add", key=key, value=value, **where) for key, value in zip(matrix.key, matrix.value, strict=True)
    ]


def _compared(
    firing: Firing,
    added: dict[str, LowRank],
    logits: dict[int, Tensor],
    native: Float[Tensor, " d_vocab"],
    config: SelectivityConfig,
) -> list[dict[str, Any]]:
    """The rows of one firing; shifts are against the fork whose edit changes nothing."""
    shifts = {name: logits[place] - logits[0] for place, name in enumerate(ADDED, start=1)}
    most = max(config.sizes)
    top = {
        name: (shift.abs() if config.ranked == "absolute" else shift).topk(most).indices.tolist()
        for name, shift in shifts.items()
    }
    rows = []
    for pair, (first, second) in PAIRS.items():
        row: dict[str, Any] = {
            "passage": firing.passage,
            "position": firing.position,
            "atom": firing.atom,
            "pair": pair,
        }
        row["cosine"] = added[first].cosine(added[second])
        row |= {"shift_first": _size(shifts[first]), "shift_second": _size(shifts[second])}
        row["floor"] = _size(logits[0] - native)
        for size in config.sizes:
            row[f"selectivity_{size}"] = 1 - len(set(top[first][:size]) & set(top[second][:size])) / size
        rows.append(row)
    return rows


def _size(shift: Float[Tensor, " d_vocab"]) -> float:
    return float(shift.square().mean().sqrt())
