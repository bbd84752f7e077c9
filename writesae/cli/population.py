"""`writesae population`: the replacement test over many atoms, atom by atom."""

from typing import Annotated

import typer

from writesae.cli.base import Json, Seed, app, plain_errors
from writesae.cli.experiments import Dictionary, ItsModel, Length, Out, PassageCount, TextFolder, open_study, show


@app.command()
def population(
    sae: Dictionary,
    model: ItsModel = None,
    atoms: Annotated[int, typer.Option(help="Most atoms tested, from every stretch of cosines.")] = 100,
    per_atom: Annotated[int, typer.Option(help="Most firings of one atom.")] = 30,
    min_firings: Annotated[int, typer.Option(help="Firings that an atom needs to count.")] = 5,
    threshold: Annotated[float, typer.Option(help="Median cosine from which on an atom is a register.")] = 0.05,
    pool: Annotated[
        str, typer.Option(help="'listed', the atom that fires, or 'dominant', the strongest there.")
    ] = "listed",
    scale: Annotated[str, typer.Option(help="'coef', the atom's coefficient, or 'norm', the native norm.")] = "coef",
    horizon: Annotated[int, typer.Option(help="Tokens after the firing that the horizon reading averages.")] = 16,
    passages: PassageCount = 60,
    length: Length = 256,
    text: TextFolder = None,
    seed: Seed = 2026,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Does every atom win against deletion, or a few? Registers (along the writes) against bundle atoms.

    Atoms are chosen from every stretch of their cosine to the native writes; each counts once, by its own win rate.

    Example: writesae population --sae runs/l2h1/sae --atoms 100 --out results/population.json
    """
    with plain_errors():
        from writesae.evaluation.replacing.population import PopulationConfig
        from writesae.evaluation.replacing.population import population as run

        config = PopulationConfig(
            n_atoms=atoms,
            per_atom=per_atom,
            min_firings=min_firings,
            threshold=threshold,
            pool=pool,
            scale=scale,
            horizon=horizon,
            seed=seed,
        )
        study = open_study(sae, model, passages=passages, length=length, seed=0, text=text)
        result = study.run(run, config, "replace")
        show(result, study, out, as_json)
