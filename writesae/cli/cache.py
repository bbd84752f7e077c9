"""`writesae cache`: what dictionaries are trained on, kept on disk for later runs."""

from pathlib import Path
from typing import Annotated

import typer

from writesae.cli.base import Json, app, console, load_model, plain_errors, print_json, progress
from writesae.report.terminal import caches_table

cache = typer.Typer(help="Keep on disk what hooks of a model hold, and see what is there.", no_args_is_help=True)
app.add_typer(cache, name="cache")


@cache.command("list")
def list_caches(
    root: Annotated[Path, typer.Argument(help="Folder to look in, with all folders below it.")] = Path("."),
    as_json: Json = False,
) -> None:
    """List the caches in a folder: model, sources, how many passages are there, and what is wrong with one, if anything."""
    with plain_errors():
        from writesae.stream.store import ActivationStore

        rows = ActivationStore.list(root)
        if as_json:
            print_json(rows)
        elif rows:
            console.print(caches_table(rows))
        else:
            console.print(f"no cache in {root}", highlight=False)


@cache.command("write")
def write_cache(
    out: Annotated[Path, typer.Option(help="Folder of the cache.")],
    config: Annotated[
        Path | None, typer.Option(help="The file of the runs that will read it; flags stand above it.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A bundled model, a folder or a hub name.")] = None,
    hook: Annotated[str | None, typer.Option(help="What is kept: a hook name.")] = None,
    head: Annotated[int | None, typer.Option(help="Which head of that layer.")] = None,
    passages: Annotated[
        int | None, typer.Option(help="Passages of the standard library's training files (1200).")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per passage (256).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the choice of the passages (0).")] = None,
    dtype: Annotated[str, typer.Option(help="'float32', or a narrower type of half the size.")] = "float32",
    as_json: Json = False,
) -> None:
    """Run the model once over the training text and keep what the jobs of a run would read; a second call goes on.

    Example: writesae cache write --config run.yaml --out caches/run, then writesae train --config run.yaml --cache caches/run
    """
    flags = {"model": model, "job.hook": hook, "job.head": head}
    flags |= {"text.passages": passages, "text.length": length, "text.seed": seed}
    with plain_errors():
        from writesae.training.launch import write_cache as write
        from writesae.training.plan import RunPlan, overridden, read_plan

        plan = RunPlan.from_dict(overridden({} if config is None else read_plan(config), flags))
        loaded = load_model(plan.model)
        with progress() as bars:
            store = write(loaded, plan, out, dtype=dtype, progress=bars)
        if as_json:
            print_json({"path": str(out), "passages": store.n_passages, "sources": [str(s) for s in store.sources]})
        else:
            console.print(f"{store.n_passages} passages of {len(store.sources)} sources in {out}", highlight=False)
