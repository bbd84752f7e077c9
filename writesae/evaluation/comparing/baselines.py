"""Is it the rank-1 dictionary, or would anything do? Baselines of WriteSAE (arXiv:2605.12770) at the same firings and budget.

At every firing of a rank-1 dictionary the replacement test is also made with what something else would put there:

    flat_svd      FlatSAE + SVD: an ordinary sparse autoencoder's reconstruction, its leading outer product
    flat_atom     the leading outer product of that autoencoder's strongest atom (the paper says both)
    rank2         the strongest atom of a dictionary of rank-2 atoms
    pca           the leading outer product of what the first k principal components rebuild; it sees the native write
    one_for_all   the one outer product that rebuilds the cell's writes best, by its projection on the native write
    by_token      the leading outer product of the training text's mean write at the same token (ours: a table)

each as it comes (_coef) and at the native write's norm (_norm, as the paper does it), beside the dictionary's own strongest
atom, rank1_coef and rank1_norm. Flat and rank-2 dictionaries have as many atoms and as many of them active as the given one,
and are trained by its own TrainConfig from one stream of the given text.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from torch import Tensor

import writesae.evaluation.comparing.stand_ins as stand_ins
from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.config import StrictConfig, require_positive
from writesae.config import TrainConfig, WriteSAEConfig
from writesae.evaluation.comparing.head_to_head import against
from writesae.evaluation.firings import CellWrites, check_passages, encode_cell, trained_on
from writesae.evaluation.low_rank import LowRank
from writesae.evaluation.replacing.exchange import READINGS
from writesae.evaluation.replacing.replacement import ReplacementConfig, replacement
from writesae.evaluation.replacing.replacement_result import ReplacementResult
from writesae.evaluation.result import Result, Told
from writesae.evaluation.statistics import interval
from writesae.sae.write_sae import WriteSAE
from writesae.stream.corpus import Passages
from writesae.stream.sources import Source, collect
from writesae.training.jobs import Job, record_of, tokens_of
from writesae.training.metrics import measure
from writesae.training.run import HELDOUT_SAMPLES, stream_of, train_many

METHODS = ("flat_svd", "flat_atom", "rank2", "pca", "one_for_all", "by_token")
REFERENCE = "rank1"
SCALES = ("coef", "norm")


@dataclass(frozen=True)
class BaselinesConfig(StrictConfig):
    """Which firings are tested; how the dictionaries are trained follows from the given one."""

    per_atom: int = 5
    """Most firings of one atom of the given dictionary."""
    total: int = 400
    """Most firings in all."""
    horizon: int = 16
    """Tokens after the firing over which the horizon reading averages."""
    readings: tuple[str, ...] = READINGS
    """Which of "in_recurrence", "cache" and "horizon" are measured."""
    first_position: int = 8
    """Earliest position of a firing."""
    components: int | None = None
    """Principal components; None takes as many as atoms may be active."""
    fit_writes: int = 8192
    """Writes of the training text that the principal components and the one outer product are fitted to."""
    seed: int = 2026
    """Seed of the sample of firings and of the random controls."""

    def __post_init__(self) -> None:
        require_positive("BaselinesConfig", fit_writes=self.fit_writes)
        if self.components is not None:
            require_positive("BaselinesConfig", components=self.components)
        self.replacement()

    def replacement(self) -> ReplacementConfig:
        """The replacement test that this amounts to."""
        return ReplacementConfig(
            per_atom=self.per_atom,
            total=self.total,
            horizon=self.horizon,
            readings=self.readings,
            first_position=self.first_position,
            form="additive",
            seed=self.seed,
        )


@dataclass(frozen=True, repr=False)
class BaselinesResult(Result):
    """A replacement test (the table is its table) with the columns kl_<method>_<scale> of every baseline."""

    kind = "baselines"
    dictionaries: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Per trained or fitted method how well it rebuilds held-out text: fvu, l0, dead_fraction, parameters."""

    @property
    def replacement(self) -> ReplacementResult:
        """The replacement test alone."""
        return ReplacementResult(self.table, self.layer, self.head, self.config, self.about)

    def kl(self, name: str, reading: str) -> np.ndarray:
        """KL per firing of a method at a scale, such as "rank1_coef" or "flat_svd_norm", in nats."""
        method, _, scale = name.rpartition("_")
        column = f"kl_atom_dominant_{scale}" if method == REFERENCE else f"kl_{name}"
        return self.replacement.reading(reading)[column].to_numpy()

    def summary(self, n_resamples: int = 5000) -> list[dict[str, Any]]:
        """A row per reading, method and scale: win rate against deletion, and the comparison with rank1 at the same scale.

        difference is that of the win rates (method - rank1) with its interval over passages, log_ratio the median of
        log(KL method / KL rank1) with its interval, cliffs_delta above 0 where the method's KLs are the larger ones.
        """
        rows = []
        for reading in self.table["reading"].unique():
            delete = self.replacement.reading(str(reading))["kl_delete"].to_numpy()
            passages = self.replacement.reading(str(reading))["passage"].to_numpy()
            floor = self.replacement.floor(str(reading))[1]
            for scale in SCALES:
                reference = self.kl(f"{REFERENCE}_{scale}", str(reading))
                for method in (REFERENCE, *METHODS):
                    mine = self.kl(f"{method}_{scale}", str(reading))
                    row: dict[str, Any] = {"reading": str(reading), "method": method, "scale": scale, "n": len(mine)}
                    row["n_passages"] = len(np.unique(passages))
                    row["win_rate"] = float((mine < delete).mean())
                    row["by_passage"] = interval(mine < delete, passages, "mean", n_resamples)
                    row["median_kl"] = float(np.median(mine))
                    if method != REFERENCE:
                        row |= against(mine, reference, delete, passages, floor, n_resamples)
                    row["fvu"] = self._fvu(method)
                    rows.append(row | {"floor_max": floor})
        return rows

    def _fvu(self, method: str) -> float | None:
        name = "flat" if method.startswith("flat") else method
        return self.dictionaries.get(name, {}).get("fvu")

    def figure(self, reading: str = "in_recurrence") -> Figure:
        """Win rate of every method at both scales, with intervals over passages."""
        rows = [row for row in self.summary(1000) if row["reading"] == reading]
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for shift, scale in zip((-0.15, 0.15), SCALES, strict=True):
            mine = [row for row in rows if row["scale"] == scale]
            rates = np.array([row["win_rate"] for row in mine])
            low, high = np.array([row["by_passage"] for row in mine]).T
            places = np.arange(len(mine)) + shift
            axes.errorbar(places, rates, [rates - low, high - rates], fmt="o", capsize=3, label=f"at its {scale}")
        axes.set_xticks(range(len(METHODS) + 1), [REFERENCE, *METHODS], rotation=30, ha="right")
        axes.axhline(0.5, color="grey", linewidth=0.8)
        axes.set(ylabel="share of firings won against deletion", ylim=(0, 1.02), title=reading)
        axes.legend()
        return figure


