"""`writesae reproduce`: every experiment of the paper on one model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from writesae.cli.base import OUTPUT, DryRun, Json, Model, app, console, load_model, log, print_json, progress
from writesae.cli.dry_run import (
    Part,
    begin,
    brief_dictionary,
    forward_part,
    passages_in_words,
    replacement_part,
    training_part,
)
from writesae.cli.outputs import check_folder
from writesae.cli.training_text import check_text, cut_text
from writesae.report.terminal import claims_table

if TYPE_CHECKING:
    from writesae.reproduce import Outcome, ReproduceConfig

SIZES = "Sizes (by default those that fit the model)"
Steps = Annotated[list[str] | None, typer.Option(help="Only this step, by name; may be given several times.")]
Redo = Annotated[
    list[str] | None, typer.Option(help="Run this step again though it is there; may be given several times.")
]


def size(words: str) -> Any:
    """An option of a size, which is the model's own unless it is given."""
    return Annotated[int | None, typer.Option(help=words, rich_help_panel=SIZES)]


@app.command()
def reproduce(
    model: Model = "tiny-gated-deltanet",
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Minutes: only to see which way every effect points; exit code 1 if one does not."
        ),
    ] = False,
    only: Steps = None,
    redo: Redo = None,
    text: Annotated[
        Path | None,
        typer.Option(help="A folder of text files (*.txt), split by file; by default the Python standard library."),
    ] = None,
    layer: size("Layer of the cell; by default the paper's, or the most effective.") = None,
    head: size("Head of the cell; goes with --layer.") = None,
    length: size("Tokens per passage.") = None,
    train_passages: size("Passages that dictionaries are trained on.") = None,
    heldout_passages: size("Passages of other files, for the tests.") = None,
    n_atoms: size("Atoms of a dictionary.") = None,
    k: size("Atoms that may be active at once.") = None,
    train_steps: size("Optimiser steps of a dictionary.") = None,
    firings: size("Firings in the main replacement test.") = None,
    per_atom: size("Most firings of one atom.") = None,
    seeds: size("Seeds of what is trained several times.") = None,
    trials: size("Install trials per direction and magnitude.") = None,
    contexts: size("Contexts of the closed form.") = None,
    seed: size("Seed of everything random (0).") = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; by default results/NAME.", rich_help_panel=OUTPUT)
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Run every experiment of the paper on one model, and say which way every effect points.

    Each step is kept on disk when it is done; the same command goes on where it was stopped. `python -m
    writesae.reproduce.page results` sets the runs of several models beside the paper's figures.

    Example: writesae reproduce --model tiny-rwkv7 --quick --only replacement --out results/rwkv7-quick
    """
    sizes = {"layer": layer, "head": head, "length": length, "train_passages": train_passages, "k": k, "seeds": seeds}
    sizes |= {"heldout_passages": heldout_passages, "n_atoms": n_atoms, "train_steps": train_steps, "firings": firings}
    sizes |= {"per_atom": per_atom, "trials": trials, "contexts": contexts, "seed": seed}
    from writesae.reproduce import ReproduceConfig, check_steps
    from writesae.reproduce import reproduce as run

    folder = None if text is None else str(text)
    config = ReproduceConfig.of(model, quick=quick, text=folder, **sizes)
    place = out or Path("results") / (Path(model).name + ("-quick" if quick else ""))
    check_folder("--out", place)
    check_text(text)
    steps = check_steps(only or (), redo or ())
    if dry_run:
        left = [name for name in steps if name in (redo or ()) or not (place / f"{name}.json").is_file()]
        _dry_run(config, place, left, as_json)
        return
    loaded = load_model(model)
    with progress() as tell:
        outcome = run(loaded, config, place, only=only or (), redo=redo or (), on_progress=tell)
    if as_json:
        claims = [vars(claim) for claim in outcome.claims]
        print_json({"folder": str(outcome.folder), "claims": claims, "seconds": outcome.seconds})
    else:
        console.print(claims_table([vars(claim) for claim in outcome.claims]))
        console.print(f"\n{sum(outcome.seconds.values()):.0f} s. Results: [bold]{outcome.folder}[/bold]")
    _judge(outcome, quick)


def _judge(outcome: "Outcome", quick: bool) -> None:
    """A quick run is a check: an effect that points the wrong way is a failure."""
    wrong = [claim for claim in outcome.claims if not claim.holds]
    if quick and wrong:
        log.print(f"[red]error:[/red] {len(wrong)} of {len(outcome.claims)} effects point the wrong way")
        raise typer.Exit(1)


def _dry_run(config: "ReproduceConfig", place: Path, steps: list[str], as_json: bool) -> None:
    plan, loaded = begin("reproduce", config.model)
    counts = {"training": config.train_passages, "held-out": config.heldout_passages}
    plan.reads = "; ".join(passages_in_words(count, config.length, name, config.text) for name, count in counts.items())
    plan.computes = [f"steps that are not there yet: {', '.join(steps) or 'none'}"]
    plan.writes = [f"{place}/{name}.json" for name in ("reproduce", *steps)] + [f"{place}/dictionaries/"]
    if loaded is not None and steps:
        beside = (
            "; for the two dictionaries that most steps share and the main replacement test, and not the other steps"
        )
        plan.measure(_parts(loaded, config), beside)
    plan.show(as_json, {"config": config.to_dict()})


def _parts(loaded: Any, config: "ReproduceConfig") -> list[Part]:
    from writesae.config import TrainConfig, WriteSAEConfig
    from writesae.evaluation.firings import require_cell
    from writesae.training.jobs import Job, Source

    cfg = loaded.cfg
    layer, head = config.layer, config.head
    if layer is None or head is None:
        layer, head = cfg.recurrent_layers[0], 0
    require_cell(loaded, layer, head)
    tokens = cut_text(loaded, "train", passages=8, length=config.length).tokens
    source = Source(f"blocks.{layer}.mixer.hook_write", head)
    jobs = [
        Job(f"atoms{n}", source, WriteSAEConfig(cfg.d_k, cfg.d_v, n_atoms=n, k=k))
        for n, k in ((config.n_atoms, config.k), (config.best_atoms, 1))
    ]
    sae = brief_dictionary(loaded, layer, head, jobs[1].sae, tokens)
    return [
        forward_part(loaded, tokens, config.train_passages + config.heldout_passages),
        training_part(loaded, jobs, tokens, TrainConfig(steps=config.train_steps)),
        replacement_part(loaded, sae, tokens, (layer, head), firings=config.firings),
    ]
