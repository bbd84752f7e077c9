"""What the commands of the experiments share: their options, a dictionary's model and held-out text, and how a result is kept.

`study_verb` makes a command of a function that has an experiment's own options alone. It checks them and returns a `Work`;
the dictionary, the model, the text, the seed, where the result goes and the dry run are added here, once.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from writesae.cli.base import OUTPUT, DryRun, Json, Seed, app, console, load_model, print_json, progress
from writesae.cli.completion import complete_model
from writesae.cli.dry_run import PROBE_PASSAGES, Part, begin, forward_part, passages_in_words
from writesae.cli.outputs import check_outputs
from writesae.cli.training_text import check_text, held_text
from writesae.report.terminal import summary_table

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from hooked_recurrent import HookedRecurrentModel
    from writesae.evaluation.result import Result
    from writesae.sae.write_sae import WriteSAE

TEXT = "Held-out text"
FEW_FIRINGS = 3
"""Firings of an atom in a short run, which reads too little text for more."""
Dictionary = Annotated[Path, typer.Option("--sae", help="Folder of a saved dictionary, such as runs/l2h1/sae.")]
ItsModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="The model: bundled, a folder or a hub name. By default the one the dictionary was trained on.",
        autocompletion=complete_model,
    ),
]
Out = Annotated[Path | None, typer.Option(help="Write every measurement to this JSON file.", rich_help_panel=OUTPUT)]
Figure = Annotated[
    Path | None, typer.Option(help="Draw the result into this file (.png, .svg, .pdf).", rich_help_panel=OUTPUT)
]
PassageCount = Annotated[int, typer.Option("--passages", help="Most passages of held-out files.", rich_help_panel=TEXT)]
Length = Annotated[int, typer.Option(help="Tokens per passage, the start token included.", rich_help_panel=TEXT)]
TextFolder = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help="A folder of text files (*.txt), split by file; by default the Python standard library.",
        rich_help_panel=TEXT,
    ),
]
Horizon = Annotated[int, typer.Option(help="Tokens after the firing over which the horizon reading averages.")]
PerAtom = Annotated[int, typer.Option(help="Most firings of one atom.")]
Threshold = Annotated[
    float, typer.Option(help="Median cosine to the native writes from which on an atom is a register.")
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
    text: Path | None = None
    """The folder that the text is from; None is the standard library."""
    speaks: bool = True
    """Whether it shows how far it is."""
    files: tuple[str, ...] = ()
    """Per passage the name of its file."""

    def run(self, experiment: "Callable[..., Result]", config: object, stage: str, **more: Any) -> "Result":
        """An experiment on all of this, with a live bar of that name."""
        where = {"layer": self.layer, "head": self.head, "config": config}
        return self.run_with(experiment, self.sae, stage, **where, **more)

    def run_with(self, experiment: "Callable[..., Result]", sae: object, stage: str, **more: Any) -> "Result":
        """As `run`, with other dictionaries, of no or several heads."""
        with progress(self.speaks) as tell:
            told = {"on_progress": lambda done, total: tell(stage, done, total)}
            return experiment(self.model, sae, self.tokens, **told, **more)


@dataclass(frozen=True)
class Work:
    """An experiment whose options are checked."""

    config: Any
    """Its config."""
    run: "Callable[[Study, Any], Result]"
    """Runs it on a study with a config."""
    units: int = 0
    """How much it does at most, in `unit`; 0 where only the number of passages counts."""
    unit: str = "passages"
    """What that is, in the plural."""
    at: Callable[[int], Any] | None = None
    """The config that does so much."""
    show: "Callable[[Result, bool], None] | None" = None
    """Prints the result, as JSON or not; by default a table of its summary."""
    small: int = 4
    """How much a short run does."""
    parts: Callable[[Study], list[Part]] | None = None
    """For a dry run: the parts whose time is taken, beside the reading; by default the experiment itself in small."""

    def in_short(self, study: Study, passages: int) -> list[Part]:
        """What a dry run takes the time of."""
        reading = forward_part(study.model, study.tokens, passages)
        if self.parts is not None:
            return [reading, *self.parts(study)]
        if self.at is None:
            few = [replace(study, tokens=study.tokens[:count]) for count in range(len(study.tokens) + 1)]
            return [Part("passages", passages, lambda count: self.run(few[count], self.config), small=2)]
        at = self.at
        return [reading, Part(self.unit, self.units, lambda count: self.run(study, at(count)), small=self.small)]


def study_verb(
    name: str | None = None, *, passages: int = 60, seed: int = 2026, text_seed: int | None = None
) -> Callable[[Callable[..., Work]], Callable[..., None]]:
    """Register a function that returns a `Work` as a command, with the options that all experiments share.

    Args:
        name: of the command; by default the function's.
        passages: default of --passages.
        seed: default of --seed, which the function gets if it has a parameter of that name.
        text_seed: seed of the choice of passages; None takes --seed.
    """
    before = {"sae": (Dictionary, inspect.Parameter.empty), "model": (ItsModel, None)}
    after = {
        "passages": (PassageCount, passages),
        "length": (Length, 256),
        "text": (TextFolder, None),
        "seed": (Seed, seed),
        "out": (Out, None),
        "figure": (Figure, None),
        "dry_run": (DryRun, False),
        "as_json": (Json, False),
    }

    def decorate(function: Callable[..., Work]) -> Callable[..., None]:
        own = inspect.signature(function, eval_str=True).parameters
        verb = name or function.__name__

        @wraps(function)
        def command(**given: Any) -> None:
            shared = {option: given.pop(option) for option in (*before, *after)}
            work = function(**given, **({"seed": shared["seed"]} if "seed" in own else {}))
            source = {option: shared[option] for option in ("sae", "model", "passages", "length", "text")}
            source["seed"] = shared["seed"] if text_seed is None else text_seed
            check_outputs(shared["out"], shared["figure"])
            if shared["dry_run"]:
                _dry_run(verb, work, source, [shared["out"], shared["figure"]], shared["as_json"])
            else:
                _run(work, open_study(**source), shared["out"], shared["figure"], shared["as_json"])

        theirs = {one.name: (one.annotation, one.default) for one in own.values() if one.name != "seed"}
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
                for option, (kind, default) in (before | theirs | after).items()
            ]
        )
        return app.command(verb)(command)

    return decorate


def _run(work: Work, study: Study, out: Path | None, figure: Path | None, as_json: bool) -> None:
    """Run an experiment, keep its result where it was asked for, and print it."""
    result = work.run(study, work.config)
    result = replace(result, about={**study.about, **result.about})
    keep(result, out, figure)
    (work.show or show)(result, as_json)


def keep(result: "Result", out: Path | None, figure: Path | None) -> None:
    """Write a result's measurements and its picture where they were asked for."""
    if out is not None:
        result.to_json(out)
    if figure is not None:
        figure.parent.mkdir(parents=True, exist_ok=True)
        result.figure().savefig(figure)


