"""The commands that put atoms in the place of writes: in one cell, and in every cell that has a dictionary."""

from dataclasses import replace as changed
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from writesae.cli.base import OUTPUT, DryRun, Json, Seed, app, console, print_json, progress
from writesae.cli.dry_run import begin, forward_part, passages_in_words, replacement_part
from writesae.cli.experiments import (
    Figure,
    Horizon,
    ItsModel,
    Length,
    Out,
    PassageCount,
    PerAtom,
    TextFolder,
    Work,
    keep,
    open_study,
    study_verb,
)
from writesae.cli.outputs import check_folder, check_outputs
from writesae.report.terminal import replacement_table, summary_table

if TYPE_CHECKING:
    from writesae.evaluation.replacing.replacement_cells import CellsResult

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


@study_verb(passages=200, seed=0)
def replace(
    firings: Annotated[int, typer.Option(help="Most firings to test.")] = 600,
    per_atom: PerAtom = 5,
    atom: Annotated[list[int] | None, typer.Option(help="Test only this atom; may be given several times.")] = None,
    form: Form = None,
    reading: Readings = None,
    horizon: Horizon = 16,
    losses: Annotated[
        bool, typer.Option("--losses", help="Print where the strongest atom loses, quarter by quarter.")
    ] = False,
    *,
    seed: int,
) -> Work:
    """Replace native writes by the atoms of a saved dictionary, on held-out text, and compare with deleting them.

    Every condition is measured in three readings: at the token itself (in_recurrence), through an edit of the cached state
    at the next token (cache), and over the coming tokens (horizon). KLs are in nats. Dictionaries of writes, of net writes and
    of states are tested alike.

    Example: writesae replace --sae runs/l2h1/sae --firings 2000 --losses
    """
    from writesae.evaluation.replacing.replacement import READINGS, ReplacementConfig, replacement

    more: dict = {"form": form, "readings": tuple(reading or READINGS), "seed": seed, "horizon": horizon}
    config = ReplacementConfig(atoms=tuple(atom) if atom else None, per_atom=per_atom, total=firings, **more)

    def show(result: Any, as_json: bool) -> None:
        first = str(result.table["reading"].iloc[0])
        lost = result.losses(first).to_dict("records") if losses else []
        if as_json:
            print_json({"summary": result.summary(), "losses": lost} if losses else result.summary())
            return
        console.print(replacement_table(result.summary(), (result.layer, result.head)))
        if losses:
            console.print(summary_table(lost, f"where the strongest atom at its coefficient loses ({first})"))

    return Work(
        config,
        lambda study, config: study.run(replacement, config, "replace"),
        firings,
        "firings",
        at=lambda number: changed(config, total=number),
        show=show,
    )


@app.command("replace-cells")
def replace_cells(
    folder: Annotated[Path, typer.Argument(help="Folder with a dictionary per cell, such as `writesae train` leaves.")],
    model: ItsModel = None,
    firings: Annotated[int, typer.Option(help="Most firings to test per cell.")] = 600,
    per_atom: PerAtom = 5,
    form: Form = None,
    reading: Readings = None,
    horizon: Horizon = 16,
    passages: PassageCount = 200,
    length: Length = 256,
    text: TextFolder = None,
    seed: Seed = 0,
    out: Out = None,
    kept: Annotated[
        Path | None,
        typer.Option("--keep", help="Write every cell's own measurements into this folder.", rich_help_panel=OUTPUT),
    ] = None,
    figure: Figure = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Replace writes in every cell (layer, head) that has a dictionary, and give mean and spread over the cells.

    Example: writesae replace-cells runs/l2h1 --reading in_recurrence --out cells.json
    """
    from writesae.evaluation.replacing.replacement import READINGS, ReplacementConfig, ReplacementResult
    from writesae.evaluation.replacing.replacement_cells import find_cells, sweep_cells

    more: dict = {"form": form, "readings": tuple(reading or READINGS), "seed": seed, "horizon": horizon}
    config = ReplacementConfig(per_atom=per_atom, total=firings, **more)
    check_outputs(out, figure)
    check_folder("--keep", kept)
    cells = find_cells(folder)
    source: dict[str, Any] = {"passages": passages, "length": length, "seed": seed, "text": text}
    source |= {"sae": next(iter(cells.values()))[0], "model": model}
    if dry_run:
        _dry_run(folder, [cell for cell in cells], source, config.total, [out, kept, figure], as_json)
        return
    study = open_study(**source)

    def on_cell(result: ReplacementResult) -> None:
        if kept is not None:
            result.to_json(kept / f"l{result.layer}.h{result.head}.json")

    with progress() as tell:
        result = sweep_cells(
            study.model,
            {cell: sae for cell, (_, sae) in cells.items()},
            study.tokens,
            config,
            on_progress=lambda done, total: tell("replace", done, total),
            on_cell=on_cell,
        )
    about = {name: value for name, value in study.about.items() if name in ("model", "text")}
    dictionaries = {f"{layer}.{head}": str(path) for (layer, head), (path, _) in cells.items()}
    result = changed(result, about={**about, "dictionaries": dictionaries})
    keep(result, out, figure)
    _show_cells(result, as_json)


def _dry_run(
    folder: Path,
    cells: list[tuple[int, int]],
    source: dict[str, Any],
    firings: int,
    written: list[Path | None],
    as_json: bool,
) -> None:
    from writesae.cli.experiments import open_dictionary

    _, origin = open_dictionary(source["sae"], source["model"])
    plan, loaded = begin("replace-cells", source["model"] or origin["model"])
    passages = source["passages"]
    plan.reads = passages_in_words(passages, source["length"], "held-out", source["text"])
    plan.computes = [f"replacement tests of {len(cells)} cells in {folder}, at most {firings:,} firings each"]
    plan.writes = [str(path) for path in written if path is not None]
    if loaded is not None:
        few = open_study(**{**source, "passages": min(passages, 8)}, loaded=loaded)
        test = replacement_part(loaded, few.sae, few.tokens, (few.layer, few.head), firings=firings, times=len(cells))
        plan.measure([forward_part(loaded, few.tokens, passages * len(cells)), test])
    plan.show(as_json)


def _show_cells(result: "CellsResult", as_json: bool) -> None:
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
