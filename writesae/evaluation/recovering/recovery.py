"""How many planted atoms a dictionary finds again, for every variant.

    cosine of a learned atom B and a planted one A:   <A, B> / (|A| |B|),  for outer products the product of the factors'

The sign counts: coefficients are positive on both sides, so an atom found with the wrong sign is not found. Both an
assignment of one learned atom to every planted one (Hungarian method, the sum of cosines at its largest) and the best
match of every planted atom are scored; they differ where one learned atom stands for several planted ones.

A dense atom is compared as it is and, as where it is to be used in a write's place, by its leading outer product
sigma_1 u_1 v_1^T: the baseline "FlatSAE + SVD" of arXiv:2605.12770.

    result = recovery(Planted(n_atoms=512, k=8, noise=0.01), ["bilinear", "flat"], seeds=(0, 1))
    result.to_dataframe()
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from writesae.config import PRESETS, TrainConfig, WriteSAEConfig, require_one_of
from writesae.evaluation.recovering.planted import Planted, PlantedAtoms
from writesae.evaluation.recovering.recovery_result import RecoveryResult
from writesae.sae import WriteSAE
from writesae.training import fit, measure

AS_LEARNED, SVD = "as learned", "svd"
THRESHOLD = 0.95
FRESH_SAMPLES = 4096
"""Samples on which FVU, L0 and dead atoms are measured; none was trained on."""
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"preset": name} for name in PRESETS},
    "bilinear_jumprelu": {"preset": "bilinear_jumprelu", "sparsity": 0.01, "bandwidth": 0.05, "init_threshold": 0.05},
    "bilinear_batch_topk": {"preset": "bilinear", "activation": "batch_topk"},
    "bilinear_hard_gated": {"preset": "bilinear", "activation": "gated", "sparsity": 0.03},
    "bilinear_matryoshka": {"preset": "bilinear", "matryoshka": "halves"},
}
"""By name, a preset and the fields of WriteSAEConfig that differ; matryoshka "halves" are a quarter and a half of the atoms."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Match:
    """How well learned atoms match planted ones."""

    recovered: float
    """Share of planted atoms whose partner in the one-to-one assignment has a cosine above the threshold."""
    recovered_best: float
    """Share of planted atoms for which any learned atom has."""
    mean_max_cosine: float
    """Mean over planted atoms of the largest cosine with a learned one."""


def match(cosines: Float[Tensor, "learned planted"], threshold: float = THRESHOLD) -> Match:
    """Score a matrix of cosines; with fewer learned atoms than planted ones the surplus stays without a partner.

    Raises `ValueError` when either side is empty or a cosine is not finite.
    """
    if 0 in cosines.shape or not bool(torch.isfinite(cosines).all()):
        raise ValueError(f"match needs finite cosines between some atoms, got {tuple(cosines.shape)} of them")
    best = cosines.amax(0)
    learned, planted = linear_sum_assignment(cosines.double().cpu().numpy(), maximize=True)
    found = int((cosines[learned, planted] > threshold).sum()) / cosines.shape[1]
    return Match(found, float((best > threshold).double().mean()), float(best.double().mean()))


@torch.no_grad()
def cosines_with(sae: WriteSAE, atoms: PlantedAtoms) -> dict[str, Float[Tensor, "learned planted"]]:
    """Cosines of the learned atoms with the planted ones, by reading: "as learned", and "svd" where atoms are dense.

    A learned atom that is zero has cosine 0 with all.
    """
    if sae.config.decoder == "dense":
        x = sae.decoder.atoms.detach()
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        inner = torch.einsum("nkv,mk,mv->nm", x, atoms.key.to(x), atoms.value.to(x))
        leading = (u[:, :, 0] @ atoms.key.to(x).T) * (vh[:, 0] @ atoms.value.to(x).T)
        there = (x.flatten(1).norm(dim=1) > 0)[:, None]
        return {AS_LEARNED: _over(inner, x.flatten(1).norm(dim=1)), SVD: torch.where(there, leading, 0.0)}
    key, value = sae.key_atoms.detach(), sae.value_atoms.detach()
    inner = ((key @ atoms.key.to(key).T) * (value @ atoms.value.to(value).T)).sum(1)
    return {AS_LEARNED: _over(inner, sae.atom_norms().detach())}


def _over(inner: Tensor, norms: Tensor) -> Tensor:
    return inner / norms.clamp_min(torch.finfo(norms.dtype).tiny)[:, None]


