"""`writesae baselines`: what else could stand in a write's place, at the same firings and the same budget."""

from typing import Annotated

import typer

from writesae.cli.base import Json, Seed, app, plain_errors
from writesae.cli.experiments import Dictionary, ItsModel, Length, Out, PassageCount, TextFolder, open_study, show
from writesae.cli.training_text import training_text


@app.command()
def baselines(
    sae: Dictionary,
    model: ItsModel = None,
    firings: Annotated[int, typer.Option(help="Most firings to test.")] = 400,
    per_atom: Annotated[int, typer.Option(help="Most firings of one atom.")] = 5,
    horizon: Annotated[int, typer.Option(help="Tokens after the firing that the horizon reading averages.")] = 16,
    train_passages: Annotated[
        int | None, typer.Option(help="Passages of training files; by default as many as the dictionary saw.")
    ] = None,
    passages: PassageCount = 60,
    length: Length = 256,
    text: TextFolder = None,
    seed: Seed = 2026,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """FlatSAE + SVD, rank-2 atoms, principal components, one matrix for all, a table by token: against rank-1 atoms.

    Flat and rank-2 dictionaries are trained here, as the dictionary itself was trained.

    Example: writesae baselines --sae runs/l2h1/sae --firings 400 --out results/baselines.json
    """
    with plain_errors():
        from writesae.evaluation.comparing.baselines import BaselinesConfig
        from writesae.evaluation.comparing.baselines import baselines as run

        config = BaselinesConfig(per_atom=per_atom, total=firings, horizon=horizon, seed=seed)
        study = open_study(sae, model, passages=passages, length=length, seed=0, text=text)
        learned = training_text(study.model, study.sae.provenance, passages=train_passages, length=length, text=text)
        result = study.run(run, config, "replace", train_tokens=learned)
        show(result, study, out, as_json)
