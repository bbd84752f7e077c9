"""The commands that put atoms in the place of writes: in one cell, and in every cell that has a dictionary."""

from dataclasses import replace as changed
from pathlib import Path
from typing import Annotated

import typer

from writesae.cli.base import Json, Seed, app, console, plain_errors, print_json, progress
from writesae.cli.experiments import Dictionary, ItsModel, Length, Out, PassageCount, TextFolder, open_study
from writesae.report.terminal import replacement_table, summary_table

PerAtom = Annotated[int, typer.Option(help="Most firings of one atom.")]
Form = Annotated[
    str | None,
    typer.Option(help="What the write is: 'additive' k v^T, or 'net' with the erase; by default the dictionary's own."),
]
Readings = Annotated[
    list[str] | None,
    typer.Option(
        "--reading", help="Measure only this: 'in_recurrence', 'cache' or 'horizon'; may be given several times."
    ),
]
Horizon = Annotated[int, typer.Option(help="Tokens after the firing over which the horizon reading averages.")]
Figure = Annotated[Path | None, typer.Option(help="Draw the result into this file (.png, .svg, .pdf).")]


@app.command()
def replace(
    sae: Dictionary,
    model: ItsModel = None,
    out: Out = None,
    firings: Annotated[int, typer.Option(help="Most firings to test.")] = 600,
    per_atom: PerAtom = 5,
    atom: Annotated[list[int] | None, typer.Option(help="Test only this atom; may be given several times.")] = None,
    form: Form = None,
    reading: Readings = None,
    losses: Annotated[
        bool, typer.Option("--losses", help="Print where the strongest atom loses, quarter by quarter.")
    ] = False,
    figure: Figure = None,
    passages: PassageCount = 200,
    length: Length = 256,
    text: TextFolder = None,
    horizon: Horizon = 16,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Replace native writes by the atoms of a saved dictionary, on held-out text, and compare with deleting them.

    Every condition is measured in three readings: at the token itself (in_recurrence), through an edit of the cached state
    at the next token (cache), and over the coming tokens (horizon). KLs are in nats. Dictionaries of writes, of net writes and
    of states are tested alike.

    Example: writesae replace --sae runs/l2h1/sae --firings 2000 --losses
    """
    with plain_errors():
        from writesae.evaluation.replacing.replacement import READINGS, ReplacementConfig, replacement

        more: dict = {"form": form, "readings": tuple(reading or READINGS), "seed": seed, "horizon": horizon}
        config = ReplacementConfig(atoms=tuple(atom) if atom else None, per_atom=per_atom, total=firings, **more)
        study = open_study(sae, model, passages=passages, length=length, seed=seed, text=text)
        with progress() as tell:
            result = replacement(
                study.model,
                study.sae,
                study.tokens,
                layer=study.layer,
                head=study.head,
                config=config,
                on_progress=lambda done, total: tell("replace", done, total),
            )
        result = changed(result, about=study.about)
        if out is not None:
            result.to_json(out)
        if figure is not None:
            result.figure().savefig(figure)
        first = str(result.table["reading"].iloc[0])
        lost = result.losses(first).to_dict("records") if losses else []
    if as_json:
        print_json({"summary": result.summary(), "losses": lost} if losses else result.summary())
        return
    console.print(replacement_table(result.summary(), (result.layer, result.head)))
    if losses:
        console.print(summary_table(lost, f"where the strongest atom at its coefficient loses ({first})"))


@app.command("replace-cells")
def replace_cells(
    folder: Annotated[Path, typer.Argument(help="Folder with a dictionary per cell, such as `writesae train` leaves.")],
    model: ItsModel = None,
    out: Out = None,
    keep: Annotated[Path | None, typer.Option(help="Write every cell's own measurements into this folder.")] = None,
    firings: Annotated[int, typer.Option(help="Most firings to test per cell.")] = 600,
    per_atom: PerAtom = 5,
    form: Form = None,
    reading: Readings = None,
    figure: Figure = None,
    passages: PassageCount = 200,
    length: Length = 256,
    text: TextFolder = None,
    horizon: Horizon = 16,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Replace writes in every cell (layer, head) that has a dictionary, and give mean and spread over the cells.

    Example: writesae replace-cells runs/all-heads/sae --reading in_recurrence --out cells.json
    """
    with plain_errors():
        from writesae.evaluation.replacing.replacement import READINGS, ReplacementConfig, ReplacementResult
        from writesae.evaluation.replacing.replacement_cells import find_cells, sweep_cells

        more: dict = {"form": form, "readings": tuple(reading or READINGS), "seed": seed, "horizon": horizon}
        config = ReplacementConfig(per_atom=per_atom, total=firings, **more)
        cells = find_cells(folder)
        study = open_study(next(iter(cells.values()))[0], model, passages=passages, length=length, seed=seed, text=text)

        def kept(result: ReplacementResult) -> None:
            if keep is not None:
                result.to_json(keep / f"l{result.layer}.h{result.head}.json")

        with progress() as tell:
            result = sweep_cells(
                study.model,
                {cell: sae for cell, (_, sae) in cells.items()},
                study.tokens,
                config,
                on_progress=lambda done, total: tell("replace", done, total),
                on_cell=kept,
            )
        about = {name: value for name, value in study.about.items() if name in ("model", "text")}
        dictionaries = {f"{layer}.{head}": str(path) for (layer, head), (path, _) in cells.items()}
        result = changed(result, about={**about, "dictionaries": dictionaries})
        if out is not None:
            result.to_json(out)
        if figure is not None:
            result.figure().savefig(figure)
    rows = result.summary()
    if as_json:
        print_json({"summary": rows, "cells": result.to_dataframe().to_dict("records")})
        return
    first = result.of(str(result.table["reading"].iloc[0]))
    shown = ["layer", "head", "n", "win_rate", "low", "high", "median_kl_atom", "median_kl_delete", "median_kl_random"]
    title = f"strongest atom at its coefficient, {first['reading'].iloc[0]}"
    console.print(summary_table(first[shown].to_dict("records"), title))
    brief = ("reading", "pool", "scale", "cells", "n", "mean_win_rate", "sd_win_rate", "range", "worst")
    console.print(summary_table([{name: row[name] for name in brief} for row in rows], "over cells"))
