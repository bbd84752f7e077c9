"""What the experiments of a reproduction share: the model, its texts, the cell, and dictionaries, each made once and kept."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.zoo.corpus import standard_library
from writesae.config import TrainConfig, WriteSAEConfig, require_one_of
from writesae.evaluation.cells import most_effective, survey
from writesae.evaluation.result import Result
from writesae.reproduce.config import ReproduceConfig
from writesae.sae.write_sae import WriteSAE
from writesae.stream.corpus import Passages, passages, text_folder
from writesae.stream.sources import Source
from writesae.training import Job, train_many
from writesae.training.finetune import FinetuneConfig
from writesae.training.objectives import BEST, ObjectiveConfig, train_objective

SOURCES = {"write": ("hook_write", "additive"), "net": ("hook_write", "net"), "state": ("hook_state", "additive")}
"""What a plain dictionary may be trained on: the hook of its mixer, and the form."""
REMEMBERS = 2.0  # tokens of half-life from which on a cell's memory is one: what only its own token reads is none


class Bench:
    """The shared things of one run; whatever is asked for the first time is made then."""

    def __init__(
        self, model: HookedRecurrentModel, config: ReproduceConfig, folder: Path, tell: Callable[[str, int, int], None]
    ):
        self.model, self.config, self.folder, self.tell = model, config, folder, tell

    @cached_property
    def train_text(self) -> Passages:
        """Passages that may be fitted to."""
        return self._cut("train", self.config.train_passages, self.config.seed)

    @cached_property
    def heldout(self) -> Passages:
        """Passages of other files, by another seed than the one with which objectives were tried out."""
        return self._cut("heldout", self.config.heldout_passages, self.config.seed + 1)

    @property
    def tokens(self) -> Int[Tensor, "passage pos"]:
        """The held-out passages, where the model is."""
        return self.heldout.tokens.to(self.model.device)

    @cached_property
    def cells(self) -> pd.DataFrame:
        """The survey of all cells, on training text."""
        tokens = self.train_text.tokens[: 8 if self.config.quick else 32].to(self.model.device)
        return survey(self.model, tokens, seed=self.config.seed)

    @cached_property
    def cell(self) -> tuple[int, int]:
        """(layer, head) of the run."""
        if self.config.layer is None or self.config.head is None:
            return most_effective(self.cells[self.cells["half_life"] >= REMEMBERS])
        return self.config.layer, self.config.head

    def dictionaries(
        self, source: str, cells: Sequence[tuple[int, int]], seeds: Sequence[int] = (0,), **sae: object
    ) -> dict[tuple[int, int, int], WriteSAE]:
        """Plain dictionaries (by layer, head and seed) of writes, net writes or states, trained side by side where missing.

        `sae` are further fields of their `WriteSAEConfig`.
        """
        require_one_of("Bench.dictionaries", "source", source, tuple(SOURCES))
        hook, form = SOURCES[source]
        label = "".join(f"-{name}={value}" for name, value in sorted(sae.items()))
        names = {(layer, head, s): f"{source}-L{layer}H{head}-s{s}{label}" for layer, head in cells for s in seeds}
        missing = {place: name for place, name in names.items() if not (self.folder / name / "config.json").is_file()}
        for seed in dict.fromkeys(place[2] for place in missing):
            self._train({place: name for place, name in missing.items() if place[2] == seed}, hook, form, seed, sae)
        return {place: WriteSAE.load(self.folder / name, self.model.device) for place, name in names.items()}

    def dictionary(self, source: str = "write", seed: int = 0) -> WriteSAE:
        """The plain dictionary of the run's own cell."""
        return self.dictionaries(source, [self.cell], [seed])[*self.cell, seed]

    def taught(self, objective: str = BEST) -> WriteSAE:
        """The dictionary of the run's cell for replacement, under one of `OBJECTIVES`, trained where missing."""
        place = self.folder / f"{objective}-L{self.cell[0]}H{self.cell[1]}"
        if not (place / "config.json").is_file():
            size, (layer, head) = self.config, self.cell
            kl = FinetuneConfig(steps=size.train_steps // 4)  # of these steps, where the objective has such
            budget = ObjectiveConfig(n_atoms=size.best_atoms, k=size.k, steps=size.train_steps, finetune=kl)
            tokens, told = self.train_text.tokens.to(self.model.device), self.progress(f"dictionary, {objective}")
            trained = train_objective(
                self.model, tokens, objective, layer=layer, head=head, config=budget, seed=size.seed, on_progress=told
            )
            trained.sae.save(place)
        return WriteSAE.load(place, self.model.device)

    @property
    def layer_cells(self) -> list[tuple[int, int]]:
        """All heads of the cell's layer."""
        return [(self.cell[0], head) for head in range(self.model.cfg.n_heads)]

    def test(
        self,
        experiment: Callable[..., Result],
        stage: str,
        sae: WriteSAE,
        config: object,
        passages: int | None = None,
        **more: Any,
    ) -> Result:
        """An experiment on a dictionary of the run's cell and the held-out passages, or the first so many of them."""
        layer, head = self.cell
        told, tokens = self.progress(stage), self.tokens[:passages]
        return experiment(self.model, sae, tokens, layer=layer, head=head, config=config, on_progress=told, **more)

    def progress(self, stage: str) -> Callable[[int, int], None]:
        """Tells how far a stage is."""
        return lambda done, total: self.tell(stage, done, total)

    def _train(self, missing: dict[tuple[int, int, int], str], hook: str, form: str, seed: int, sae: dict) -> None:
        cfg, config = self.model.cfg, self.config
        shape = WriteSAEConfig(cfg.d_k, cfg.d_v, **{"n_atoms": config.n_atoms, "k": config.k, "seed": seed, **sae})  # type: ignore[arg-type]
        jobs = [
            Job(name.replace("=", "_"), Source(f"blocks.{layer}.mixer.{hook}", head, form), shape)
            for (layer, head, _), name in missing.items()
        ]
        trained = train_many(
            self.model,
            jobs,
            tokens=self.train_text,
            config=TrainConfig(steps=config.train_steps, seed=seed, splice_passages=0),
            progress=lambda stage, done, total: self.tell(stage, done, total),
        )
        for name in missing.values():
            trained[name.replace("=", "_")].sae.save(self.folder / name)

    def _cut(self, split: str, count: int, seed: int) -> Passages:
        folder = self.config.text
        files = standard_library(split) if folder is None else text_folder(folder, split)
        return passages(files, self.model, self.config.length, split=split, max_passages=count, seed=seed)
