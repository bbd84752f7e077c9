"""The encoder swap (WriteSAE, arXiv:2605.12770): every pairing of encoder and decoder, at one budget, over seeds and cells.

Five types: flat (linear encoder, dense atoms), rank1 (linear encoder, outer products), bilinear, bilinear_tied, bilinear_flat
(dense atoms). All dictionaries of a seed learn from one stream of writes; then each is measured on held-out text (FVU, squared
error, atoms that never fire, active atoms) and in the replacement test, all at the same firings:

    atom_coef             the strongest atom at its coefficient; of a dense atom its leading outer product
    atom_norm             the same at the native write's norm
    reconstruction_norm   the leading outer product of all that the code rebuilds, at the native write's norm

A seed is that of the first factors and of the order of the writes. With a folder everything is resumable: training from its
checkpoints, measurements cell by cell.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor

import writesae.evaluation.comparing.stand_ins as stand_ins
from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.config import StrictConfig, require_positive
from hooked_recurrent.files import plain, write_text
from writesae.config import PRESETS, TrainConfig, WriteSAEConfig, require_one_of
from writesae.evaluation.firings import check_passages, encode_cell
from writesae.evaluation.replacing.exchange import READINGS
from writesae.evaluation.replacing.replacement import ReplacementConfig, replacement
from writesae.evaluation.result import Result, Told
from writesae.evaluation.statistics import interval
from writesae.sae.samples import Factored
from writesae.sae.write_sae import WriteSAE
from writesae.stream.sources import Source
from writesae.stream.store import model_fingerprint, tokens_fingerprint
from writesae.training.jobs import Job, tokens_of
from writesae.training.metrics import measure
from writesae.training.run import train_many

TYPES = ("flat", "rank1", "bilinear", "bilinear_flat", "bilinear_tied")
STAND_INS = ("atom_coef", "atom_norm", "reconstruction_norm")
QUALITY = ("fvu", "mse", "dead_fraction", "l0", "parameters")


def _outer(preset: str) -> bool:
    return PRESETS[preset][1] == "outer_product"


@dataclass(frozen=True)
class EncoderSwapConfig(StrictConfig):
    """Which dictionaries are trained, how long, and on how many firings they are tested."""

    presets: tuple[str, ...] = TYPES
    """Types of dictionaries, by their presets; the firings are those of a bilinear one, else of the first of outer products."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each trains every type on every cell."""
    n_atoms: int = 512
    """Atoms of every dictionary."""
    k: int = 8
    """Atoms that may be active at once."""
    steps: int = 600
    """Training steps of every dictionary."""
    batch_size: int = 256
    """Writes per step."""
    lr: float = 5e-3
    """Learning rate of every dictionary; a tenth of it at the end."""
    per_atom: int = 3
    """Most firings of one atom."""
    total: int = 150
    """Most firings per cell."""
    horizon: int = 16
    """Tokens after the firing over which the horizon reading averages."""
    readings: tuple[str, ...] = READINGS
    """Which of "in_recurrence", "cache" and "horizon" are measured."""
    first_position: int = 8
    """Earliest position of a firing, and of the writes that the quality is measured on."""
    seed: int = 2026
    """Seed of the sample of firings."""

    def __post_init__(self) -> None:
        for preset in self.presets:
            require_one_of("EncoderSwapConfig", "presets", preset, tuple(PRESETS))
        for name in ("presets", "seeds"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise ValueError(f"EncoderSwapConfig.{name} must be one or more different ones, got {given}")
        if not any(map(_outer, self.presets)):
            raise ValueError(
                f"EncoderSwapConfig.presets needs one of outer products, whose firings to test; got {self.presets}"
            )
        self.replacement()
        self.training(0)
        require_positive("EncoderSwapConfig", n_atoms=self.n_atoms, k=self.k)

    def replacement(self) -> ReplacementConfig:
        """The replacement test of every cell."""
        return ReplacementConfig(
            per_atom=self.per_atom,
            total=self.total,
            horizon=self.horizon,
            readings=self.readings,
            first_position=self.first_position,
            seed=self.seed,
        )

    def training(self, seed: int) -> TrainConfig:
        """The training of one seed."""
        sizes = {"steps": self.steps, "batch_size": self.batch_size, "lr": self.lr, "lr_min": self.lr / 10}
        return TrainConfig(**sizes, seed=seed, splice_passages=0)  # type: ignore[arg-type]


@dataclass(frozen=True, repr=False)
class EncoderSwapResult(Result):
    """A row per dictionary, reading and stand-in; layer and head of the result are those of the first cell.

    Columns: layer, head, preset, seed; fvu, mse (per entry of the matrix), dead_fraction, l0, parameters; reading, stand_in,
    n, win_rate against deletion with low and high (over passages), median_kl, median_kl_delete, closer (share of the
    firings with a smaller KL than the dictionary whose firings they are; NaN for itself), floor_max.
    """

    kind = "encoder_swap"
    cells: list[list[int]] = field(default_factory=list)
    """The cells (layer, head)."""

    def summary(self) -> list[dict[str, Any]]:
        """A row per type, reading and stand-in: means over cells and seeds, the win rate also from lowest to highest."""
        rows = []
        groups = self.table.groupby(["preset", "reading", "stand_in"], sort=False)
        for (preset, reading, stand_in), group in groups:
            row: dict[str, Any] = {"preset": preset, "reading": reading, "stand_in": stand_in}
            row |= {"n_dictionaries": len(group), "n": int(group["n"].sum())}
            row |= {"win_rate": float(group["win_rate"].mean())}
            row |= {"lowest_to_highest": [float(group["win_rate"].min()), float(group["win_rate"].max())]}
            row |= {"closer": float(group["closer"].mean()), "median_kl": float(group["median_kl"].median())}
            row |= {name: float(group[name].mean()) for name in QUALITY}
            rows.append(row | {"floor_max": float(group["floor_max"].max())})
        return rows

    def figure(self, reading: str = "in_recurrence") -> Figure:
        """Win rate over what is unexplained, a point per dictionary: does rebuilding better mean replacing better?"""
        rows = self.table[self.table["reading"] == reading]
        figure = Figure(figsize=(4 * len(STAND_INS), 3.6), layout="constrained")
        for axes, stand_in in zip(figure.subplots(1, len(STAND_INS), sharey=True), STAND_INS, strict=True):
            mine = rows[rows["stand_in"] == stand_in]
            for preset, group in mine.groupby("preset", sort=False):
                axes.plot(group["fvu"], group["win_rate"], "o", label=str(preset), alpha=0.7)
            axes.axhline(0.5, color="grey", linewidth=0.8)
            axes.set(xlabel="held-out variance unexplained", ylabel="share won against deletion", title=stand_in)
        axes.legend(fontsize="small")
        return figure


def encoder_swap(
    model: HookedRecurrentModel,
    tokens: Int[Tensor, "passage pos"],
    *,
    train_tokens: stand_ins.TrainText,
    cells: Sequence[tuple[int, int]],
    config: EncoderSwapConfig | None = None,
    folder: str | Path | None = None,
    on_progress: Told | None = None,
) -> EncoderSwapResult:
    """Train every type on every cell with every seed, and measure all of them.

    Args:
        model: any HookedRecurrentModel.
        tokens: held-out passages.
        train_tokens: passages to train on.
        cells: (layer, head) of every cell.
        config: which dictionaries, sizes, seeds.
        folder: where training and measurements are kept; a second call with the same arguments goes on there.
        on_progress: called with (seeds trained + cells measured, all of both).

    Raises:
        ValueError, IndexError: cells that do not exist, and a folder that holds another run.
    """
    config = EncoderSwapConfig.given(config)
    check_passages(tokens)
    check_cells(model, cells)
    steps, done = len(config.seeds) + len(cells), 0
    description = _claim(model, tokens, train_tokens, config, folder)
    dictionaries: dict[tuple[int, int], dict[tuple[str, int], WriteSAE]] = {(layer, head): {} for layer, head in cells}
    for seed in config.seeds:
        jobs = {
            (*cell, preset): job_of(model, *cell, preset, seed, config) for cell in cells for preset in config.presets
        }
        out = None if folder is None else Path(folder) / f"seed-{seed}"
        trained = train_many(
            model,
            list(jobs.values()),
            tokens=train_tokens,
            config=config.training(seed),
            out=out,
            resume=out is not None,
        )
        for (layer, head, preset), job in jobs.items():
            dictionaries[layer, head][preset, seed] = trained[job.name].sae
        done += 1
        if on_progress is not None:
            on_progress(done, steps)
    rows: list[dict[str, Any]] = []
    for layer, head in cells:
        path = None if folder is None else Path(folder) / f"measured-l{layer}h{head}.json"
        rows += _kept(path, lambda: _measure(model, dictionaries[layer, head], tokens, layer, head, config))  # noqa: B023
        done += 1
        if on_progress is not None:
            on_progress(done, steps)
    found = [list(cell) for cell in cells]
    layer, head = cells[0]
    return EncoderSwapResult(pd.DataFrame(rows), layer, head, config.to_dict(), description, found)


def check_cells(model: HookedRecurrentModel, cells: Sequence[tuple[int, int]]) -> None:
    """Raise unless these are one or more different cells (layer, head) of the model: `ValueError`, `IndexError`."""
    if not cells or len(set(map(tuple, cells))) < len(cells):
        raise ValueError(f"cells must be one or more different ones (layer, head), got {list(cells)}")
    for layer, head in cells:
        if layer not in model.cfg.recurrent_layers or not 0 <= head < model.cfg.n_heads:
            there = f"layers {model.cfg.recurrent_layers}, heads 0 to {model.cfg.n_heads - 1}"
            raise IndexError(f"there is no cell (layer {layer}, head {head}); the model has {there}")


def _claim(
    model: HookedRecurrentModel,
    tokens: Tensor,
    text: stand_ins.TrainText,
    config: EncoderSwapConfig,
    folder: str | Path | None,
) -> dict[str, Any]:
    """What the numbers depend on, which a folder remembers; `ValueError` where it remembers something else."""
    description = {
        "weights": model_fingerprint(model),
        "train_tokens": tokens_fingerprint(tokens_of(text)),
        "tokens": tokens_fingerprint(tokens),
        "config": json.loads(json.dumps(config.to_dict())),
    }
    if folder is not None:
        path = Path(folder) / "encoder_swap.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else description
        differing = [name for name in description if before.get(name) != description[name]]
        if differing:
            raise ValueError(f"{folder} holds an encoder swap of other {', '.join(differing)}; choose another folder")
        write_text(path, json.dumps(description, indent=1))
    return {name: description[name] for name in ("weights", "train_tokens", "tokens")}


def _kept(path: Path | None, measure_now: Any) -> list[dict[str, Any]]:
    """Rows from a file where they are there; else measured, and written there."""
    if path is not None and path.exists():
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [{name: float("nan") if value is None else value for name, value in row.items()} for row in rows]
    rows = measure_now()
    if path is not None:
        write_text(path, json.dumps(plain(rows), allow_nan=False))
    return rows


def job_of(model: HookedRecurrentModel, layer: int, head: int, preset: str, seed: int, config: EncoderSwapConfig) -> Job:
    """The training of one type on one cell."""
    sizes = {"n_atoms": config.n_atoms, "k": config.k, "seed": seed}
    dictionary = WriteSAEConfig.preset(preset, model.cfg.d_k, model.cfg.d_v, **sizes)
    return Job(f"l{layer}h{head}-{preset}", Source(f"blocks.{layer}.mixer.hook_write", head), dictionary)


@torch.no_grad()
def _measure(
    model: HookedRecurrentModel,
    dictionaries: dict[tuple[str, int], WriteSAE],
    tokens: Tensor,
    layer: int,
    head: int,
    config: EncoderSwapConfig,
) -> list[dict[str, Any]]:
    """Rows of all dictionaries of one cell, which meet the same firings."""
    outer = [name for name in dictionaries if _outer(name[0])]
    first = next((name for name in outer if name[0] == "bilinear"), outer[0])
    others: dict[str, stand_ins.StandIn] = {}
    quality: dict[tuple[str, int], dict[str, float]] = {}
    for (preset, seed), sae in dictionaries.items():
        writes = encode_cell(model, sae, tokens, layer, head)
        atom = stand_ins.strongest(sae, writes, whole=False)
        others[f"{preset}_s{seed}_atom_coef"] = atom
        others[f"{preset}_s{seed}_atom_norm"] = stand_ins.native_norm(atom, writes)
        rebuilt = stand_ins.native_norm(stand_ins.reconstructed(sae, writes), writes)
        others[f"{preset}_s{seed}_reconstruction_norm"] = rebuilt
        sides = (side[:, config.first_position :].flatten(0, 1) for side in (writes.key, writes.value))
        quality[preset, seed] = _quality(sae, Factored(*sides))
    test = replacement(
        model, dictionaries[first], tokens, layer=layer, head=head, config=config.replacement(), others=others
    )
    rows = []
    for reading in test.table["reading"].unique():
        table = test.reading(reading)
        for preset, seed in dictionaries:
            for stand_in in STAND_INS:
                row: dict[str, Any] = {"layer": layer, "head": head, "preset": preset, "seed": seed}
                row |= {**quality[preset, seed], "reading": reading, "stand_in": stand_in}
                itself = None if (preset, seed) == first else f"kl_{first[0]}_s{first[1]}_{stand_in}"
                row |= _wins(table, f"kl_{preset}_s{seed}_{stand_in}", itself)
                rows.append(row | {"floor_max": test.floor(reading)[1]})
    return rows


def _quality(sae: WriteSAE, samples: Factored) -> dict[str, float]:
    found = measure(sae, samples).to_dict()
    power = float(samples.to(dtype=torch.float64).squared_norms().mean())
    variance = power - float(samples.mean().square().sum())
    found["mse"] = found["fvu"] * variance / (samples.d_k * samples.d_v)
    found["parameters"] = sum(parameter.numel() for parameter in sae.parameters())
    return {name: found[name] for name in QUALITY}


def _wins(table: pd.DataFrame, column: str, reference: str | None) -> dict[str, Any]:
    kl, delete, passages = (table[name].to_numpy() for name in (column, "kl_delete", "passage"))
    low, high = interval(kl < delete, passages, "mean", 1000)
    return {
        "n": len(kl),
        "win_rate": float((kl < delete).mean()),
        "low": low,
        "high": high,
        "median_kl": float(np.median(kl)),
        "median_kl_delete": float(np.median(delete)),
        "closer": float("nan") if reference is None else float((kl < table[reference]).mean()),
    }
