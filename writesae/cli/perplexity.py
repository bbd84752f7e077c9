"""The command that exchanges memories for reconstructions, and reads on."""

from pathlib import Path
from typing import Annotated

import typer

from writesae.cli.base import Json, Seed, app, plain_errors, progress
from writesae.cli.experiments import Dictionary, ItsModel, Length, Out, PassageCount, TextFolder, open_study, show


@app.command()
def perplexity(
    sae: Dictionary,
    model: ItsModel = None,
    out: Out = None,
    other: Annotated[
        list[Path] | None,
        typer.Option(help="The dictionary of another head of the same layer; may be given several times."),
    ] = None,
    prefix: Annotated[int | None, typer.Option(help="Tokens read before the splice; by default half.")] = None,
    throughout: Annotated[
        bool, typer.Option("--throughout", help="Replace writes while the prefix is read, too.")
    ] = False,
    subsets: Annotated[int, typer.Option(help="Random subsets of heads per size.")] = 5,
    figure: Annotated[Path | None, typer.Option(help="Draw the curves into this file (.png, .svg, .pdf).")] = None,
    passages: PassageCount = 40,
    length: Length = 256,
    text: TextFolder = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Put a dictionary's reconstruction in the place of a head's memory after a prefix; what does the rest of the text cost?

    Beside it: an empty memory, the mean memory, the best matrix of each rank, and itself (the floor). With several heads,
    random subsets of them. Example: writesae perplexity --sae runs/l2h0/sae --other runs/l2h1/sae --other runs/l2h2/sae
    """
    with plain_errors():
        from writesae.evaluation.describing.perplexity import PerplexityConfig
        from writesae.evaluation.describing.perplexity import perplexity as measure
        from writesae.evaluation.describing.splices import by_head
        from writesae.sae.write_sae import WriteSAE

        config = PerplexityConfig(prefix=prefix, subsets=subsets, throughout=throughout, seed=seed)
        others = [(str(path), WriteSAE.load(path)) for path in other or []]
        study = open_study(sae, model, passages=passages, length=length, seed=seed, text=text)
        with progress() as tell:
            result = measure(
                study.model,
                by_head([(str(sae), study.sae), *others]),
                study.tokens,
                layer=study.layer,
                config=config,
                on_progress=lambda done, total: tell("perplexity", done, total),
            )
        if figure is not None:
            result.figure().savefig(figure)
        show(result, study, out, as_json)
