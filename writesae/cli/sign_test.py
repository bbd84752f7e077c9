"""`writesae sign-test`: edits of single cached states along a token's direction, measured against predicted."""

from dataclasses import replace
from typing import Annotated

import typer

from writesae.cli.experiments import Work, study_verb


@study_verb("sign-test", passages=40)
def sign_test(
    total: Annotated[int, typer.Option(help="Pairs of a position and a token (2,000 in the paper).")] = 2000,
    magnitude: Annotated[float, typer.Option(help="Norm of an edit, in native write norms.")] = 1.0,
    *,
    seed: int,
) -> Work:
    """Change a cached state along a token's direction, and compare the token's change with its prediction.

    Example: writesae sign-test --sae runs/l2h1/sae --total 500
    """
    from writesae.evaluation.predicting.sign_test import SignTestConfig
    from writesae.evaluation.predicting.sign_test import sign_test as run

    config = SignTestConfig(total=total, magnitude=magnitude, seed=seed)
    return Work(
        config,
        lambda study, config: study.run(run, config, "sign-test"),
        total,
        "pairs",
        at=lambda number: replace(config, total=number),
    )
