"""The command that splits a dictionary's atoms into those that look like one native write, and those that do not."""

from pathlib import Path
from typing import Annotated

import typer

from writesae.cli.base import Json, Seed, app, plain_errors
from writesae.cli.experiments import Dictionary, ItsModel, Length, Out, PassageCount, TextFolder, open_study, show


@app.command()
def partition(
    sae: Dictionary,
    model: ItsModel = None,
    out: Out = None,
    other: Annotated[
        list[Path] | None,
        typer.Option(help="A dictionary of another seed to match the atoms with; may be given several times."),
    ] = None,
    alive: Annotated[
        str, typer.Option(help="Which atoms that fire are alive: 'fired', 'frequent', 'recent' or 'strong'.")
    ] = "fired",
    threshold: Annotated[float, typer.Option(help="The cosine that splits atoms without a mixture.")] = 0.05,
    figure: Annotated[Path | None, typer.Option(help="Draw the histogram into this file (.png, .svg, .pdf).")] = None,
    passages: PassageCount = 60,
    length: Length = 256,
    text: TextFolder = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compare every atom with the native writes at which it fires, and ask whether there are two kinds of atoms.

    Cosines are medians over firings, of the additive write and of the net write. Of the BICs of 1, 2, .. Gaussians the lowest
    is best. Example: writesae partition --sae runs/l2h1/sae --other runs/l2h1-seed1/sae --figure partition.png
    """
    with plain_errors():
        from writesae.evaluation.describing.partition import PartitionConfig
        from writesae.evaluation.describing.partition import partition as measure
        from writesae.sae.write_sae import WriteSAE

        config = PartitionConfig(alive=alive, threshold=threshold, seed=seed)
        others = [WriteSAE.load(path) for path in other or []]
        study = open_study(sae, model, passages=passages, length=length, seed=seed, text=text)
        result = study.run(measure, config, "partition", others=others)
        if figure is not None:
            result.figure().savefig(figure)
        show(result, study, out, as_json)
