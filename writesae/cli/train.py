"""`writesae train`: a run from flags, from a file, or from a file with flags on top."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from writesae.cli.base import DryRun, Json, app, console, load_model, print_json, progress
from writesae.cli.completion import complete_hook, complete_model, complete_preset
from writesae.cli.dry_run import begin, forward_part, passages_in_words, training_part
from writesae.cli.outputs import check_folder
from writesae.cli.training_text import check_text, cut_text
from writesae.report.terminal import quality_table

if TYPE_CHECKING:
    from writesae.training.plan import RunPlan

TEXT, RUN = "Training text", "The run"
# Shared with `writesae cache write`: what a run's file says too.
PlanFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A YAML, JSON or TOML file of the run (see `--dry-run`); flags stand above it."),
]
PlanModel = Annotated[
    str | None,
    typer.Option(help="A bundled model, a folder or a hub name (tiny-gated-deltanet).", autocompletion=complete_model),
]
Hook = Annotated[
    str | None,
    typer.Option(help="What is learned: a hook name (blocks.1.mixer.hook_write).", autocompletion=complete_hook),
]
Head = Annotated[int | None, typer.Option(help="Which head of that layer, from 0 (0).")]
PlanText = Annotated[
    Path | None,
    typer.Option(
        help="A folder of text files (*.txt), split by file; by default the Python standard library.",
        rich_help_panel=TEXT,
    ),
]
PlanPassages = Annotated[int | None, typer.Option(help="Most passages of training files (1200).", rich_help_panel=TEXT)]
PlanLength = Annotated[int | None, typer.Option(help="Tokens per passage (256).", rich_help_panel=TEXT)]

# Of `writesae train` alone.
Preset = Annotated[
    str | None,
    typer.Option(help="A variant of the paper, such as 'bilinear' or 'flat'.", autocompletion=complete_preset),
]
LogTo = Annotated[
    list[str] | None,
    typer.Option(
        help="Also log to 'tensorboard', 'wandb' or 'trackio'; may be given several times.", rich_help_panel=RUN
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Where model and dictionaries are, such as 'cpu' or 'cuda'; by default a GPU if there is one.",
        rich_help_panel=RUN,
    ),
]
SaveEvery = Annotated[int | None, typer.Option(help="Steps between two checkpoints (500).", rich_help_panel=RUN)]
Cache = Annotated[
    Path | None,
    typer.Option(
        help="Read from this cache on disk (see `writesae cache`), written first where it is missing.",
        rich_help_panel=RUN,
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.", rich_help_panel=RUN)
]
Shard = Annotated[
    bool, typer.Option("--shard", help="Under torchrun: split the jobs, not the batches.", rich_help_panel=RUN)
]


@app.command()
def train(
    model: PlanModel = None,
    hook: Hook = None,
    head: Head = None,
    preset: Preset = None,
    atoms: Annotated[int | None, typer.Option(help="Atoms in the dictionary (1024).")] = None,
    k: Annotated[int | None, typer.Option(help="Atoms that may be active at once (8).")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps (3000).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per step (256).")] = None,
    lr: Annotated[float | None, typer.Option(help="Adam's learning rate after the warm-up (0.005).")] = None,
    precision: Annotated[str | None, typer.Option(help="'float32', or 'bfloat16' for the scores.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random (0).")] = None,
    text: PlanText = None,
    passages: PlanPassages = None,
    length: PlanLength = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run: log, checkpoints, dictionaries.")] = None,
    config: PlanFile = None,
    log_to: LogTo = None,
    device: Device = None,
    save_every: SaveEvery = None,
    cache: Cache = None,
    resume: Resume = False,
    shard: Shard = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train dictionaries of what hooks of a model hold, from one forward pass.

    Ctrl-C saves a checkpoint before it stops; --resume goes on from there, bit for bit. --dry-run prints the whole
    configuration of the run, which is a file for --config.

    Example: writesae train --hook blocks.2.mixer.hook_write --head 1 --out runs/l2h1
    """
    flags: dict[str, Any] = {
        "model": model,
        "job.hook": hook,
        "job.head": head,
        "sae.preset": preset,
        "sae.n_atoms": atoms,
    }
    flags |= {"sae.k": k, "sae.seed": seed, "training.steps": steps, "training.batch_size": batch_size}
    flags |= {"training.lr": lr, "training.seed": seed, "training.precision": precision, "training.log_to": log_to}
    flags |= {"training.save_every": save_every} | text_flags(text, passages, length, seed)
    plan = plan_of(config, flags)
    check_folder("--out", out)
    check_folder("--cache", cache)
    if dry_run:
        _dry_run(plan, out, cache, as_json)
        return
    if out is None:
        raise ValueError("give the run a folder: --out FOLDER")
    _run(plan, out, as_json, device_of(device), cache=cache, resume=resume, shard=shard)


def text_flags(text: Path | None, passages: int | None, length: int | None, seed: int | None) -> dict[str, Any]:
    """The flags of the text by their places in a plan."""
    folder = None if text is None else str(text)
    return {"text.folder": folder, "text.passages": passages, "text.length": length, "text.seed": seed}


def plan_of(file: Path | None, flags: dict[str, Any]) -> "RunPlan":
    """The plan of a run's file with flags above it. Raises `ValueError` as `RunPlan` does, and for a folder without text."""
    from writesae.training.plan import RunPlan, overridden, read_plan

    plan = RunPlan.from_dict(overridden({} if file is None else read_plan(file), flags))
    splits = ("train", "heldout") if plan.text.heldout_passages else ("train",)
    check_text(None if plan.text.folder is None else Path(plan.text.folder), splits, plan.text.pattern)
    return plan


def device_of(name: str | None) -> str:
    """The name of a device that is there; by default a GPU where there is one. Raises `ValueError` for any other."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"--device {name} cannot be used ({said}); 'cpu' always can") from None
    return name


def _dry_run(plan: "RunPlan", out: Path | None, cache: Path | None, as_json: bool) -> None:
    """Print the resolved configuration, then what it comes to."""
    import yaml

    from writesae.training.launch import jobs_of

    said, loaded = begin("train", plan.model)
    text, training = plan.text, plan.training
    counts = {"training": text.passages, "held-out": text.heldout_passages}
    reads = [passages_in_words(count, text.length, split, text.folder) for split, count in counts.items() if count]
    said.reads = "; ".join(reads)
    said.computes = [
        f"{job.name}: {job.hook}{'' if job.head is None else f', head {job.head}'}, {training.steps:,} steps of "
        f"{training.batch_size:,} samples"
        for job in plan.jobs
    ]
    said.writes = [f"{path}/" for path in (out, cache) if path is not None] or ["a run needs --out FOLDER"]
    if loaded is not None:
        jobs = jobs_of(loaded, plan)
        folder = None if text.folder is None else Path(text.folder)
        tokens = cut_text(loaded, "train", passages=min(8, text.passages), length=text.length, text=folder).tokens
        parts = [forward_part(loaded, tokens, text.passages + text.heldout_passages)]
        said.measure([*parts, training_part(loaded, jobs, tokens, training)])
    resolved = plan.to_dict()
    if not as_json:
        typer.echo(yaml.safe_dump(resolved, sort_keys=False), nl=False)
    said.show(as_json, resolved)


def _run(plan: "RunPlan", out: Path, as_json: bool, device: str, **options: Any) -> None:
    from writesae.parallel import World
    from writesae.training.folder import RunFolder
    from writesae.training.launch import launch

    world = World.current()
    loaded = load_model(plan.model).to(device)
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
