"""`writesae reproduce`: every experiment of the paper on one model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from writesae.cli.base import Json, app, console, load_model, log, plain_errors, print_json, progress
from writesae.cli.experiments import TextFolder
from writesae.report.terminal import claims_table

if TYPE_CHECKING:
    from writesae.reproduce import Outcome

Steps = Annotated[list[str] | None, typer.Option(help="Only this step; may be given several times.")]
Redo = Annotated[
    list[str] | None, typer.Option(help="Run this step again though it is there; may be given several times.")
]


@app.command()
def reproduce(
    model: Annotated[
        str, typer.Option(help="A bundled model, a local folder, or a hub name 'owner/name'.")
    ] = "tiny-gated-deltanet",
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default results/NAME.")] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Minutes: only to see which way every effect points; fails where one does not."),
    ] = False,
    only: Steps = None,
    redo: Redo = None,
    layer: Annotated[
        int | None, typer.Option(help="Layer of the cell; by default the paper's, or the most effective.")
    ] = None,
    head: Annotated[int | None, typer.Option(help="Head of the cell.")] = None,
    text: TextFolder = None,
    length: Annotated[int | None, typer.Option(help="Tokens per passage.")] = None,
    train_passages: Annotated[int | None, typer.Option(help="Passages that dictionaries are trained on.")] = None,
    heldout_passages: Annotated[int | None, typer.Option(help="Passages of other files, for the tests.")] = None,
    n_atoms: Annotated[int | None, typer.Option(help="Atoms of a dictionary.")] = None,
    k: Annotated[int | None, typer.Option(help="Atoms that may be active at once.")] = None,
    train_steps: Annotated[int | None, typer.Option(help="Training steps of a dictionary.")] = None,
    firings: Annotated[int | None, typer.Option(help="Firings in the main replacement test.")] = None,
    per_atom: Annotated[int | None, typer.Option(help="Most firings of one atom.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds of what is trained several times.")] = None,
    trials: Annotated[int | None, typer.Option(help="Install trials per direction and magnitude.")] = None,
    contexts: Annotated[int | None, typer.Option(help="Contexts of the closed form.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random (0).")] = None,
    as_json: Json = False,
) -> None:
    """Run every experiment of the paper on one model, and say which way every effect points.

    Each step is kept on disk when it is done; the same command goes on where it was stopped. `python -m
    writesae.reproduce.page results` sets the runs of several models beside the paper's figures.

    Example: writesae reproduce --model Qwen/Qwen3.5-0.8B --text openwebtext/
    """
    sizes = {"layer": layer, "head": head, "length": length, "train_passages": train_passages, "k": k, "seeds": seeds}
    sizes |= {"heldout_passages": heldout_passages, "n_atoms": n_atoms, "train_steps": train_steps, "firings": firings}
    sizes |= {"per_atom": per_atom, "trials": trials, "contexts": contexts, "seed": seed}
    with plain_errors():
        from writesae.reproduce import ReproduceConfig
        from writesae.reproduce import reproduce as run

        folder = None if text is None else str(text)
        config = ReproduceConfig.of(model, quick=quick, text=folder, **sizes)
        place = out or Path("results") / (Path(model).name + ("-quick" if quick else ""))
        loaded = load_model(model)
        with progress() as tell:
            outcome = run(loaded, config, place, only=only or (), redo=redo or (), on_progress=tell)
    if as_json:
        print_json(
            {"folder": str(outcome.folder), "claims": [vars(c) for c in outcome.claims], "seconds": outcome.seconds}
        )
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
