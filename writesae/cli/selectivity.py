"""`writesae selectivity`: the paper's selectivity, beside the check that shows how little it says."""

from dataclasses import replace
from typing import Annotated

import typer

from writesae.cli.experiments import Work, study_verb


@study_verb(seed=0)
def selectivity(
    firings: Annotated[int, typer.Option(help="Most firings to test.")] = 200,
    epsilon: Annotated[float, typer.Option(help="Norm of what is added, in units of --scale.")] = 1.0,
    scale: Annotated[str, typer.Option(help="'unit', or 'norm': that of the native write.")] = "unit",
    ranked: Annotated[
        str, typer.Option(help="Tokens by 'absolute' shift, or by how much they were 'raised'.")
    ] = "absolute",
    *,
    seed: int,
) -> Work:
    """Do an atom and a random matrix shift different tokens? Any two directions do: gaussian~gaussian is the check.

    Selectivity is 1 minus the overlap of the K most shifted tokens.

    Example: writesae selectivity --sae runs/l2h1/sae --firings 100
    """
    from writesae.evaluation.describing.selectivity import SelectivityConfig
    from writesae.evaluation.describing.selectivity import selectivity as measure

    config = SelectivityConfig(epsilon=epsilon, scale=scale, ranked=ranked, total=firings, seed=seed)
    return Work(
        config,
        lambda study, config: study.run(measure, config, "selectivity"),
        firings,
        "firings",
        at=lambda number: replace(config, total=number),
    )
