"""The single-position sign test (WriteSAE, arXiv:2605.12770; protocol 8): is a cached edit's effect of the predicted sign?

At one position t the state of one head is changed after t has been read, S_t += m x v_T*^T, with m in units of the native
write's norm, v_T* = W_O[h] W_U[T] of length 1, and as key side x one of

    native_key   the write key of t
    next_query   the query of t + 1
    atom_key     the key side of the atom with the largest coefficient at t

The change of log p(T) at t + 1 is measured, and predicted twice: by first order (x^T Lambda v_T*, Lambda being the gradient
with respect to what is carried on from t), and by the paper's product, decay x <x, q_{t+1}> x |W_O[h] W_U[T]|, which leaves
out the erase, the gated norms and everything above the layer, and predicts a logit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel, WriteEdit
from hooked_recurrent.config import StrictConfig, require_positive
from hooked_recurrent.patching.forks import run_edits
from writesae.evaluation.firings import CellWrites, check_cell, check_passages, encode_cell
from writesae.evaluation.installing.install_directions import atom_keys, unembedding_values, unit
from writesae.evaluation.result import Result, Told
from writesae.evaluation.statistics import cluster_bootstrap, wilson_interval
from writesae.sae.write_sae import WriteSAE

KEYS = ("native_key", "next_query", "atom_key")
PREDICTORS = ("first_order", "product")


@dataclass(frozen=True)
class SignTestConfig(StrictConfig):
    """Which edits are tried."""

    total: int = 2000
    """(position, token) pairs; each is tried with every key side (2,000 in the paper)."""
    per_position: int = 4
    """Tokens that share a position, and with it the plain pass and the backward pass."""
    magnitude: float = 1.0
    """Norm of the edit in units of the native write's."""
    first_position: int = 8
    """Earliest position."""
    seed: int = 2026
    """Seed of positions and tokens."""

    def __post_init__(self) -> None:
        require_positive("SignTestConfig", total=self.total, per_position=self.per_position)
        require_positive("SignTestConfig", magnitude=self.magnitude, first_position=self.first_position)


@dataclass(frozen=True, repr=False)
class SignTestResult(Result):
    """A row per position, token and key side: measured change of log p(T) and of the logit, and what was predicted, in nats."""

    kind = "sign_test"

    def summary(self, n_resamples: int = 5000) -> list[dict[str, Any]]:
        """A row per key side (and all together) and predictor.

        Sign agreement with Wilson's interval and that clustered by passage, Pearson r with its p-value, median of measured /
        predicted, and R^2 = 1 - SS_res / SS_tot with nothing fitted. first_order predicts log p(T), product the logit; edits
        whose predicted or measured change is exactly 0 have no sign and disagree.
        """
        rows = []
        for key in (*self.table["key"].unique(), "all"):
            part = self.table if key == "all" else self.table[self.table["key"] == key]
            for predictor, measured in zip(PREDICTORS, ("delta_logprob", "delta_logit"), strict=True):
                found = _agreement(part[measured].to_numpy(), part[predictor].to_numpy(), part["passage"], n_resamples)
                rows.append({"key": str(key), "predictor": predictor, "measured": measured, **found})
        return rows

    def figure(self) -> Figure:
        """Measured against predicted, a panel per predictor."""
        figure = Figure(figsize=(9, 4), layout="constrained")
        for place, (predictor, measured) in enumerate(zip(PREDICTORS, ("delta_logprob", "delta_logit"), strict=True)):
            axes = figure.add_subplot(1, 2, place + 1)
            for key, part in self.table.groupby("key", sort=False):
                axes.scatter(part[predictor], part[measured], s=4, alpha=0.5, label=str(key))
            axes.axline((0, 0), slope=1, color="0.6", linestyle="--")
            axes.set(xlabel=f"predicted: {predictor}", ylabel=f"measured: {measured}")
            axes.legend(fontsize=7)
        return figure


def sign_test(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    tokens: Int[Tensor, "passage pos"],
    *,
    layer: int,
    head: int,
    config: SignTestConfig | None = None,
    on_progress: Told | None = None,
) -> SignTestResult:
    """Edit the state behind single positions along v_T*, and hold measured against predicted changes of the token.

    Args:
        model: any HookedRecurrentModel.
        sae: a dictionary of this cell's writes, for the atom's key side.
        tokens: held-out passages.
        layer, head: the cell.
        config: how many, how strong, seed.
        on_progress: told (positions done, positions in all).

    Raises:
        ValueError, IndexError: for a cell that does not exist or does not fit, and passages that are too short.
    """
    config = SignTestConfig.given(config)
    check_passages(tokens)
    check_cell(model, sae, layer, head)
    if tokens.shape[1] < config.first_position + 2:
        need = config.first_position + 2
        raise ValueError(f"passages have {tokens.shape[1]} tokens; this test needs at least {need}")
    test = _Test(model, sae, tokens, layer, head, config, encode_cell(model, sae, tokens, layer, head))
    sites = test.sites()
    rows: list[dict[str, Any]] = []
    for done, (passage, position, wanted) in enumerate(sites):
        rows += test.run(passage, position, wanted)
        if on_progress is not None:
            on_progress(done + 1, len(sites))
    return SignTestResult(pd.DataFrame(rows), layer, head, config.to_dict())


