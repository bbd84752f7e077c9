"""`writesae population`: the replacement test over many atoms, atom by atom."""

from dataclasses import replace
from typing import Annotated

import typer

from writesae.cli.experiments import FEW_FIRINGS, Horizon, PerAtom, Threshold, Work, study_verb


@study_verb(text_seed=0)
def population(
    atoms: Annotated[int, typer.Option(help="Most atoms tested, from every stretch of cosines.")] = 100,
    per_atom: PerAtom = 30,
    min_firings: Annotated[int, typer.Option(help="Firings that an atom needs to count.")] = 5,
    threshold: Threshold = 0.05,
    pool: Annotated[
        str, typer.Option(help="'listed', the atom that fires, or 'dominant', the strongest there.")
    ] = "listed",
    scale: Annotated[str, typer.Option(help="'coef', the atom's coefficient, or 'norm', the native norm.")] = "coef",
    horizon: Horizon = 16,
    *,
    seed: int,
) -> Work:
    """Does every atom win against deletion, or a few? Registers (along the writes) against bundle atoms.

    Atoms are chosen from every stretch of their cosine to the native writes; each counts once, by its own win rate.

    Example: writesae population --sae runs/l2h1/sae --atoms 100 --out results/population.json
    """
    from writesae.evaluation.replacing.population import PopulationConfig
    from writesae.evaluation.replacing.population import population as run

    shape: dict = {"threshold": threshold, "pool": pool, "scale": scale, "horizon": horizon, "seed": seed}
    config = PopulationConfig(n_atoms=atoms, per_atom=per_atom, min_firings=min_firings, **shape)
    few = min(FEW_FIRINGS, per_atom)
    return Work(
        config,
        lambda study, config: study.run(run, config, "replace"),
        atoms * per_atom // few,
        f"atoms of {few} firings",
        at=lambda number: replace(config, n_atoms=number, per_atom=few, min_firings=1),
    )
