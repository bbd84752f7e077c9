"""`writesae steer`: amplify the atoms that mark the places before a token, and count it in what is generated."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from writesae.cli.experiments import Study, Work, study_verb

if TYPE_CHECKING:
    from writesae.evaluation.acting.steering import SteeringConfig
    from writesae.evaluation.result import Result
    from writesae.sae.write_sae import WriteSAE

Beside = Annotated[
    list[Path] | None,
    typer.Option(
        "--also",
        help="Folder of the dictionary of another head of the layer, to steer together; may be given several times.",
    ),
]
FEW_TOKENS = 10
"""Tokens that a short run generates."""


@study_verb(passages=100, seed=123)
def steer(
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
    temperature: Annotated[float, typer.Option(help="Of the sampling; logits are divided by it.")] = 0.7,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token instead of sampling.")] = False,
    *,
    seed: int,
) -> Work:
    """Steer generation by amplified atoms, beside other atoms and Gaussian matrices of equal norm at every dose.

    Example: writesae steer --sae runs/l2h1/sae --dose 1 --dose 5 --out steer.json
    """
    from writesae.evaluation.acting.steering import SteeringConfig, steering
    from writesae.sae.write_sae import WriteSAE

    sizes: dict = {
        "top": top,
        "prompts": prompts,
        "new_tokens": new_tokens,
        "temperature": temperature,
        "greedy": greedy,
    }
    config = SteeringConfig(
        token=tuple(token) if token else None, doses=tuple(dose or SteeringConfig.doses), seed=seed, **sizes
    )
    others = [(path, WriteSAE.load(path)) for path in also or ()]

    def run(study: Study, config: "SteeringConfig") -> "Result":
        heads = together(study, others)
        return study.run_with(steering, heads, "steer", layer=study.layer, config=config)

    doses = config.doses
    return Work(
        config,
        run,
        prompts * len(doses) * -(-new_tokens // FEW_TOKENS),
        f"prompts of {FEW_TOKENS} new tokens at one dose",
        at=lambda number: replace(config, prompts=number, doses=doses[:1], new_tokens=FEW_TOKENS),
        small=1,
    )


def together(study: Study, others: "list[tuple[Path, WriteSAE]]") -> "dict[int, WriteSAE]":
    """The dictionaries of several heads of a layer, by head; `ValueError` for one of another layer or of the same head."""
    dictionaries = {study.head: study.sae}
    for path, other in others:
        layer, head = other.provenance.get("layer"), other.provenance.get("head")
        if layer != study.layer or head is None or head in dictionaries:
            needed = f"one of another head of layer {study.layer} is needed"
            raise ValueError(f"{path} holds a dictionary of layer {layer}, head {head}; {needed}")
        dictionaries[head] = other
    return dictionaries
