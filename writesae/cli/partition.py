"""`writesae partition`: which atoms look like one native write, and whether there are two kinds."""

from pathlib import Path
from typing import Annotated

import typer

from writesae.cli.experiments import Threshold, Work, study_verb


@study_verb(seed=0)
def partition(
    other: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of a dictionary of another seed to match the atoms with; may be given several times."
        ),
    ] = None,
    alive: Annotated[
        str, typer.Option(help="Which atoms that fire are alive: 'fired', 'frequent', 'recent' or 'strong'.")
    ] = "fired",
    threshold: Threshold = 0.05,
    *,
    seed: int,
) -> Work:
    """Compare every atom with the native writes at which it fires, and ask whether there are two kinds of atoms.

    Cosines are medians over firings, of the additive write and of the net write. Of the BICs of 1, 2, .. Gaussians the lowest
    is best.

    Example: writesae partition --sae runs/l2h1/sae --other runs/l2h1-seed1/sae --figure partition.png
    """
    from writesae.evaluation.describing.partition import PartitionConfig
    from writesae.evaluation.describing.partition import partition as measure
    from writesae.sae.write_sae import WriteSAE

    config = PartitionConfig(alive=alive, threshold=threshold, seed=seed)
    others = [WriteSAE.load(path) for path in other or []]
    return Work(config, lambda study, config: study.run(measure, config, "partition", others=others))
