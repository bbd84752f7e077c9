"""`writesae train`: a run from flags, from a file, or from a file with flags on top."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from writesae.cli.base import Json, app, console, load_model, plain_errors, print_json, progress
from writesae.report.terminal import quality_table

if TYPE_CHECKING:
    from writesae.training.plan import RunPlan


# Options that need more than a line.
Text = Annotated[
    Path | None, typer.Option(help="A folder of text files (*.txt); by default the Python standard library.")
]
LogTo = Annotated[
    list[str] | None,
    typer.Option(help="Also log to 'tensorboard', 'wandb' or 'trackio'; may be given several times."),
]
Cache = Annotated[
    Path | None,
    typer.Option(help="Read from this cache on disk (see `writesae cache`), written first where it is missing."),
]


@app.command()
def train(
    out: Annotated[Path | None, typer.Option(help="Folder of the run: log, checkpoints, dictionaries.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML or JSON file; flags stand above it.")] = None,
    model: Annotated[str | None, typer.Option(help="A bundled model, a folder or a hub name.")] = None,
    hook: Annotated[str | None, typer.Option(help="What is learned: a hook name.")] = None,
    head: Annotated[int | None, typer.Option(help="Which head of that layer.")] = None,
    preset: Annotated[str | None, typer.Option(help="A variant of the paper, such as 'bilinear' or 'flat'.")] = None,
    atoms: Annotated[int | None, typer.Option(help="Atoms in the dictionary (1024).")] = None,
    k: Annotated[int | None, typer.Option(help="Atoms that may be active at once (8).")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps (3000).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per step (256).")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate after the warm-up (0.005).")] = None,
    precision: Annotated[str | None, typer.Option(help="'float32', or 'bfloat16' for the scores.")] = None,
    text: Text = None,
    passages: Annotated[int | None, typer.Option(help="Passages of training files (1200).")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per passage (256).")] = None,
    log_to: LogTo = None,
    device: Annotated[
        str | None,
        typer.Option(help="Where model and dictionaries are; by default a GPU if there is one, else the CPU."),
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between two checkpoints (500).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random (0).")] = None,
    cache: Cache = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
    shard: Annotated[bool, typer.Option("--shard", help="Under torchrun: split the jobs, not the batches.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Train dictionaries of what hooks of a model hold, from one forward pass.

    Example: writesae train --hook blocks.2.mixer.hook_write --head 1 --out runs/l2h1

    Ctrl-C saves a checkpoint before it stops; --resume goes on from there, bit for bit.
    """
    flags = {
        "model": model,
        **{
            "job.hook": hook,
            "job.head": head,
            "sae.preset": preset,
            "sae.n_atoms": atoms,
            "sae.k": k,
            "sae.seed": seed,
        },
        **{"training.steps": steps, "training.batch_size": batch_size, "training.lr": lr, "training.seed": seed},
        **{"training.precision": precision, "training.save_every": save_every, "training.log_to": log_to},
        **{
            "text.folder": None if text is None else str(text),
            "text.passages": passages,
            "text.length": length,
            "text.seed": seed,
        },
    }
    with plain_errors():
        from writesae.training.plan import RunPlan, overridden, read_plan

        plan = RunPlan.from_dict(overridden({} if config is None else read_plan(config), flags))
        if dry_run:
            _print_plan(plan, as_json)
            return
        if out is None:
            raise ValueError("give the run a folder: --out FOLDER")
        _run(plan, out, as_json, device, cache=cache, resume=resume, shard=shard)


def _print_plan(plan: "RunPlan", as_json: bool) -> None:
    import yaml

    resolved = plan.to_dict()
    if as_json:
        print_json(resolved)
    else:
        typer.echo(yaml.safe_dump(resolved, sort_keys=False), nl=False)


def _run(plan: "RunPlan", out: Path, as_json: bool, device: str | None, **options: Any) -> None:
    import torch

    from writesae.parallel import World
    from writesae.training.folder import RunFolder
    from writesae.training.launch import launch

    world = World.current()
    loaded = load_model(plan.model).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with progress(world.is_main) as bars:
        latest: dict[str, dict[str, int | float]] = {}

        def on_line(name: str, line: dict[str, int | float]) -> None:
            latest[name] = line
            bars.note("steps", in_short(latest))

        results = launch(loaded, plan, out, world=world, progress=bars, on_line=on_line, **options)
    if not world.is_main:
        return
    folder = RunFolder(out, [job.name for job in plan.jobs])
    saved = {job.name: str(folder.of_dictionary(job.name)) for job in plan.jobs}
    if as_json:
        metrics = {name: result.metrics for name, result in results.items()}
        print_json({"out": str(out), "saved": saved, "metrics": metrics})
        return
    for name, result in results.items():
        console.print(quality_table(result.metrics, name if len(results) > 1 else "dictionary"))
    for what, path in folder.contents().items():
        console.print(f"{what:>14}  {path}", highlight=False, soft_wrap=True)
    console.print(f"Next: writesae replace --sae {next(iter(saved.values()))}", highlight=False, soft_wrap=True)


def in_short(latest: dict[str, dict[str, int | float]]) -> str:
    """The latest lines of all jobs in one: single numbers, or from the least to the most."""
    parts = []
    for number, form in (("fvu", ".3f"), ("l0", ".1f"), ("dead", ".0f")):
        values = sorted(line[number] for line in latest.values())
        ends = [format(value, form) for value in dict.fromkeys((values[0], values[-1]))]
        parts.append(f"{number} {'..'.join(dict.fromkeys(ends))}")
    return "  ".join(parts)