@dataclass(frozen=True)
class _Test:
    model: HookedRecurrentModel
    sae: WriteSAE
    tokens: Tensor
    layer: int
    head: int
    config: SignTestConfig
    writes: CellWrites

    def sites(self) -> list[tuple[int, int, Tensor]]:
        """(passage, position, tokens) drawn without repeating a position, until the total is reached."""
        passages, length = self.tokens.shape
        generator = torch.Generator().manual_seed(self.config.seed)
        width = length - 1 - self.config.first_position
        needed = -(-self.config.total // self.config.per_position)
        places = torch.randperm(passages * width, generator=generator)[:needed]
        sites, left = [], self.config.total
        for place in places.tolist():
            wanted = torch.randperm(self.model.cfg.d_vocab, generator=generator)[: min(left, self.config.per_position)]
            sites.append((place // width, place % width + self.config.first_position, wanted))
            left -= len(wanted)
        return sorted(sites, key=lambda site: site[:2])

    def run(self, passage: int, t: int, wanted: Int[Tensor, " token"]) -> Iterator[dict[str, Any]]:
        """Every token and key side at one position."""
        model, layer, head = self.model, self.layer, self.head
        text = self.tokens[passage : passage + 1, : t + 2].to(model.device)
        wanted = wanted.to(model.device)
        before, gradient, roles = self._plain(text, t, wanted)
        norm = roles["write_key"][0].norm() * roles["write_value"][0].norm() * self.config.magnitude
        value = unembedding_values(model, wanted, ((layer, head),) * len(wanted))
        atoms = atom_keys(self.sae, self.writes, passage, [t])[0]
        keys = dict(zip(KEYS, (unit(roles["write_key"][0]), unit(roles["query"][1]), atoms.to(norm)), strict=True))
        edits = [
            WriteEdit(layer, head, t, "add", key, norm * direction, reading="cache")
            for key in keys.values()
            for direction in value
        ]
        logits = {fork.index: fork.logits[1].double() for fork in run_edits(model, text, edits, horizon=1)}
        length = (model.W_U.detach()[:, wanted].T @ model.blocks[layer].W_O[head].detach().T).norm(dim=-1)  # type: ignore[operator, index]
        decay = roles["log_decay"][1].exp()
        for row, (name, key) in enumerate(keys.items()):
            for index, token in enumerate(wanted.tolist()):
                after = logits[row * len(wanted) + index]
                yield {
                    "passage": passage,
                    "position": t,
                    "target": token,
                    "key": name,
                    "norm": float(norm),
                    "delta_logprob": float(after.log_softmax(-1)[token] - before.log_softmax(-1)[token]),
                    "delta_logit": float(after[token] - before[token]),
                    "first_order": float(norm * (key @ gradient[index] @ value[index])),
                    "product": float(norm * (key * decay @ roles["query"][1]) * length[index]),
                }

    def _plain(
        self, text: Int[Tensor, "one pos"], t: int, wanted: Int[Tensor, " token"]
    ) -> tuple[Float[Tensor, " d_vocab"], Float[Tensor, "token d_k d_v"], dict[str, Tensor]]:
        """Logits at t + 1, the gradient of every log p(T) there with respect to the state carried on from t, and the
        cell's factors at t and t + 1."""
        prefix = f"blocks.{self.layer}.mixer.hook_"
        state = self.model.snapshots(text, [t])[t]
        roles = ("log_decay", "erase", "probe", "query", "read", "write_key", "write_value")
        names = [prefix + role for role in roles if prefix + role in self.model.hook_dict]
        kept: list[Tensor] = []

        def total(logits: Tensor) -> Tensor:
            kept.append(logits[0, -1].detach().double())
            return logits[:, -1].log_softmax(-1).gather(-1, wanted[:, None]).sum()

        rows = len(wanted)
        _, cache = self.model.run_with_cache(
            text[:, t:].expand(rows, -1), names_filter=names, incl_bwd=True, metric=total, state=state.fork(rows)
        )
        carried = cache.write_grad(
            self.layer, self.head, 0
        )  # what t reads itself bears on no later logit of this layer ...
        own = cache[f"{prefix}query"][:, 0, self.head, :, None] * cache[f"{prefix}read_grad"][:, 0, self.head, None, :]
        factors = {name.removeprefix(prefix): cache[name][0, :, self.head] for name in names if name in cache}
        return kept[0], (carried - own).detach(), factors  # ... but on layers above, so it is taken off


def _agreement(measured: np.ndarray, predicted: np.ndarray, passages: pd.Series, n_resamples: int) -> dict[str, Any]:
    same = np.sign(measured) * np.sign(predicted) > 0
    wilson = wilson_interval(int(same.sum()), len(same))
    varied = len(same) > 2 and np.ptp(measured) > 0 and np.ptp(predicted) > 0
    pearson = stats.pearsonr(predicted, measured) if varied else None
    total = float(((measured - measured.mean()) ** 2).sum())
    several = passages.nunique() > 1
    clustered = cluster_bootstrap(same.astype(float), passages.to_numpy(), n_resamples=n_resamples) if several else None
    moved = predicted != 0
    return {
        "n": len(same),
        "passages": int(passages.nunique()),
        "sign_agreement": wilson.estimate,
        "sign_agreement_wilson": [wilson.low, wilson.high],
        "sign_agreement_by_passage": [float("nan")] * 2 if clustered is None else [clustered.low, clustered.high],
        "pearson": float("nan") if pearson is None else float(pearson.statistic),
        "pearson_p": float("nan") if pearson is None else float(pearson.pvalue),
        "median_ratio": float(np.median(measured[moved] / predicted[moved])) if moved.any() else float("nan"),
        "r2": 1 - float(((measured - predicted) ** 2).sum()) / total if total > 0 else float("nan"),
    }
