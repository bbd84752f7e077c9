"""The command line: parses and calls. Progress goes to standard error; tables and --json to standard output.

writesae demo        the whole experiment on a bundled model, with a report
writesae train       learn a dictionary of the writes of one head
writesae replace     replace writes by the atoms of a saved dictionary
writesae models      the models that ship with the package
writesae convert     turn a .pt file of the paper's code into a dictionary of this package
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from writesae.report.terminal import cells_table, models_table, quality_table, replacement_table

app = typer.Typer(
    name="writesae",
    help="Open the matrix memory of recurrent language models, learn a dictionary of its writes, and replace them.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="markdown",
)
console, log = Console(), Console(stderr=True)
STAGES = {
    "writes": "reading writes",
    "steps": "training atoms",
    "survey": "surveying cells",
    "replace": "replacing writes",
}

Model = Annotated[
    str, typer.Option(help="A bundled model (see `writesae models`), a local folder, or a hub name 'owner/name'.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of tables.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random; the same seed gives the same numbers.")]


@app.command()
def demo(
    model: Model = "tiny-gated-deltanet",
    out: Annotated[Path, typer.Option(help="Folder for the report, the dictionary and the results.")] = Path(
        "demo_out"
    ),
    layer: Annotated[int | None, typer.Option(help="Layer of the cell; by default the most effective cell.")] = None,
    head: Annotated[int | None, typer.Option(help="Head of the cell.")] = None,
    firings: Annotated[int, typer.Option(help="Firings in the replacement test.")] = 600,
    steps: Annotated[int, typer.Option(help="Training steps of the dictionary.")] = 3000,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Learn the writes of one head on real text, then replace writes by atoms on text that nobody has seen.

    1. Survey: what does deleting one write of each (layer, head) do to the output?
    2. Train a WriteSAE, a dictionary of rank-1 matrices, on the writes of the most effective head.
    3. On held-out files, put single atoms in the place of native writes and measure the KL of the output distribution,
       against deleting the write and against random atoms.
    """
    with _plain_errors():
        from writesae.demo import DemoConfig, run_demo

        config = DemoConfig(layer=layer, head=head, firings=firings, steps=steps, seed=seed)
        loaded = _load(model)
        with _progress() as tell:
            result = run_demo(loaded, out, config, tell)
    if as_json:
        _print_json({"summary": result.replacement.summary(), "seconds": result.seconds, "report": str(result.report)})
        return
    cell = (result.replacement.layer, result.replacement.head)
    console.print(cells_table(result.cells, cell))
    console.print(quality_table(result.training.metrics))
    console.print(replacement_table(result.replacement.summary(), cell))
    console.print(f"\n{sum(result.seconds.values()):.0f} s. Report: [bold]{result.report}[/bold]")


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder to save the dictionary in.")],
    model: Model = "tiny-gated-deltanet",
    hook: Annotated[str, typer.Option(help="Which writes: a hook name.")] = "blocks.1.mixer.hook_write",
    head: Annotated[int, typer.Option(help="Which head of that layer.")] = 0,
    atoms: Annotated[int, typer.Option(help="Atoms in the dictionary.")] = 1024,
    k: Annotated[int, typer.Option(help="Atoms that may be active at once.")] = 8,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 3000,
    batch_size: Annotated[int, typer.Option(help="Writes per step.")] = 256,
    passages: Annotated[int, typer.Option(help="Passages of the standard library's training files to read.")] = 1200,
    length: Annotated[int, typer.Option(help="Tokens per passage.")] = 256,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a WriteSAE on the rank-1 writes of one head, streamed from the model by hook name.

    Example: writesae train --hook blocks.2.mixer.hook_write --head 1 --out runs/l2h1
    """
    with _plain_errors():
        from hooked_recurrent.zoo.corpus import standard_library
        from writesae.config import TrainConfig, WriteSAEConfig
        from writesae.stream.corpus import passages as cut
        from writesae.training.trainer import train as fit

        loaded = _load(model)
        texts = [cut(standard_library(s), loaded, length, split=s, max_passages=n, seed=seed)
                 for s, n in (("train", passages), ("heldout", 100))]  # fmt: skip
        sae_config = WriteSAEConfig(loaded.cfg.d_k, loaded.cfg.d_v, n_atoms=atoms, k=k, seed=seed)
        config = TrainConfig(steps=steps, batch_size=batch_size, seed=seed)
        with _progress() as tell:
            result = fit(
                loaded,
                hook,
                head,
                tokens=texts[0],
                heldout=texts[1],
                sae_config=sae_config,
                config=config,
                progress=tell,
            )
        saved = result.sae.save(out)
    if as_json:
        _print_json({"saved": str(saved), "metrics": result.metrics})
        return
    console.print(quality_table(result.metrics))
    console.print(f"Saved in [bold]{saved}[/bold]; next: writesae replace --sae {saved}")


@app.command()
def replace(
    sae: Annotated[Path, typer.Option(help="Folder of a saved dictionary.")],
    model: Annotated[
        str | None, typer.Option(help="The model; by default the one the dictionary was trained on.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write every measurement to this JSON file.")] = None,
    firings: Annotated[int, typer.Option(help="Most firings to test.")] = 600,
    per_atom: Annotated[int, typer.Option(help="Most firings of one atom.")] = 5,
    atom: Annotated[list[int] | None, typer.Option(help="Test only this atom; may be given several times.")] = None,
    form: Annotated[
        str, typer.Option(help="What the write is: 'additive' k v^T, or 'net' with the erase.")
    ] = "additive",
    passages: Annotated[int, typer.Option(help="Passages of held-out files to look for firings in.")] = 200,
    length: Annotated[int, typer.Option(help="Tokens per passage.")] = 256,
    horizon: Annotated[int, typer.Option(help="Tokens after the firing over which the horizon reading averages.")] = 16,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Replace native writes by the atoms of a saved dictionary, on held-out text, and compare with deleting them.

    Every condition is measured in three readings: at the token itself (in_recurrence), through an edit of the cached state
    at the next token (cache), and over the coming tokens (horizon). KLs are in nats.
    """
    with _plain_errors():
        from hooked_recurrent.zoo.corpus import standard_library
        from writesae.evaluation.replacement import ReplacementConfig, replacement
        from writesae.sae.write_sae import WriteSAE
        from writesae.stream.corpus import passages as cut

        dictionary = WriteSAE.load(sae)
        origin = dictionary.provenance
        for needed in ("model", "layer", "head"):
            if needed not in origin and not (needed == "model" and model is not None):
                raise ValueError(f"the dictionary in {sae} does not say which {needed} it was trained on")
        loaded = _load(model or origin["model"])
        text = cut(standard_library("heldout"), loaded, length, split="heldout", max_passages=passages, seed=seed)
        config = ReplacementConfig(
            atoms=tuple(atom) if atom else None, per_atom=per_atom, total=firings, horizon=horizon, form=form, seed=seed
        )
        with _progress() as tell:
            result = replacement(
                loaded,
                dictionary,
                text.tokens,
                layer=origin["layer"],
                head=origin["head"],
                config=config,
                on_progress=lambda done, total: tell("replace", done, total),
            )
        if out is not None:
            result.to_json(out)
    if as_json:
        _print_json(result.summary())
        return
    console.print(replacement_table(result.summary(), (result.layer, result.head)))


