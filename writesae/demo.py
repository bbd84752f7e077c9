"""The main job from end to end: survey the cells, learn a dictionary of one, replace its writes, write a report.

    model -> survey of every (layer, head) -> WriteSAE on the writes of the most effective one -> replacement test on
    held-out files -> demo_out/report.html, results.json, sae/

Text is the Python standard library. The survey and the dictionary see files of the training split; the test sees files that
neither the language model nor the dictionary has seen.
"""

import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.config import StrictConfig, require_positive
from hooked_recurrent.display import OneLine
from hooked_recurrent.zoo.corpus import standard_library
from writesae.config import TrainConfig, WriteSAEConfig
from writesae.evaluation.cells import most_effective, survey
from writesae.evaluation.describing.contexts import top_contexts
from writesae.evaluation.firings import check_cell, encode_cell
from writesae.evaluation.replacing.replacement import ReplacementConfig, replacement
from writesae.evaluation.replacing.replacement_result import ReplacementResult
from writesae.report import write_report
from writesae.stream.corpus import Passages, passages
from writesae.training import TrainResult, train

Progress = Callable[[str, int, int], None]
"""Told (what is being done, how much of it is done, how much there is)."""


@dataclass(frozen=True)
class DemoConfig(StrictConfig):
    """How large the demo is. The defaults take a few minutes on two cores."""

    layer: int | None = None
    """Layer of the cell; None (with head) takes the cell whose deleted writes move the output most."""
    head: int | None = None
    """Head of the cell."""
    length: int = 256
    """Tokens per passage."""
    train_passages: int = 1200
    """Passages of training files that the dictionary is trained on."""
    heldout_passages: int = 200
    """Passages of held-out files that the test may use."""
    survey_passages: int = 8
    """Passages of training files for the survey of the cells."""
    n_atoms: int = 1024
    """Atoms of the dictionary."""
    k: int = 8
    """Atoms that may be active at once."""
    steps: int = 3000
    """Training steps of the dictionary."""
    firings: int = 600
    """Firings in the replacement test."""
    atoms_shown: int = 12
    """Atoms in the report, those with the most tested firings first."""
    seed: int = 0
    """Seed of everything."""

    def __post_init__(self) -> None:
        if (self.layer is None) != (self.head is None):
            raise ValueError(f"give layer and head together, got layer={self.layer} and head={self.head}")
        require_positive("DemoConfig", length=self.length, train_passages=self.train_passages, k=self.k)
        require_positive("DemoConfig", heldout_passages=self.heldout_passages, n_atoms=self.n_atoms, steps=self.steps)
        require_positive("DemoConfig", firings=self.firings, survey_passages=self.survey_passages)


@dataclass(frozen=True, repr=False)
class DemoResult(OneLine):
    """What the demo made."""

    cells: pd.DataFrame
    """The survey: a row per (layer, head)."""
    training: TrainResult
    """The dictionary with its training log and metrics."""
    replacement: ReplacementResult
    """The replacement test on held-out files."""
    report: Path
    """The HTML page."""
    seconds: dict[str, float]
    """Wall time of every stage."""


def run_demo(
    model: HookedRecurrentModel, out: Path, config: DemoConfig | None = None, progress: Progress | None = None
) -> DemoResult:
    """Run the whole demo and write its folder; everything random follows from `config.seed`."""
    config = DemoConfig.given(config)
    tell = progress or (lambda stage, done, total: None)
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal clock
        seconds[stage], clock = time.perf_counter() - clock, time.perf_counter()

    train_text = _cut(model, "train", config.train_passages, config)
    heldout = _cut(model, "heldout", config.heldout_passages, config)
    lap("text")
    tell("survey", 0, 1)
    cells = survey(model, train_text.tokens[: config.survey_passages], seed=config.seed)
    layer, head = most_effective(cells) if config.layer is None or config.head is None else (config.layer, config.head)
    tell("survey", 1, 1)
    lap("survey")
    sae_config = WriteSAEConfig(model.cfg.d_k, model.cfg.d_v, n_atoms=config.n_atoms, k=config.k, seed=config.seed)
    training = train(
        model,
        f"blocks.{layer}.mixer.hook_write",
        head,
        tokens=train_text,
        heldout=heldout,
        sae_config=sae_config,
        config=TrainConfig(steps=config.steps, seed=config.seed),
        progress=tell,
    )
    training.sae.save(out / "sae")
    lap("train")
    check_cell(model, training.sae, layer, head)
    result = replacement(
        model,
        training.sae,
        heldout.tokens,
        layer=layer,
        head=head,
        config=ReplacementConfig(total=config.firings, seed=config.seed),
        on_progress=lambda done, total: tell("replace", done, total),
    )
    about = _about(model, config, train_text, heldout)
    result = replace(result, about=about)
    result.to_json(out / "results.json")
    lap("replace")
    report = _report(model, out, config, cells, training, result, heldout)
    lap("report")
    return DemoResult(cells, training, result, report, seconds)


def _cut(model: HookedRecurrentModel, split: str, count: int, config: DemoConfig) -> Passages:
    files = standard_library(split)
    return passages(files, model, config.length, split=split, max_passages=count, seed=config.seed)


def _about(model: HookedRecurrentModel, config: DemoConfig, train_text: Passages, heldout: Passages) -> dict[str, Any]:
    return {
        "model": model.cfg.model_name,
        "command": "writesae demo",
        "demo": config.to_dict(),
        "train_text": train_text.record(),
        "heldout_text": heldout.record(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _report(
    model: HookedRecurrentModel,
    out: Path,
    config: DemoConfig,
    cells: pd.DataFrame,
    training: TrainResult,
    result: ReplacementResult,
    heldout: Passages,
) -> Path:
    sae = training.sae
    writes = encode_cell(model, sae, heldout.tokens, result.layer, result.head)
    rates = (
        torch.bincount(writes.codes.indices[writes.codes.active], minlength=sae.config.n_atoms) / writes.norms.numel()
    )
    by_atom = result.by_atom().sort_values(["firings", "win_rate", "atom"], ascending=[False, False, True])
    atoms = [
        {
            "id": int(row.atom),
            "key_factor": sae.key_atoms[int(row.atom), 0].detach().numpy(),
            "value_factor": sae.value_atoms[int(row.atom), 0].detach().numpy(),
            "firing_rate": float(rates[int(row.atom)]),
            "median_coefficient": float(row.median_coefficient),
            "win_rate": float(row.win_rate),
            "contexts": top_contexts(model, writes, heldout.tokens, int(row.atom), files=heldout.files),
        }
        for row in by_atom.head(config.atoms_shown).itertuples()
    ]
    floor = max(result.floor(reading)[1] for reading in result.table["reading"].unique())
    quality = training.metrics["heldout"]
    return write_report(
        out / "report.html",
        title=f"{model.cfg.model_name}: the writes of layer {result.layer}, head {result.head}",
        settings={
            **result.about,
            "cell": f"layer {result.layer}, head {result.head}",
            "python build": sys.version.split()[0],
        },
        firings=result.table.assign(atom=result.table["dominant"]),  # the atom that the headline substitutes
        summary=result.summary(),
        atoms=atoms,
        training_log=training.log,
        half_lives=cells.rename(columns={"half_life": "median"}),
        condition="atom_dominant_coef",
        control="random_dominant_coef",
        cell=(result.layer, result.head),
        notes=[
            f"Substituting the native write for itself changes the output by at most {floor:.1e} nats: that is the floor.",
            f"On held-out writes the dictionary leaves {quality['fvu']:.1%} of the variance unexplained, with "
            f"{quality['l0']:.1f} atoms active per write.",
        ],
    )
