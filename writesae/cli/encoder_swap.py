"""`writesae encoder-swap`: every pairing of encoder and decoder at one budget."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from writesae.cli.base import OUTPUT, DryRun, Json, Model, Seed, app, console, load_model, print_json, progress
from writesae.cli.completion import complete_preset
from writesae.cli.dry_run import begin, brief_dictionary, passages_in_words, replacement_part, training_part
from writesae.cli.experiments import Figure, Horizon, Length, Out, PassageCount, TextFolder, keep
from writesae.cli.logits import parse_cell
from writesae.cli.outputs import check_folder, check_outputs
from writesae.cli.training_text import check_text, held_text, training_text
from writesae.report.terminal import summary_table

if TYPE_CHECKING:
    from writesae.evaluation.comparing.encoder_swap import EncoderSwapConfig

Cell = Annotated[
    list[str] | None, typer.Option(help="A cell as LAYER:HEAD; may be given several times. By default 0:0.")
]
Presets = Annotated[
    list[str] | None,
    typer.Option(
        "--preset",
        help="A type, such as 'bilinear'; may be given several times. By default the five of the paper.",
        autocompletion=complete_preset,
    ),
]
Folder = Annotated[
    Path | None,
    typer.Option(help="Keep dictionaries and measurements here, and go on there.", rich_help_panel=OUTPUT),
]


@app.command("encoder-swap")
def encoder_swap(
    cell: Cell = None,
    model: Model = "tiny-gated-deltanet",
    preset: Presets = None,
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0 on.")] = 3,
    atoms: Annotated[int, typer.Option(help="Atoms in every dictionary.")] = 512,
    k: Annotated[int, typer.Option(help="Atoms that may be active at once.")] = 8,
    steps: Annotated[int, typer.Option(help="Optimiser steps of every dictionary.")] = 600,
    firings: Annotated[int, typer.Option(help="Most firings to test per cell.")] = 150,
    horizon: Horizon = 16,
    train_passages: Annotated[int, typer.Option(help="Passages of training files.")] = 600,
    passages: PassageCount = 60,
    length: Length = 256,
    text: TextFolder = None,
    seed: Seed = 2026,
    folder: Folder = None,
    out: Out = None,
    figure: Figure = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Which encoder and which decoder? Five types at one budget: what they rebuild, and whether they can stand in.

    Example: writesae encoder-swap --model tiny-mamba2 --cell 1:0 --cell 2:3 --folder runs/swap --out results/swap.json
    """
    from writesae.evaluation.comparing.encoder_swap import TYPES, EncoderSwapConfig, check_cells
    from writesae.evaluation.comparing.encoder_swap import encoder_swap as run

    sizes = {"n_atoms": atoms, "k": k, "steps": steps, "total": firings, "horizon": horizon, "seed": seed}
    config = EncoderSwapConfig.from_dict({"presets": tuple(preset or TYPES), "seeds": tuple(range(seeds)), **sizes})
    cells = [parse_cell(one) for one in cell or ["0:0"]]
    check_outputs(out, figure)
    check_folder("--folder", folder)
    check_text(text)
    if dry_run:
        reads = [passages_in_words(train_passages, length, "training", text)]
        reads.append(passages_in_words(passages, length, "held-out", text))
        _dry_run(model, cells, config, reads, [folder, out, figure], as_json)
        return
    loaded = load_model(model)
    check_cells(loaded, cells)
    held = held_text(loaded, passages=passages, length=length, text=text)
    with progress() as tell:
        result = run(
            loaded,
            held.tokens,
            train_tokens=training_text(loaded, passages=train_passages, length=length, text=text),
            cells=cells,
            config=config,
            folder=folder,
            on_progress=lambda done, total: tell("seeds and cells", done, total),
        )
    about = {"model": loaded.cfg.model_name, "text": held.record()}
    result = replace(result, about={**about, **result.about})
    keep(result, out, figure)
    rows = result.summary()
    if as_json:
        print_json(rows)
        return
    console.print(summary_table(rows, f"encoder swap, cells {', '.join(cell or ['0:0'])}"))


def _dry_run(
    model: str,
    cells: list[tuple[int, int]],
    config: "EncoderSwapConfig",
    reads: list[str],
    written: list[Path | None],
    as_json: bool,
) -> None:
    from writesae.evaluation.comparing.encoder_swap import check_cells, job_of

    plan, loaded = begin("encoder-swap", model)
    plan.reads = "; ".join(reads)
    each = len(config.seeds) * len(config.presets)
    plan.computes = [
        f"{len(cells) * each} dictionaries of {config.n_atoms} atoms, {config.steps:,} steps each: {len(cells)} cells, "
        f"{len(config.presets)} types, {len(config.seeds)} seeds",
        f"at most {config.total:,} firings per cell, with every dictionary",
    ]
    plan.writes = [str(path) for path in written if path is not None]
    if loaded is not None:
        check_cells(loaded, cells)
        tokens = held_text(loaded, passages=8, length=64).tokens
        jobs = [job_of(loaded, *cells[0], preset, 0, config) for preset in config.presets]
        sae = brief_dictionary(loaded, *cells[0], jobs[0].sae, tokens)
        size = {"firings": config.total, "times": len(cells)}
        plan.measure(
            [
                training_part(loaded, jobs, tokens, config.training(0), times=len(config.seeds) * len(cells)),
                replacement_part(loaded, sae, tokens, cells[0], **size),
            ],
            "; reading the text and the stand-ins of every type come on top",
        )
    plan.show(as_json, {"config": config.to_dict()})