def show(result: "Result", as_json: bool) -> None:
    """Print a result's summary."""
    rows = result.summary()
    if as_json:
        print_json(rows)
        return
    console.print(summary_table(rows, f"{result.kind}, layer {result.layer}, head {result.head}"))


def _dry_run(verb: str, work: Work, source: dict[str, Any], written: list[Path | None], as_json: bool) -> None:
    """Say what an experiment would do, from short runs of itself on a few passages."""
    dictionary, origin = open_dictionary(source["sae"], source["model"])
    plan, model = begin(verb, source["model"] or origin["model"])
    passages = source["passages"]
    plan.reads = passages_in_words(passages, source["length"], "held-out", source["text"])
    size = dictionary.config
    plan.computes = [
        f"{verb} with {source['sae']}: {size.n_atoms} atoms of {size.d_k} x {size.d_v}, layer {origin['layer']}, "
        f"head {origin['head']}"
    ]
    if work.units:
        plan.computes.append(f"at most {work.units:,} {work.unit}")
    plan.writes = [str(path) for path in written if path is not None]
    if model is not None:
        few = {**source, "passages": min(passages, PROBE_PASSAGES)}
        study = replace(open_study(**few, loaded=model), speaks=False)
        plan.measure(work.in_short(study, passages))
    plan.show(as_json, {"config": work.config.to_dict()})


def open_dictionary(sae: Path, model: str | None) -> "tuple[WriteSAE, dict[str, Any]]":
    """A dictionary with its provenance. Raises `ValueError` where that does not name the model (unless given) and the cell."""
    from writesae.sae.write_sae import WriteSAE

    dictionary = WriteSAE.load(sae)
    origin = dictionary.provenance
    for needed in ("model", "layer", "head"):
        if needed not in origin and not (needed == "model" and model is not None):
            do = "give --model" if needed == "model" else f"set sae.provenance[{needed!r}] and save it again"
            raise ValueError(f"the dictionary in {sae} does not say which {needed} it was trained on: {do}")
    return dictionary, origin


def open_study(
    sae: Path,
    model: str | None,
    *,
    passages: int,
    length: int,
    seed: int,
    text: Path | None = None,
    loaded: "HookedRecurrentModel | None" = None,
) -> Study:
    """Load a dictionary, its model (unless that is `loaded`) and held-out passages.

    Raises `ValueError` for a dictionary that does not say what it was trained on, or does not fit the model.
    """
    from writesae.evaluation.firings import check_cell

    if passages < 1 or length < 2:
        raise ValueError(f"--passages must be at least 1 and --length at least 2, got {passages} and {length}")
    dictionary, origin = open_dictionary(sae, model)
    check_text(text, ("heldout",))
    loaded = loaded or load_model(model or origin["model"])
    check_cell(loaded, dictionary, origin["layer"], origin["head"])
    held = held_text(loaded, passages=passages, length=length, text=text, seed=seed)
    about = {"model": loaded.cfg.model_name, "sae": str(sae), "provenance": origin, "text": held.record()}
    return Study(loaded, dictionary, held.tokens, origin["layer"], origin["head"], about, text, files=held.files)