def baselines(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    tokens: Int[Tensor, "passage pos"],
    *,
    layer: int,
    head: int,
    train_tokens: stand_ins.TrainText,
    config: BaselinesConfig | None = None,
    on_progress: Told | None = None,
) -> BaselinesResult:
    """Train the baselines of a dictionary at its budget, and put all of them in the place of writes at its firings.

    Args:
        model: any HookedRecurrentModel.
        sae: a dictionary of rank-1 atoms of the cell, whose provenance says how it was trained.
        tokens: held-out passages.
        layer, head: the cell.
        train_tokens: the text that `sae` was trained on; `Passages` leave their record.
        config: which firings.
        on_progress: called with (firings done, firings in all).

    Raises:
        ValueError, IndexError: as `replacement` and `train_many`; a dictionary that does not say how it was trained, or one of
            other than rank-1 atoms.
    """
    config = BaselinesConfig.given(config)
    check_passages(tokens)
    training = budget_of(sae)
    if sae.config.rank != 1 or sae.config.decoder == "dense":
        came = "dense" if sae.config.decoder == "dense" else f"of rank {sae.config.rank}"
        raise ValueError(f"the baselines stand beside atoms of rank 1, but those of this dictionary are {came}")
    source = trained_on(sae, layer, head)
    if source.form != "additive":
        raise ValueError(
            f"the baselines stand in for additive writes, but the dictionary was trained on {source.form} writes"
        )
    jobs = [
        Job("flat", source, flat_config(sae.config)),
        Job("rank2", source, replace(sae.config, rank=2)),
    ]
    trained = {
        name: result.sae for name, result in train_many(model, jobs, tokens=train_tokens, config=training).items()
    }
    with torch.no_grad():
        writes = {name: encode_cell(model, other, tokens, layer, head) for name, other in trained.items()}
        others, fitted = _others(model, trained, writes, tokens, tokens_of(train_tokens), layer, head, config)
        run = config.replacement()
        result = replacement(
            model, sae, tokens, layer=layer, head=head, config=run, others=others, on_progress=on_progress
        )
        dictionaries = _quality(model, {REFERENCE: sae, **trained}, tokens, source, training) | fitted
    about = {"train_text": record_of(train_tokens), "training": training.to_dict()}
    about["text_of_the_dictionary"] = sae.provenance.get("split", {}).get("train")
    return BaselinesResult(result.table, layer, head, config.to_dict(), about, dictionaries)


