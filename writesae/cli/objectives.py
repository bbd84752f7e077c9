"""`writesae objectives`: which objective makes atoms that can stand in for writes."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from writesae.cli.base import Json, Model, Seed, app, console, load_model, plain_errors, print_json, progress
from writesae.cli.experiments import Length, Out
from writesae.report.terminal import summary_table


@app.command()
def objectives(
    model: Model = "tiny-gated-deltanet",
    layer: Annotated[int | None, typer.Option(help="Layer of the cell; by default the most effective cell.")] = None,
    head: Annotated[int | None, typer.Option(help="Head of the cell.")] = None,
    seeds: Annotated[int, typer.Option(help="Dictionaries per objective.")] = 5,
    objective: Annotated[
        list[str] | None, typer.Option("--objective", help="An objective to compare; may be given several times.")
    ] = None,
    train_passages: Annotated[int, typer.Option(help="Passages of training files.")] = 120,
    passages: Annotated[int, typer.Option("--passages", help="Passages of held-out files.")] = 60,
    length: Length = 256,
    folder: Annotated[
        Path | None, typer.Option(help="Keep every dictionary here, and go on from those that are there.")
    ] = None,
    out: Out = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: a minute or so.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train dictionaries of one cell by several objectives at one budget, and compare them in the replacement test.

    Example: writesae objectives --model tiny-rwkv7 --folder runs/objectives --out objectives.json
    """
    with plain_errors():
        from hooked_recurrent.zoo.corpus import standard_library
        from writesae.evaluation.cells import most_effective, survey
        from writesae.evaluation.comparing.objectives import ObjectivesConfig, compare_objectives
        from writesae.stream.corpus import passages as cut

        if (layer is None) != (head is None):
            raise ValueError(f"give layer and head together, got layer={layer} and head={head}")
        config = ObjectivesConfig.quick() if quick else ObjectivesConfig(seeds=seeds)
        config = replace(config, seed=seed, objectives=tuple(objective or config.objectives))
        loaded = load_model(model)
        text = {
            split: cut(standard_library(split), loaded, length, split=split, max_passages=count, seed=seed)
            for split, count in (("train", train_passages), ("heldout", passages))
        }
        if layer is None or head is None:
            layer, head = most_effective(survey(loaded, text["train"].tokens[:8], seed=seed))
        with progress() as tell:
            result = compare_objectives(
                loaded,
                text["train"].tokens,
                text["heldout"].tokens,
                layer=layer,
                head=head,
                config=config,
                folder=folder,
                on_progress=lambda done, total: tell("dictionaries", done, total),
            )
        result.about.update(model=loaded.cfg.model_name, **{name: part.record() for name, part in text.items()})
        if out is not None:
            result.to_json(out)
        rows = result.summary()
        if as_json:
            print_json(rows)
            return
        console.print(summary_table(rows, f"{result.kind}, layer {result.layer}, head {result.head}"))
