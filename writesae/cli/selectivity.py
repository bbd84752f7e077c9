"""The command that measures the paper's selectivity beside the check that shows how little it says."""

from typing import Annotated

import typer

from writesae.cli.base import Json, Seed, app, plain_errors
from writesae.cli.experiments import Dictionary, ItsModel, Length, Out, PassageCount, TextFolder, open_study, show


@app.command()
def selectivity(
    sae: Dictionary,
    model: ItsModel = None,
    out: Out = None,
    firings: Annotated[int, typer.Option(help="Most firings to test.")] = 200,
    epsilon: Annotated[float, typer.Option(help="Norm of what is added, in units of --scale.")] = 1.0,
    scale: Annotated[str, typer.Option(help="'unit', or 'norm': that of the native write.")] = "unit",
    ranked: Annotated[
        str, typer.Option(help="Tokens by 'absolute' shift, or by how much they were 'raised'.")
    ] = "absolute",
    passages: PassageCount = 60,
    length: Length = 256,
    text: TextFolder = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Do an atom and a random matrix shift different tokens? Any two directions do: gaussian~gaussian is the check.

    Selectivity is 1 minus the overlap of the K most shifted tokens. Example: writesae selectivity --sae runs/l2h1/sae
    """
    with plain_errors():
        from writesae.evaluation.describing.selectivity import SelectivityConfig
        from writesae.evaluation.describing.selectivity import selectivity as measure

        config = SelectivityConfig(epsilon=epsilon, scale=scale, ranked=ranked, total=firings, seed=seed)
        study = open_study(sae, model, passages=passages, length=length, seed=seed, text=text)
        result = study.run(measure, config, "selectivity")
        show(result, study, out, as_json)
