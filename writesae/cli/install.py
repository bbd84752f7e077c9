"""`writesae install`: write tokens into one head's memory so that they appear in what is generated."""

from dataclasses import replace
from typing import Annotated

import typer

from writesae.cli.experiments import Work, study_verb


@study_verb()
def install(
    prompts: Annotated[int, typer.Option(help="Passages that give prompts (30 in the paper).")] = 20,
    positions: Annotated[int, typer.Option(help="Install positions per passage (5 in the paper).")] = 2,
    per_stratum: Annotated[int, typer.Option(help="Targets per stratum and prompt (2 in the paper).")] = 2,
    strata: Annotated[str, typer.Option(help="Of frequent, middle, rare, semantic; separated by commas.")] = "all",
    magnitudes: Annotated[str, typer.Option(help="Norms in native write norms, separated by commas.")] = "1.5,3,6",
    cells: Annotated[
        str, typer.Option(help="Where: given (the dictionary's cell), auto (the best), spread (many); by commas.")
    ] = "given,auto,spread",
    objective: Annotated[str, typer.Option(help="What Lambda raises: greedy, any, mean or first.")] = "greedy",
    rounds: Annotated[int, typer.Option(help="Rounds of ascent of the refined direction.")] = 8,
    steering: Annotated[bool, typer.Option(help="Run the residual-stream controls of equal collateral KL.")] = True,
    *,
    seed: int,
) -> Work:
    """Add rank-1 writes at the end of prompts so that a chosen token appears in twenty greedy tokens.

    Example: writesae install --sae runs/l2h1/sae --prompts 10 --cells auto --magnitudes 3
    """
    from writesae.evaluation.installing.install import InstallConfig
    from writesae.evaluation.installing.install import install as run
    from writesae.evaluation.installing.install_context import STRATA

    config = InstallConfig(
        prompts=prompts,
        positions=positions,
        per_stratum=per_stratum,
        strata=STRATA if strata == "all" else words_of(strata),
        magnitudes=numbers_of("--magnitudes", magnitudes),
        cells=words_of(cells),
        objective=objective,
        rounds=rounds,
        steering=steering,
        seed=seed,
    )
    return Work(
        config,
        lambda study, config: study.run(run, config, "install"),
        prompts * positions,
        "install positions",
        at=lambda number: replace(config, prompts=number, positions=1),
        small=1,
    )


def words_of(listed: str) -> tuple[str, ...]:
    """The words of a list with commas."""
    return tuple(word.strip() for word in listed.split(",") if word.strip())


def numbers_of(option: str, listed: str) -> tuple[float, ...]:
    """The numbers of a list with commas. Raises `ValueError` naming the option and the word that is none."""
    found = []
    for word in words_of(listed):
        try:
            found.append(float(word))
        except ValueError:
            raise ValueError(f"{option} takes numbers separated by commas, such as 1.5,3; got {word!r}") from None
    return tuple(found)
