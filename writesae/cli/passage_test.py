"""`writesae passage-test`: leave out every write that some atoms stand for, over whole passages."""

from typing import Annotated

import typer

from writesae.cli.experiments import Threshold, Work, study_verb


@study_verb("passage-test", passages=20, text_seed=0)
def passage_test(
    atom: Annotated[
        list[int] | None, typer.Option(help="An atom of the set; may be given several times. By default a whole side.")
    ] = None,
    side: Annotated[str, typer.Option(help="Without --atom: 'register' atoms, 'bundle' atoms, or 'all'.")] = "register",
    most: Annotated[int | None, typer.Option(help="At most so many atoms of the side, drawn at random.")] = None,
    threshold: Threshold = 0.05,
    draws: Annotated[int, typer.Option(help="Times each random condition is drawn.")] = 3,
    *,
    seed: int,
) -> Work:
    """What do all the writes cost, in bits per token, at which some atoms fire, and what does noise in their place?

    Example: writesae passage-test --sae runs/l2h1/sae --side register --most 50
    """
    from writesae.evaluation.replacing.passage_test import PassageTestConfig
    from writesae.evaluation.replacing.passage_test import passage_test as run

    atoms = tuple(atom) if atom else None
    config = PassageTestConfig(atoms=atoms, side=side, most=most, threshold=threshold, draws=draws, seed=seed)
    return Work(config, lambda study, config: study.run(run, config, "replace"))
