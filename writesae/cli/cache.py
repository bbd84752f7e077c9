"""`writesae cache`: what dictionaries are trained on, kept on disk for later runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from writesae.cli.base import OUTPUT, App, DryRun, Json, app, console, load_model, print_json, progress
from writesae.cli.dry_run import begin, forward_part, passages_in_words
from writesae.cli.outputs import check_folder
from writesae.cli.train import (
    Head,
    Hook,
    PlanFile,
    PlanLength,
    PlanModel,
    PlanPassages,
    PlanText,
    plan_of,
    text_flags,
)
from writesae.cli.training_text import cut_text
from writesae.report.terminal import caches_table

if TYPE_CHECKING:
    from writesae.training.plan import RunPlan

cache = App(help="Keep on disk what hooks of a model hold, and see what is there.", no_args_is_help=True)
app.add_typer(cache, name="cache")


@cache.command("list")
def list_caches(
    root: Annotated[Path, typer.Argument(help="Folder to look in, with all folders below it.")] = Path("."),
    as_json: Json = False,
) -> None:
    """List the caches in a folder: model, sources, how many passages are there, and what is wrong with one, if anything.

    Example: writesae cache list caches --json
    """
    from writesae.stream.store import ActivationStore

    if not root.is_dir():
        raise ValueError(f"{root} is no folder; give one in which to look for caches")
    rows = ActivationStore.list(root)
    if as_json:
        print_json(rows)
    elif rows:
        console.print(caches_table(rows))
    else:
        console.print(f"no cache in {root}", highlight=False)


@cache.command("write")
def write_cache(
    out: Annotated[Path, typer.Option(help="Folder of the cache.", rich_help_panel=OUTPUT)],
    config: PlanFile = None,
    model: PlanModel = None,
    hook: Hook = None,
    head: Head = None,
    text: PlanText = None,
    passages: PlanPassages = None,
    length: PlanLength = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the choice of the passages (0).")] = None,
    dtype: Annotated[str, typer.Option(help="'float32', or 'float16' or 'bfloat16' at half the size.")] = "float32",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Run the model once over the training text and keep what the jobs of a run would read; a second call goes on.

    `writesae train` with the same file or flags and `--cache` reads it.

    Example: writesae cache write --hook blocks.2.mixer.hook_write --head 1 --out caches/l2h1
    """
    from writesae.training.launch import write_cache as write

    flags = {"model": model, "job.hook": hook, "job.head": head} | text_flags(text, passages, length, seed)
    plan = plan_of(config, flags)
    check_dtype(dtype)
    check_folder("--out", out)
    if dry_run:
        _dry_run(plan, out, dtype, as_json)
        return
    loaded = load_model(plan.model)
    with progress() as bars:
        store = write(loaded, plan, out, dtype=dtype, progress=bars)
    if as_json:
        print_json({"path": str(out), "passages": store.n_passages, "sources": [str(s) for s in store.sources]})
    else:
        console.print(f"{store.n_passages} passages of {len(store.sources)} sources in {out}", highlight=False)


def check_dtype(name: str) -> None:
    """Raise `ValueError` for a type that no cache is kept in, with those that one can be."""
    from writesae.stream.store import DTYPES

    if name not in DTYPES:
        raise ValueError(f"--dtype must be {', '.join(DTYPES)}, got {name!r}")


def _dry_run(plan: "RunPlan", out: Path, dtype: str, as_json: bool) -> None:
    from writesae.stream.sources import collect
    from writesae.stream.store import DTYPES
    from writesae.training.launch import jobs_of

    said, loaded = begin("cache write", plan.model)
    text = plan.text
    said.reads = passages_in_words(text.passages, text.length, "training", text.folder)
    said.computes = ["one forward pass over them"]
    said.writes = [f"{out}/"]
    if loaded is not None:
        sources = list(dict.fromkeys(job.source for job in jobs_of(loaded, plan)))
        folder = None if text.folder is None else Path(text.folder)
        tokens = cut_text(loaded, "train", passages=min(8, text.passages), length=text.length, text=folder).tokens
        record = collect(loaded, tokens[:1], sources)
        numbers = sum(part.numel() for source in sources for part in record[source].values())
        size = numbers * text.passages * DTYPES[dtype].itemsize / 1e6
        said.computes = [f"what {', '.join(str(source) for source in sources)} holds"]
        said.writes = [f"{out}/ (at most {size:,.0f} MB)"]
        said.measure([forward_part(loaded, tokens, text.passages)], "; writing to disk comes on top")
    said.show(as_json)
