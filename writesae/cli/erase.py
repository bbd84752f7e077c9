"""`writesae erase`: take away what an atom wrote, write it where the model did not, and follow its preferred token."""

from typing import Annotated

import typer

from writesae.cli.base import Json, Seed, app, plain_errors
from writesae.cli.experiments import Dictionary, ItsModel, Length, Out, PassageCount, TextFolder, open_study, show


@app.command()
def erase(
    sae: Dictionary,
    model: ItsModel = None,
    out: Out = None,
    atom: Annotated[list[int] | None, typer.Option(help="Study this atom; may be given several times.")] = None,
    count: Annotated[int, typer.Option(help="Without --atom: as many of the atoms that fire most often.")] = 8,
    per_atom: Annotated[int, typer.Option(help="Most firings of an atom, both halves together.")] = 100,
    writes: Annotated[int, typer.Option(help="Most silent positions at which an atom is written.")] = 40,
    form: Annotated[
        str, typer.Option(help="What deletion takes: 'additive' k v^T, or 'net' with the erase.")
    ] = "additive",
    horizon: Annotated[int, typer.Option(help="Tokens after the edit over which the horizon reading averages.")] = 16,
    passages: PassageCount = 60,
    length: Length = 256,
    text: TextFolder = None,
    seed: Seed = 2026,
    as_json: Json = False,
) -> None:
    """Erase atoms where they fire and write them where they are silent, on held-out text.

    The token that an atom's deletion costs most is chosen on one half of the passages and tested on the other; the number on
    the half that chose it stands beside it as same_half. Changes of its log-probability are in nats.

    Example: writesae erase --sae runs/l9h4/sae --count 4 --out erase.json
    """
    with plain_errors():
        from writesae.evaluation.acting.erasure import ErasureConfig, erasure

        config = ErasureConfig(
            atoms=tuple(atom) if atom else None,
            count=count,
            per_atom=per_atom,
            writes=writes,
            horizon=horizon,
            form=form,
            seed=seed,
        )
        study = open_study(sae, model, passages=passages, length=length, seed=seed, text=text)
        result = study.run(erasure, config, "erase")
        show(result, study, out, as_json)
