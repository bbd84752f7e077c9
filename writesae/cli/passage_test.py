"""`writesae passage-test`: leave out every write that some atoms stand for, over whole passages."""

from typing import Annotated

import typer

from writesae.cli.base import Json, Seed, app, plain_errors
from writesae.cli.experiments import Dictionary, ItsModel, Length, Out, PassageCount, TextFolder, open_study, show


@app.command("passage-test")
def passage_test(
    sae: Dictionary,
    model: ItsModel = None,
    atom: Annotated[
        list[int] | None, typer.Option(help="An atom of the set; may be given several times. By default a whole side.")
    ] = None,
    side: Annotated[str, typer.Option(help="Without --atom: 'register' atoms, 'bundle' atoms, or 'all'.")] = "register",
    most: Annotated[int | None, typer.Option(help="At most so many atoms of the side, drawn at random.")] = None,
    threshold: Annotated[float, typer.Option(help="Median cosine from which on an atom is a register.")] = 0.05,
    draws: Annotated[int, typer.Option(help="Times each random condition is drawn.")] = 3,
    passages: PassageCount = 20,
    length: Length = 256,
    text: TextFolder = None,
    seed: Seed = 2026,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """What do all the writes cost, in bits per token, at which some atoms fire, and what does noise in their place?

    Example: writesae passage-test --sae runs/l2h1/sae --side register --most 50
    """
    with plain_errors():
        from writesae.evaluation.replacing.passage_test import PassageTestConfig
        from writesae.evaluation.replacing.passage_test import passage_test as run

        atoms = tuple(atom) if atom else None
        config = PassageTestConfig(atoms=atoms, side=side, most=most, threshold=threshold, draws=draws, seed=seed)
        study = open_study(sae, model, passages=passages, length=length, seed=0, text=text)
        result = study.run(run, config, "replace")
        show(result, study, out, as_json)
