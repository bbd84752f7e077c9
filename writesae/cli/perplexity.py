"""`writesae perplexity`: exchange memories for reconstructions, and read on."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from writesae.cli.experiments import Study, Work, study_verb

if TYPE_CHECKING:
    from writesae.evaluation.describing.perplexity import PerplexityConfig
    from writesae.evaluation.result import Result


@study_verb(passages=40, seed=0)
def perplexity(
    other: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of the dictionary of another head of the same layer; may be given several times."),
    ] = None,
    prefix: Annotated[int | None, typer.Option(help="Tokens read before the splice; by default half.")] = None,
    throughout: Annotated[
        bool, typer.Option("--throughout", help="Replace writes while the prefix is read, too.")
    ] = False,
    subsets: Annotated[int, typer.Option(help="Random subsets of heads per size.")] = 5,
    *,
    seed: int,
) -> Work:
    """Put a dictionary's reconstruction in the place of a head's memory after a prefix; what does the rest of the text cost?

    Beside it: an empty memory, the mean memory, the best matrix of each rank, and itself (the floor). With several heads,
    random subsets of them.

    Example: writesae perplexity --sae runs/l2h1/sae --other runs/l2h3/sae --figure perplexity.png
    """
    from writesae.evaluation.describing.perplexity import PerplexityConfig
    from writesae.evaluation.describing.perplexity import perplexity as measure
    from writesae.evaluation.describing.splices import by_head
    from writesae.sae.write_sae import WriteSAE

    config = PerplexityConfig(prefix=prefix, subsets=subsets, throughout=throughout, seed=seed)
    others = [(str(path), WriteSAE.load(path)) for path in other or []]

    def run(study: Study, config: "PerplexityConfig") -> "Result":
        heads = by_head([(str(study.about["sae"]), study.sae), *others])
        return study.run_with(measure, heads, "perplexity", layer=study.layer, config=config)

    return Work(config, run)