def budget_of(sae: WriteSAE) -> TrainConfig:
    """How a dictionary was trained, as its provenance says; `ValueError` where it does not."""
    given = sae.provenance.get("training")
    if not given:
        raise ValueError(
            "the dictionary does not say how it was trained (provenance 'training'); no budget can be equal"
        )
    return replace(TrainConfig.from_dict(given), splice_passages=0, log_to=(), save_every=0)


def flat_config(config: WriteSAEConfig) -> WriteSAEConfig:
    """The ordinary sparse autoencoder of as many atoms."""
    same = {name: getattr(config, name) for name in ("n_atoms", "k", "center", "start", "seed")}
    return WriteSAEConfig.preset("flat", config.d_k, config.d_v, **same)


def _others(
    model: HookedRecurrentModel,
    trained: dict[str, WriteSAE],
    writes: dict[str, CellWrites],
    tokens: Tensor,
    text: Tensor,
    layer: int,
    head: int,
    config: BaselinesConfig,
) -> tuple[dict[str, stand_ins.StandIn], dict[str, dict[str, Any]]]:
    """Every method at both scales, by name; and how well what was fitted here rebuilds the held-out writes."""
    native = writes["flat"]
    key, value = _written(model, text, Source(f"blocks.{layer}.mixer.hook_write", head))
    order = torch.randperm(len(key), generator=torch.Generator().manual_seed(config.seed))[: config.fit_writes]
    fit = key[order.to(key.device)], value[order.to(key.device)]
    pca = stand_ins.principal_components(*fit, config.components or trained["flat"].config.k, config.seed)
    best = stand_ins.best_outer_product(*fit)
    found = {
        "flat_svd": stand_ins.reconstructed(trained["flat"], native),
        "flat_atom": stand_ins.strongest(trained["flat"], native, whole=False),
        "rank2": stand_ins.strongest(trained["rank2"], writes["rank2"]),
        "pca": stand_ins.components(pca, native),
        "one_for_all": stand_ins.one_for_all(best, native),
        "by_token": stand_ins.by_token(key, value, text[:, 1:].flatten().to(key.device), tokens),
    }
    as_is = {f"{name}_coef": stand_in for name, stand_in in found.items()}
    scaled = {f"{name}_norm": stand_ins.native_norm(stand_in, native) for name, stand_in in found.items()}
    return as_is | scaled, _fitted_quality(native, pca, best, config.first_position)


def _written(model: HookedRecurrentModel, text: Tensor, source: Source) -> tuple[Tensor, Tensor]:
    """Keys and values of all writes of a text but those at position 0, which is always the start token."""
    records = [collect(model, rows, [source])[source] for rows in text.split(8)]
    key, value = (torch.cat([record[side][:, 1:] for record in records]).flatten(0, 1) for side in ("key", "value"))
    return key, value


def _fitted_quality(native: CellWrites, pca: PCA, best: LowRank, first: int) -> dict[str, dict[str, Any]]:
    """FVU of principal components and of the one outer product on the held-out writes, passage by passage."""
    error = dict.fromkeys(("pca", "one_for_all"), 0.0)
    power, count = 0.0, 0
    total: Float[Tensor, "d_k d_v"] | float = 0.0
    for key, value in zip(native.key[:, first:].double().cpu(), native.value[:, first:].double().cpu(), strict=True):
        x = key[:, :, None] * value[:, None, :]
        flat = x.flatten(1).numpy()
        error["pca"] += float(((flat - pca.inverse_transform(pca.transform(flat))) ** 2).sum())
        inner = (key @ best.key.double().cpu().T) * (value @ best.value.double().cpu().T)
        error["one_for_all"] += float((flat**2).sum() - inner.square().sum())
        power, count, total = power + float((flat**2).sum()), count + len(flat), total + x.sum(0)
    variance = power - float((torch.as_tensor(total) ** 2).sum()) / count
    return {name: {"fvu": value / variance} for name, value in error.items()}


def _quality(
    model: HookedRecurrentModel,
    dictionaries: dict[str, WriteSAE],
    tokens: Tensor | Passages,
    source: Source,
    training: TrainConfig,
) -> dict[str, dict[str, Any]]:
    """Quality of the dictionaries on held-out samples of what they were trained on, and their sizes."""
    samples = stream_of(model, tokens, [source], training).sample(HELDOUT_SAMPLES)[source]
    found = {}
    for name, dictionary in dictionaries.items():
        parameters = sum(parameter.numel() for parameter in dictionary.parameters())
        found[name] = {**measure(dictionary, samples).to_dict(), "parameters": parameters}
    return found