def recovery(
    planted: Planted | None = None,
    variants: Iterable[str] | Mapping[str, Mapping[str, Any]] = tuple(VARIANTS),
    *,
    name: str = "",
    seeds: Sequence[int] = (0,),
    n_atoms: int | None = None,
    k: int | None = None,
    train: TrainConfig | Mapping[str, TrainConfig] | None = None,
    threshold: float = THRESHOLD,
    progress: Progress | None = None,
) -> RecoveryResult:
    """Plant atoms, train every variant on samples made of them, and count how many it finds again.

    Args:
        planted: what to plant; by default 512 atoms at d = 64, eight in a write, 1% noise.
        variants: names from `VARIANTS`, or a mapping of names to fields of WriteSAEConfig (and "preset").
        name: what the planting is called in the table; its kind by default.
        seeds: one dictionary per variant and seed; a seed fixes the initial factors and the samples, not the planted
            atoms, which have their own.
        n_atoms: learned atoms; as many as are planted by default.
        k: active atoms; as many as are in a write by default. A state holds more.
        train: how to train, for all variants or by variant; its seed is replaced.
        threshold: the cosine above which an atom counts as found.
        progress: called as progress(variant and seed, done, total) after every dictionary.

    Raises:
        ValueError: an unknown variant, or no variant or seed at all.
    """
    planted = planted or Planted()
    fields = _fields(variants)
    if not fields or not seeds:
        raise ValueError(f"recovery needs a variant and a seed, got {len(fields)} and {len(seeds)}")
    shape = {"d_k": planted.d_k, "d_v": planted.d_v, "n_atoms": n_atoms or planted.n_atoms, "k": k or planted.k}
    atoms, rows = PlantedAtoms(planted), []
    configs = {one: config_of(train, one) for one in fields}
    for variant, given in fields.items():
        for seed in seeds:
            sae = WriteSAE(_config(given, {**shape, "seed": seed}))
            rows += [
                {"planted": name or planted.kind, "variant": variant, **row}
                for row in _run(sae, atoms, replace(configs[variant], seed=seed), threshold)
            ]
            if progress:
                progress(f"{variant}, seed {seed}", len(rows), len(fields) * len(seeds))
    trained = {variant: config.to_dict() for variant, config in configs.items()}
    about = {"planted": planted.to_dict(), "dictionary": shape, "variants": fields, "train": trained}
    return RecoveryResult(pd.DataFrame(rows), threshold, {name or planted.kind: about})


def _run(sae: WriteSAE, atoms: PlantedAtoms, train: TrainConfig, threshold: float) -> list[dict[str, Any]]:
    """Train one dictionary; a row for each reading of its atoms."""
    calibration, training, fresh = (2 * train.seed + 10**6 * part for part in (1, 2, 3))
    generator = torch.Generator().manual_seed(calibration)
    sae.calibrate_(atoms.draw(train.calibration_writes, generator))
    start = time.perf_counter()
    fit(sae, atoms.batches(train.batch_size, training), train)
    seconds = time.perf_counter() - start
    quality = measure(sae, atoms.draw(FRESH_SAMPLES, torch.Generator().manual_seed(fresh)))
    shared = {
        "fvu": quality.fvu,
        "l0": quality.l0,
        "dead_fraction": quality.dead_fraction,
        "n_learned": sae.config.n_atoms,
        "k": sae.config.k,
        "steps": train.steps,
        "seconds": seconds,
    }
    found = {reading: match(cosines, threshold) for reading, cosines in cosines_with(sae, atoms).items()}
    return [{"atoms": reading, "seed": train.seed, **asdict(one), **shared} for reading, one in found.items()]


def config_of(train: TrainConfig | Mapping[str, TrainConfig] | None, variant: str) -> TrainConfig:
    """The training configuration of one variant."""
    return train if isinstance(train, TrainConfig) else (train or {}).get(variant, TrainConfig())


def _fields(variants: Iterable[str] | Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    if isinstance(variants, Mapping):
        return {name: dict(fields) for name, fields in variants.items()}
    names = [variants] if isinstance(variants, str) else list(variants)
    for name in names:
        require_one_of("recovery", "variants", name, tuple(VARIANTS))
    return {name: dict(VARIANTS[name]) for name in names}


def _config(fields: Mapping[str, Any], shape: Mapping[str, int]) -> WriteSAEConfig:
    """The configuration of one dictionary."""
    fields = dict(fields)
    if fields.get("matryoshka") == "halves":
        fields["matryoshka"] = (shape["n_atoms"] // 4, shape["n_atoms"] // 2)
    return WriteSAEConfig.preset(fields.pop("preset", "bilinear"), **{**shape, **fields})
