"""`writesae readers`: which later heads read the writes of an atom."""

from typing import Annotated

import typer

from writesae.cli.base import Json, Seed, app, plain_errors
from writesae.cli.experiments import Dictionary, ItsModel, Length, Out, PassageCount, TextFolder, open_study, show


@app.command()
def readers(
    sae: Dictionary,
    model: ItsModel = None,
    out: Out = None,
    atom: Annotated[list[int] | None, typer.Option(help="Study this atom; may be given several times.")] = None,
    count: Annotated[int, typer.Option(help="Without --atom: as many of the atoms that fire most often.")] = 8,
    per_atom: Annotated[int, typer.Option(help="Most firings of an atom.")] = 40,
    form: Annotated[
        str, typer.Option(help="What deletion takes: 'additive' k v^T, or 'net' with the erase.")
    ] = "additive",
    horizon: Annotated[int, typer.Option(help="Tokens after the firing over which heads are compared.")] = 16,
    passages: PassageCount = 60,
    length: Length = 256,
    text: TextFolder = None,
    seed: Seed = 2026,
    as_json: Json = False,
) -> None:
    """Find the later heads whose output changes most when an atom's writes are deleted, on held-out text.

    Every firing is paired with a write of like norm at a position of the same passage where the atom is silent; the ratio
    is that of the changes, and an interval redraws whole passages. Only layers above the dictionary's can read its writes.

    Example: writesae readers --sae runs/l9h4/sae --count 4 --out readers.json
    """
    with plain_errors():
        from writesae.evaluation.acting.readers import ReadersConfig
        from writesae.evaluation.acting.readers import readers as find_readers

        config = ReadersConfig(
            atoms=tuple(atom) if atom else None,
            count=count,
            per_atom=per_atom,
            horizon=horizon,
            form=form,
            seed=seed,
        )
        study = open_study(sae, model, passages=passages, length=length, seed=seed, text=text)
        result = study.run(find_readers, config, "readers")
        show(result, study, out, as_json)
