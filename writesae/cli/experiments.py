"""What the commands of the experiments share: a dictionary's model and held-out text, and how a result is shown and kept."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from writesae.cli.base import console, load_model, print_json, progress
from writesae.report.terminal import summary_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Int
    from torch import Tensor

    from hooked_recurrent import HookedRecurrentModel
    from writesae.evaluation.result import Result
    from writesae.sae.write_sae import WriteSAE

Dictionary = Annotated[Path, typer.Option("--sae", help="Folder of a saved dictionary.")]
ItsModel = Annotated[
    str | None, typer.Option("--model", help="The model; by default the one the dictionary was trained on.")
]
Out = Annotated[Path | None, typer.Option(help="Write every measurement to this JSON file.")]
PassageCount = Annotated[int, typer.Option("--passages", help="Passages of held-out files.")]
Length = Annotated[int, typer.Option(help="Tokens per passage.")]
TextFolder = Annotated[
    Path | None, typer.Option("--text", help="A folder of text files (*.txt); by default the Python standard library.")
]


@dataclass(frozen=True)
class Study:
    """What an experiment runs on."""

    model: "HookedRecurrentModel"
    """The language model."""
    sae: "WriteSAE"
    """The dictionary."""
    tokens: "Int[Tensor, 'passage pos']"
    """Held-out passages."""
    layer: int
    """Layer of the cell that the dictionary was trained on."""
    head: int
    """Its head."""
    about: dict
    """The record that every result keeps: model, dictionary, text."""
    files: tuple[str, ...] = ()
    """Per passage the name of its file."""

    def run(self, experiment: "Callable[..., Result]", config: object, stage: str, **more: Any) -> "Result":
        """An experiment on all of this, with a live bar of that name."""
        where = {"layer": self.layer, "head": self.head, "config": config}
        with progress() as tell:
            return experiment(
                self.model,
                self.sae,
                self.tokens,
                on_progress=lambda done, total: tell(stage, done, total),
                **where,
                **more,
            )


def open_study(
    sae: Path, model: str | None, *, passages: int, length: int, seed: int, text: Path | None = None
) -> Study:
    """Load a dictionary, its model and held-out passages.

    Raises `ValueError` for a dictionary that does not say what it was trained on.
    """
    from hooked_recurrent.zoo.corpus import standard_library
    from writesae.sae.write_sae import WriteSAE
    from writesae.stream.corpus import passages as cut
    from writesae.stream.corpus import text_folder

    dictionary = WriteSAE.load(sae)
    origin = dictionary.provenance
    for needed in ("model", "layer", "head"):
        if needed not in origin and not (needed == "model" and model is not None):
            raise ValueError(f"the dictionary in {sae} does not say which {needed} it was trained on")
    loaded = load_model(model or origin["model"])
    files = standard_library("heldout") if text is None else text_folder(text, "heldout")
    held = cut(files, loaded, length, split="heldout", max_passages=passages, seed=seed)
    about = {"model": loaded.cfg.model_name, "sae": str(sae), "provenance": origin, "text": held.record()}
    return Study(loaded, dictionary, held.tokens, origin["layer"], origin["head"], about, held.files)


def show(result: "Result", study: Study, out: Path | None, as_json: bool) -> None:
    """Keep a result where it was asked for, and print its summary."""
    result = replace(result, about={**study.about, **result.about})
    if out is not None:
        result.to_json(out)
    rows = result.summary()
    if as_json:
        print_json(rows)
        return
    console.print(summary_table(rows, f"{result.kind}, layer {result.layer}, head {result.head}"))