@app.command()
def models(as_json: Json = False) -> None:
    """The models that ship with the package: rule, sizes, and what is known of each from its own evaluation."""
    from hooked_recurrent.loading.describe import describe_models

    described = describe_models()
    if as_json:
        _print_json(described)
        return
    console.print(models_table(described))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="The .pt file.")],
    out: Annotated[Path, typer.Option(help="Folder to save the dictionary in.")],
    sae_type: Annotated[
        str | None,
        typer.Option("--type", help="Type string, where the file's config does not say it, such as 'bilinear'."),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(help="First axis of their states: 'key_first' (Gated DeltaNet), 'value_first' (Mamba-2, RWKV-7)."),
    ] = "key_first",
    model: Annotated[str | None, typer.Option(help="Name of the model, for the record.")] = None,
    hook: Annotated[str | None, typer.Option(help="Hook of its states; by default that of the config's layer.")] = None,
    head: Annotated[int | None, typer.Option(help="Head; by default the config's.")] = None,
    k: Annotated[int | None, typer.Option(help="Atoms that may be active at once; by default the config's.")] = None,
    d_k: Annotated[
        int | None, typer.Option("--d-k", help="Width of the key side, where the file does not tell it.")
    ] = None,
    d_v: Annotated[int | None, typer.Option("--d-v", help="Width of the value side, likewise.")] = None,
    as_json: Json = False,
) -> None:
    """Turn a file that the paper's code saved into a dictionary with the same codes and reconstructions.

    Tensors are read and nothing in the file is run; a pickled module is refused.

    Example: writesae convert L9_H4/best.pt --model Qwen/Qwen3.5-0.8B --out runs/l9h4
    """
    with _plain_errors():
        from writesae.interop.published import convert as convert_file
        from writesae.sae.write_sae import WriteSAE

        sizes = {"d_k": d_k, "d_v": d_v}
        saved = convert_file(
            source, out, sae_type=sae_type, layout=layout, model=model, hook=hook, head=head, k=k, **sizes
        )
        dictionary = WriteSAE.load(saved)
    if as_json:
        told = {"config": dictionary.config.to_dict(), "provenance": dictionary.provenance}
        _print_json({"saved": str(saved), **told})
        return
    found, shape = dictionary.provenance["published"]["type"], dictionary.config
    console.print(
        f"A {found} dictionary of {shape.n_atoms} atoms of {shape.d_k} x {shape.d_v}, saved in [bold]{saved}[/bold]"
    )


def _load(name: str):
    from hooked_recurrent import HookedRecurrentModel

    with log.status(f"loading {name}"):
        return HookedRecurrentModel.from_pretrained(name)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A live bar per stage, on standard error."""
    columns = (TextColumn("{task.description:>17}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=log) as bars:
        tasks: dict[str, int] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(STAGES.get(stage, stage), total=total)
            bars.update(tasks[stage], completed=done, total=total)  # type: ignore[arg-type]

        yield tell


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Bad input ends in one sentence and exit code 2, not in a traceback."""
    try:
        yield
    except (ValueError, KeyError, IndexError, FileNotFoundError, TypeError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        log.print(f"[red]error:[/red] {message}", highlight=False, markup=True)
        raise typer.Exit(2) from error


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=1))


if __name__ == "__main__":
    app()
