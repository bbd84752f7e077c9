"""`writesae logits`: what adding atoms to single writes does to later logits, predicted with nothing fitted and measured."""

from dataclasses import replace
from typing import Annotated

import typer

from writesae.cli.base import Json, Seed, app, plain_errors
from writesae.cli.experiments import Dictionary, ItsModel, Length, Out, PassageCount, TextFolder, open_study, show

EVERY = "all"

Cells = Annotated[
    list[str] | None,
    typer.Option(
        "--cell",
        help="Edit this cell, as layer.head, or 'all' of them; may be given several times. By default the dictionary's.",
    ),
]
Horizons = Annotated[list[int] | None, typer.Option("--horizon", help="Tokens after t (0, 1, 4, 16).")]


@app.command()
def logits(
    sae: Dictionary,
    model: ItsModel = None,
    out: Out = None,
    firings: Annotated[int, typer.Option(help="Most firings, each a context.")] = 60,
    cell: Cells = None,
    horizon: Horizons = None,
    same_precision: Annotated[
        bool, typer.Option("--same-precision", help="Compute in the model's own precision, not in float64.")
    ] = False,
    passages: PassageCount = 60,
    length: Length = 256,
    text: TextFolder = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Predict from the untouched run, with nothing fitted, what adding an atom to one write does to later logits.

    Several predictors stand beside the measured shifts, from the three-factor formula to one backward pass and beyond, over
    sizes of the edit, horizons, top and tail tokens; with the null of another context's gradient.

    Example: writesae logits --sae runs/l1h2/sae --cell all --out logits.json
    """
    with plain_errors():
        from writesae.evaluation.predicting.logit_shift import LogitShiftConfig, logit_shift

        study = open_study(sae, model, passages=passages, length=length, seed=seed, text=text)
        cells = None
        if cell is not None:
            cfg = study.model.cfg
            every = [(at, head) for at in cfg.recurrent_layers for head in range(cfg.n_heads)]
            cells = tuple(every if EVERY in cell else [parse_cell(word) for word in cell])
        config = LogitShiftConfig(total=firings, cells=cells, double=not same_precision, seed=seed)
        if horizon:
            config = replace(config, horizons=tuple(horizon))
        result = study.run(logit_shift, config, "logits")
        show(result, study, out, as_json)


def parse_cell(word: str) -> tuple[int, int]:
    """layer.head in numbers; `ValueError` for anything else."""
    parts = word.split(".")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"--cell takes layer.head, such as 2.1, or {EVERY!r}; got {word!r}")
    return int(parts[0]), int(parts[1])
