"""Which objective makes dictionaries whose atoms can stand in for writes: every objective, several seeds, one budget.

Every dictionary of one cell takes the same number of optimiser steps on the same training passages and is put through the same
replacement test on held-out ones (`replacement.py`). Beside the win rate stand the usual numbers of a dictionary: unexplained
variance of what it was trained on, dead atoms, and the language model's loss with reconstructions in place.

With `folder`, each dictionary and its measurements are kept as soon as they are there, and a run that was stopped goes on after
the last of them.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from jaxtyping import Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.config import StrictConfig, require_positive
from hooked_recurrent.files import plain, write_text
from writesae.config import require_at_least_zero, require_one_of
from writesae.evaluation.comparing.objectives_result import ObjectivesResult
from writesae.evaluation.firings import trained_on
from writesae.evaluation.replacing.replacement import ReplacementConfig, replacement
from writesae.evaluation.replacing.replacement_result import ReplacementResult
from writesae.sae.write_sae import WriteSAE
from writesae.stream.activations import ActivationStream
from writesae.stream.sources import Source
from writesae.stream.store import ActivationStore, model_fingerprint, tokens_fingerprint
from writesae.training.metrics import measure
from writesae.training.objectives import OBJECTIVES, ObjectiveConfig, source_of, train_objective
from writesae.training.splice import loss_recovered

COMPARED = ("state", "write", "net", "fisher", "single", "single_fisher", "relative", "relative_kl")
"""The objectives that are compared unless others are named."""
POOL, SCALE = "dominant", "coef"
"""What replaces a write: the most active atom, at its coefficient."""
MEASURED = 4096  # held-out samples for the unexplained variance


@dataclass(frozen=True)
class ObjectivesConfig(StrictConfig):
    """Which objectives are compared, how often, and at what budget."""

    objectives: tuple[str, ...] = COMPARED
    """Names of `writesae.training.objectives.OBJECTIVES`."""
    seeds: int = 5
    """Dictionaries per objective, with the seeds seed, seed + 1, ..."""
    training: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The budget and the shape of the dictionaries, the same for all."""
    firings: int = 400
    """Firings in the replacement test of each dictionary."""
    per_atom: int = 3
    """Most firings of one atom."""
    horizon: int = 16
    """Tokens after t over which the horizon reading averages."""
    splice_passages: int = 2
    """Held-out passages on which the language model's loss is measured with reconstructions in place; 0 is off."""
    seed: int = 0
    """The first seed of the training; the firings are drawn by it as well, for all dictionaries alike."""

    def __post_init__(self) -> None:
        owner = "ObjectivesConfig"
        require_positive(owner, seeds=self.seeds, firings=self.firings, per_atom=self.per_atom, horizon=self.horizon)
        require_at_least_zero(owner, splice_passages=self.splice_passages)
        if not self.objectives:
            raise ValueError("ObjectivesConfig.objectives must name one at least")
        for name in self.objectives:
            require_one_of(owner, "objectives", name, tuple(OBJECTIVES))
            self.training.reconstruction_steps(OBJECTIVES[name])

    @classmethod
    def quick(cls, **fields: Any) -> "ObjectivesConfig":
        """Sizes for a first look of about a minute: the state objective, the plain one and the best, two seeds."""
        training = ObjectiveConfig.from_dict(
            {"n_atoms": 256, "steps": 200, "metric_passages": 4, "finetune": {"steps": 40}}
        )
        sizes = {"objectives": ("state", "write", "relative"), "seeds": 2, "firings": 100, "splice_passages": 1}
        return cls(**{**sizes, "training": training, **fields})


