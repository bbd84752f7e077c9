"""`writesae logits`: what adding atoms to single writes does to later logits, predicted with nothing fitted and measured."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from writesae.cli.experiments import Study, Work, study_verb

if TYPE_CHECKING:
    from writesae.evaluation.predicting.logit_shift import LogitShiftConfig
    from writesae.evaluation.result import Result

EVERY = "all"
Cells = Annotated[
    list[str] | None,
    typer.Option(
        "--cell",
        help="Edit this cell, as LAYER:HEAD, or 'all' of them; may be given several times. By default the dictionary's.",
    ),
]
Horizons = Annotated[
    list[int] | None,
    typer.Option("--horizon", help="Tokens after the write; may be given several times (0, 1, 4, 16)."),
]


@study_verb(seed=0)
def logits(
    firings: Annotated[int, typer.Option(help="Most firings, each a context.")] = 60,
    cell: Cells = None,
    horizon: Horizons = None,
    same_precision: Annotated[
        bool, typer.Option("--same-precision", help="Compute in the model's own precision, not in float64.")
    ] = False,
    *,
    seed: int,
) -> Work:
    """Predict from the untouched run, with nothing fitted, what adding an atom to one write does to later logits.

    Several predictors stand beside the measured shifts, from the three-factor formula to one backward pass and beyond, over
    sizes of the edit, horizons, top and tail tokens; with the null of another context's gradient.

    Example: writesae logits --sae runs/l2h1/sae --cell 2:1 --cell 0:3 --out logits.json
    """
    from writesae.evaluation.predicting.logit_shift import LogitShiftConfig, logit_shift

    config = LogitShiftConfig(total=firings, double=not same_precision, seed=seed)
    if horizon:
        config = replace(config, horizons=tuple(horizon))
    named = [parse_cell(word) for word in cell or () if word != EVERY]

    def run(study: Study, config: "LogitShiftConfig") -> "Result":
        if cell:
            cfg = study.model.cfg
            every = [(layer, head) for layer in cfg.recurrent_layers for head in range(cfg.n_heads)]
            config = replace(config, cells=tuple(every if EVERY in cell else named))
        return study.run(logit_shift, config, "logits")

    return Work(config, run, firings, "firings", at=lambda number: replace(config, total=number))


def parse_cell(word: str) -> tuple[int, int]:
    """LAYER:HEAD (or LAYER.HEAD) in numbers; `ValueError` for anything else."""
    parts = word.replace(":", ".").split(".")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"--cell takes LAYER:HEAD, such as 2:1; got {word!r}")
    return int(parts[0]), int(parts[1])
