"""`writesae steer`: amplify the atoms that mark the places before a token, and count it in what is generated."""

from pathlib import Path
from typing import Annotated

import typer

from writesae.cli.base import Json, Seed, app, plain_errors, progress
from writesae.cli.experiments import Dictionary, ItsModel, Length, Out, PassageCount, TextFolder, open_study, show

Beside = Annotated[
    list[Path] | None,
    typer.Option(
        "--also", help="Dictionary of another head of the layer, to steer together; may be given several times."
    ),
]


@app.command()
def steer(
    sae: Dictionary,
    model: ItsModel = None,
    out: Out = None,
    also: Beside = None,
    token: Annotated[
        list[int] | None,
        typer.Option(help="A wanted token, by number; may be given several times. By default all that hold a newline."),
    ] = None,
    top: Annotated[int, typer.Option(help="How many atoms steer, per head.")] = 10,
    dose: Annotated[
        list[float] | None,
        typer.Option(help="Multiple of the mean coefficients; may be given several times (1 2 5 10)."),
    ] = None,
    prompts: Annotated[int, typer.Option(help="How many prompts.")] = 40,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate after each.")] = 100,
    temperature: Annotated[float, typer.Option(help="Of the sampling.")] = 0.7,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token instead.")] = False,
    passages: PassageCount = 100,
    length: Length = 256,
    text: TextFolder = None,
    seed: Seed = 123,
    as_json: Json = False,
) -> None:
    """Steer generation by amplified atoms, beside other atoms and Gaussian matrices of equal norm at every dose.

    Example: writesae steer --sae runs/l9h4/sae --dose 1 --dose 5 --out steer.json
    """
    with plain_errors():
        from writesae.evaluation.acting.steering import SteeringConfig, steering
        from writesae.sae.write_sae import WriteSAE

        config = SteeringConfig(
            token=tuple(token) if token else None,
            top=top,
            doses=tuple(dose) if dose else SteeringConfig.doses,
            prompts=prompts,
            new_tokens=new_tokens,
            temperature=temperature,
            greedy=greedy,
            seed=seed,
        )
        study = open_study(sae, model, passages=passages, length=length, seed=seed, text=text)
        dictionaries = {study.head: study.sae}
        for path in also or ():
            other = WriteSAE.load(path)
            layer, head = other.provenance.get("layer"), other.provenance.get("head")
            if layer != study.layer or head is None or head in dictionaries:
                needed = f"one of another head of layer {study.layer} is needed"
                raise ValueError(f"{path} holds a dictionary of layer {layer}, head {head}; {needed}")
            dictionaries[head] = other
        with progress() as tell:
            result = steering(
                study.model,
                dictionaries,
                study.tokens,
                layer=study.layer,
                config=config,
                on_progress=lambda done, total: tell("steer", done, total),
            )
        show(result, study, out, as_json)
