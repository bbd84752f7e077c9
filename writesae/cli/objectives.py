"""`writesae objectives`: which objective makes atoms that can stand in for writes."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from writesae.cli.base import OUTPUT, DryRun, Json, Model, Seed, app, load_model, progress
from writesae.cli.dry_run import Part, begin, passages_in_words, replacement_part
from writesae.cli.experiments import Figure, Length, Out, PassageCount, TextFolder, keep, show
from writesae.cli.outputs import check_folder, check_outputs
from writesae.cli.training_text import check_text, cut_text

if TYPE_CHECKING:
    from writesae.evaluation.comparing.objectives import ObjectivesConfig

Folder = Annotated[
    Path | None,
    typer.Option(help="Keep every dictionary here, and go on from those that are there.", rich_help_panel=OUTPUT),
]


@app.command()
def objectives(
    model: Model = "tiny-gated-deltanet",
    layer: Annotated[int | None, typer.Option(help="Layer of the cell; by default the most effective cell.")] = None,
    head: Annotated[int | None, typer.Option(help="Head of the cell; goes with --layer.")] = None,
    seeds: Annotated[int, typer.Option(help="Dictionaries per objective.")] = 5,
    objective: Annotated[
        list[str] | None, typer.Option("--objective", help="An objective to compare; may be given several times.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes for a first look.")] = False,
    train_passages: Annotated[int, typer.Option(help="Passages of training files.")] = 120,
    passages: PassageCount = 60,
    length: Length = 256,
    text: TextFolder = None,
    seed: Seed = 0,
    folder: Folder = None,
    out: Out = None,
    figure: Figure = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train dictionaries of one cell by several objectives at one budget, and compare them in the replacement test.

    Example: writesae objectives --model tiny-rwkv7 --folder runs/objectives --out objectives.json
    """
    from writesae.evaluation.cells import most_effective, survey
    from writesae.evaluation.comparing.objectives import ObjectivesConfig, compare_objectives
    from writesae.evaluation.firings import require_cell

    if (layer is None) != (head is None):
        raise ValueError(f"give layer and head together, got layer={layer} and head={head}")
    config = ObjectivesConfig.quick() if quick else ObjectivesConfig(seeds=seeds)
    config = replace(config, seed=seed, objectives=tuple(objective or config.objectives))
    check_outputs(out, figure)
    check_folder("--folder", folder)
    check_text(text)
    counts = {"train": train_passages, "heldout": passages}
    if dry_run:
        reads = [passages_in_words(count, length, split, text) for split, count in counts.items()]
        _dry_run(model, (layer, head), config, reads, [folder, out, figure], as_json)
        return
    loaded = load_model(model)
    if layer is not None and head is not None:
        require_cell(loaded, layer, head)
    cuts = {
        split: cut_text(loaded, split, passages=n, length=length, text=text, seed=seed) for split, n in counts.items()
    }
    if layer is None or head is None:
        layer, head = most_effective(survey(loaded, cuts["train"].tokens[:8], seed=seed))
    with progress() as tell:
        result = compare_objectives(
            loaded,
            cuts["train"].tokens,
            cuts["heldout"].tokens,
            layer=layer,
            head=head,
            config=config,
            folder=folder,
            on_progress=lambda done, total: tell("dictionaries", done, total),
        )
    result.about.update(model=loaded.cfg.model_name, **{name: part.record() for name, part in cuts.items()})
    keep(result, out, figure)
    show(result, as_json)


def _dry_run(
    model: str,
    cell: tuple[int | None, int | None],
    config: "ObjectivesConfig",
    reads: list[str],
    written: list[Path | None],
    as_json: bool,
) -> None:
    plan, loaded = begin("objectives", model)
    plan.reads = "; ".join(reads)
    count = config.seeds * len(config.objectives)
    plan.computes = [
        f"{count} dictionaries of {config.training.n_atoms} atoms, {config.training.steps:,} steps each: "
        f"{', '.join(config.objectives)}, {config.seeds} seeds",
        f"{count} replacement tests of at most {config.firings:,} firings",
    ]
    plan.writes = [str(path) for path in written if path is not None]
    if loaded is not None:
        layer, head = (loaded.cfg.recurrent_layers[0] if cell[0] is None else cell[0]), cell[1] or 0
        plan.measure(_parts(loaded, layer, head, config), "; reading the text comes on top")
    plan.show(as_json, {"config": config.to_dict()})


def _parts(loaded: Any, layer: int, head: int, config: "ObjectivesConfig") -> list[Part]:
    """Training by every objective, with as large a share of fine-tuning as in earnest, and the tests."""
    from writesae.training.objectives import train_objective

    tokens = cut_text(loaded, "train", passages=8, length=64).tokens
    training = config.training

    def trains(objective: str, steps: int) -> Any:
        finetune = replace(training.finetune, steps=max(1, steps * training.finetune.steps // training.steps))
        short = replace(training, steps=steps, finetune=finetune, metric_passages=1)
        return train_objective(loaded, tokens, objective, layer=layer, head=head, config=short)

    parts = [
        Part("steps", training.steps * config.seeds, partial(trains, objective), times=config.seeds)
        for objective in config.objectives
    ]
    sae = trains(config.objectives[0], 4).sae
    size = {"firings": config.firings, "times": config.seeds * len(config.objectives)}
    return [*parts, replacement_part(loaded, sae, tokens, (layer, head), **size)]
