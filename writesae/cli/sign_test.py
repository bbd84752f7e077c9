"""writesae sign-test: edits of single cached states along a token's direction, measured against predicted."""

from typing import Annotated

import typer

from writesae.cli.base import Json, app, plain_errors
from writesae.cli.experiments import Dictionary, ItsModel, Length, Out, PassageCount, TextFolder, open_study, show


@app.command("sign-test")
def sign_test(
    sae: Dictionary,
    model: ItsModel = None,
    passages: PassageCount = 40,
    length: Length = 256,
    total: Annotated[int, typer.Option(help="Pairs of a position and a token (2,000 in the paper).")] = 2000,
    magnitude: Annotated[float, typer.Option(help="Norm of an edit, in native write norms.")] = 1.0,
    seed: int = 2026,
    text: TextFolder = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Change a cached state along a token's direction, and compare the token's change with its prediction.

    Example: writesae sign-test --sae runs/gdn --total 500
    """
    with plain_errors():
        from writesae.evaluation.predicting.sign_test import SignTestConfig
        from writesae.evaluation.predicting.sign_test import sign_test as run

        config = SignTestConfig(total=total, magnitude=magnitude, seed=seed)
        study = open_study(sae, model, passages=passages, length=length, seed=seed, text=text)
        result = study.run(run, config, "sign-test")
        show(result, study, out, as_json)
