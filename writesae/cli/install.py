"""writesae install: write tokens into one head's memory so that they appear in what is generated."""

from typing import Annotated

import typer

from writesae.cli.base import Json, app, plain_errors
from writesae.cli.experiments import Dictionary, ItsModel, Length, Out, PassageCount, TextFolder, open_study, show


@app.command()
def install(
    sae: Dictionary,
    model: ItsModel = None,
    passages: PassageCount = 60,
    length: Length = 256,
    prompts: Annotated[int, typer.Option(help="Passages that give prompts (30 in the paper).")] = 20,
    positions: Annotated[int, typer.Option(help="Install positions per passage (5 in the paper).")] = 2,
    per_stratum: Annotated[int, typer.Option(help="Targets per stratum and prompt (2 in the paper).")] = 2,
    strata: Annotated[str, typer.Option(help="Of frequent, middle, rare, semantic; separated by commas.")] = "all",
    magnitudes: Annotated[str, typer.Option(help="Norms in native write norms, separated by commas.")] = "1.5,3,6",
    cells: Annotated[
        str, typer.Option(help="Of given (the dictionary's), auto (the best one), spread (many at once); by commas.")
    ] = "given,auto,spread",
    objective: Annotated[str, typer.Option(help="What Lambda raises: greedy, any, mean or first.")] = "greedy",
    rounds: Annotated[int, typer.Option(help="Rounds of ascent of the refined direction.")] = 8,
    steering: Annotated[bool, typer.Option(help="Run the residual-stream controls of equal collateral KL.")] = True,
    seed: int = 2026,
    text: TextFolder = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Add rank-1 writes at the end of prompts so that a chosen token appears in twenty greedy tokens.

    Example: writesae install --sae runs/gdn --prompts 10 --cells auto --magnitudes 3
    """
    with plain_errors():
        from writesae.evaluation.installing.install import InstallConfig
        from writesae.evaluation.installing.install import install as run
        from writesae.evaluation.installing.install_context import STRATA

        config = InstallConfig(
            prompts=prompts,
            positions=positions,
            per_stratum=per_stratum,
            strata=STRATA if strata == "all" else tuple(strata.split(",")),
            magnitudes=tuple(float(number) for number in magnitudes.split(",")),
            cells=tuple(cells.split(",")),
            objective=objective,
            rounds=rounds,
            steering=steering,
            seed=seed,
        )
        study = open_study(sae, model, passages=passages, length=length, seed=seed, text=text)
        result = study.run(run, config, "install")
        show(result, study, out, as_json)