def compare_objectives(
    model: HookedRecurrentModel,
    train_tokens: Int[Tensor, "passage pos"],
    heldout: Int[Tensor, "heldout_passage heldout_pos"],
    *,
    layer: int,
    head: int,
    config: ObjectivesConfig | None = None,
    folder: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ObjectivesResult:
    """Train dictionaries of one cell by every objective and seed, and put each through the replacement test.

    Args:
        model: any HookedRecurrentModel.
        train_tokens: passages that everything is fitted on.
        heldout: passages that everything is measured on.
        layer, head: the cell.
        config: objectives, seeds, budget.
        folder: where dictionaries and measurements are kept, and taken up again; it must be one of this same comparison.
        on_progress: called with (dictionaries done, dictionaries in all).

    Raises:
        ValueError, IndexError: as `train_objective` and `replacement` do; a folder of another comparison, naming what differs.
    """
    config = ObjectivesConfig.given(config)
    kept = None if folder is None else Path(folder)
    if kept is not None:
        _claim(kept, _describe(model, train_tokens, heldout, layer, head, config))
    runs = [(objective, config.seed + number) for number in range(config.seeds) for objective in config.objectives]
    places = {run: None if kept is None else kept / f"{run[0]}-{run[1]}" for run in runs}
    found = {run: measured for run, place in places.items() if (measured := _read(place)) is not None}
    sources = list(dict.fromkeys(source_of(run[0], layer, head) for run in runs if run not in found))
    with _activations(model, train_tokens, sources) as store:
        bench = _Bench(model, train_tokens, heldout, layer, head, config, store)
        for done, run in enumerate(runs):
            if run not in found:
                found[run] = bench.run(*run, places[run])
            if on_progress is not None:
                on_progress(done + 1, len(runs))
    rows, wins = ([row for run in runs for row in found[run][part]] for part in ("rows", "wins"))
    return ObjectivesResult(pd.DataFrame(rows), layer, head, config.to_dict(), wins=wins)


@dataclass(frozen=True)
class _Bench:
    """What all dictionaries of a comparison are trained and measured on."""

    model: HookedRecurrentModel
    train_tokens: Tensor
    heldout: Tensor
    layer: int
    head: int
    config: ObjectivesConfig
    store: ActivationStore | None

    def run(self, objective: str, seed: int, place: Path | None) -> dict[str, Any]:
        """Train and measure one dictionary, and keep it."""
        config, started = self.config, time.perf_counter()
        trained = train_objective(
            self.model,
            self.train_tokens,
            objective,
            layer=self.layer,
            head=self.head,
            config=config.training,
            seed=seed,
            store=self.store,
        )
        seconds = time.perf_counter() - started
        test = ReplacementConfig(
            total=config.firings, per_atom=config.per_atom, horizon=config.horizon, seed=config.seed + 2026
        )
        tested = replacement(self.model, trained.sae, self.heldout, layer=self.layer, head=self.head, config=test)
        about = {"objective": objective, "seed": seed}
        shared = {**about, **self._quality(trained.sae), "steps": config.training.steps, "seconds": seconds}
        found = {
            "rows": [{**shared, **row} for row in _readings(tested)],
            "wins": [{**about, **row} for row in _wins(tested)],
        }
        if place is not None:
            trained.sae.save(place / "sae")
            write_text(place / "measured.json", json.dumps(plain({**found, "log": trained.log}), allow_nan=False))
        return found

    def _quality(self, sae: WriteSAE) -> dict[str, Any]:
        """The usual numbers of a dictionary, on held-out passages, of what it was trained on."""
        source = trained_on(sae, self.layer, self.head)
        stream = ActivationStream(self.model, self.heldout, [source], batch_size=1)
        numbers: dict[str, Any] = measure(sae, stream.sample(MEASURED)[source]).to_dict()
        if self.config.splice_passages:
            passages = self.heldout[: self.config.splice_passages]
            numbers |= loss_recovered(self.model, sae, source, passages).to_dict()
        return numbers


def _readings(tested: ReplacementResult) -> Iterator[dict[str, Any]]:
    """A row per reading: win rate with its interval by passage, and the three KLs."""
    for row in tested.summary():
        if (row["pool"], row["scale"]) == (POOL, SCALE):
            names = ("reading", "n", "n_atoms", "n_passages", "win_rate", "win_rate_vs_random", "strict_chain")
            kls = [name for name in row if name.startswith("median_")]
            low, high = row["by_passage"]
            yield {**{name: row[name] for name in (*names, *kls)}, "low": low, "high": high}


def _wins(tested: ReplacementResult) -> Iterator[dict[str, Any]]:
    """Firings and wins of every passage, which objectives are compared by."""
    table = tested.table
    won = table[f"kl_atom_{POOL}_{SCALE}"] < table["kl_delete"]
    for (reading, passage), mine in won.groupby([table["reading"], table["passage"]]):
        yield {"reading": str(reading), "passage": int(passage), "wins": int(mine.sum()), "firings": len(mine)}


# --- the folder ------------------------------------------------------------------------------------------------


@contextmanager
def _activations(
    model: HookedRecurrentModel, tokens: Tensor, sources: list[Source]
) -> Iterator[ActivationStore | None]:
    """What the sources hold of the training passages: for a while on disk, from one pass of the model for all dictionaries."""
    with TemporaryDirectory() as place:
        yield ActivationStore.write(place, model, tokens, sources) if sources else None


def _describe(
    model: HookedRecurrentModel, train: Tensor, heldout: Tensor, layer: int, head: int, config: ObjectivesConfig
) -> dict[str, Any]:
    """What the numbers depend on; seeds and objectives may be added later."""
    settings = {name: value for name, value in config.to_dict().items() if name not in ("objectives", "seeds")}
    return plain(
        {
            **settings,
            "model": {"name": model.cfg.model_name, "weights": model_fingerprint(model)},
            "cell": [layer, head],
            "train_tokens": tokens_fingerprint(train),
            "heldout": tokens_fingerprint(heldout),
        }
    )


def _claim(folder: Path, description: dict[str, Any]) -> None:
    path = folder / "comparison.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(
            name for name in found.keys() | description.keys() if found.get(name) != description.get(name)
        )
        if differing:
            raise ValueError(f"{folder} holds another comparison: {', '.join(differing)} differ")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(description, indent=1) + "\n")


def _read(place: Path | None) -> dict[str, Any] | None:
    """The measurements of a dictionary that is finished."""
    path = None if place is None else place / "measured.json"
    return None if path is None or not path.exists() else json.loads(path.read_text(encoding="utf-8"))


def load_dictionary(folder: str | Path, objective: str, seed: int) -> WriteSAE:
    """A dictionary that `compare_objectives` kept. Raises `ValueError` where it is not there."""
    return WriteSAE.load(Path(folder) / f"{objective}-{seed}" / "sae")
