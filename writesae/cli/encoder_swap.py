"""`writesae encoder-swap`: every pairing of encoder and decoder at one budget."""

from pathlib import Path
from typing import Annotated

import typer

from writesae.cli.base import Json, Model, Seed, app, console, load_model, plain_errors, print_json, progress
from writesae.cli.experiments import Length, Out, PassageCount, TextFolder
from writesae.report.terminal import summary_table

Cell = Annotated[list[str] | None, typer.Option(help="A cell as LAYER:HEAD; may be given several times.")]
Presets = Annotated[list[str] | None, typer.Option("--preset", help="A type; by default the five of the paper.")]
Folder = Annotated[Path | None, typer.Option(help="Keep dictionaries and measurements here, and go on there.")]


@app.command("encoder-swap")
def encoder_swap(
    cell: Cell = None,
    model: Model = "tiny-gated-deltanet",
    preset: Presets = None,
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0 on.")] = 3,
    atoms: Annotated[int, typer.Option(help="Atoms in every dictionary.")] = 512,
    k: Annotated[int, typer.Option(help="Atoms that may be active at once.")] = 8,
    steps: Annotated[int, typer.Option(help="Training steps of every dictionary.")] = 600,
    firings: Annotated[int, typer.Option(help="Most firings to test per cell.")] = 150,
    horizon: Annotated[int, typer.Option(help="Tokens after the firing that the horizon reading averages.")] = 16,
    train_passages: Annotated[int, typer.Option(help="Passages of training files.")] = 600,
    passages: PassageCount = 60,
    length: Length = 256,
    text: TextFolder = None,
    folder: Folder = None,
    seed: Seed = 2026,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Which encoder and which decoder? Five types at one budget: what they rebuild, and whether they can stand in.

    Example: writesae encoder-swap --model tiny-mamba2 --cell 1:0 --cell 2:3 --folder runs/swap --out results/swap.json
    """
    with plain_errors():
        from dataclasses import replace

        from writesae.cli.training_text import held_text, training_text
        from writesae.evaluation.comparing.encoder_swap import TYPES, EncoderSwapConfig
        from writesae.evaluation.comparing.encoder_swap import encoder_swap as run

        sizes = {"n_atoms": atoms, "k": k, "steps": steps, "total": firings, "horizon": horizon, "seed": seed}
        config = EncoderSwapConfig.from_dict(
            {"presets": tuple(preset or TYPES), "seeds": tuple(range(seeds)), **sizes},
        )
        cells = [_cell(one) for one in cell or ["0:0"]]
        loaded = load_model(model)
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
        if out is not None:
            result.to_json(out)
    rows = result.summary()
    if as_json:
        print_json(rows)
        return
    console.print(summary_table(rows, f"encoder swap, cells {', '.join(cell or ['0:0'])}"))


def _cell(words: str) -> tuple[int, int]:
    layer, _, head = words.partition(":")
    if not (layer.isdigit() and head.isdigit()):
        raise ValueError(f"--cell takes LAYER:HEAD, such as 2:1, got {words!r}")
    return int(layer), int(head)
