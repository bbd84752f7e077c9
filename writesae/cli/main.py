"""The commands that look at a model and its dictionaries: demo, models, convert."""

from pathlib import Path
from typing import Annotated

import typer

from writesae.cli.base import Json, Model, Seed, app, console, load_model, plain_errors, print_json, progress
from writesae.report.terminal import cells_table, models_table, quality_table, replacement_table


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
    with plain_errors():
        from writesae.demo import DemoConfig, run_demo

        config = DemoConfig(layer=layer, head=head, firings=firings, steps=steps, seed=seed)
        loaded = load_model(model)
        with progress() as tell:
            result = run_demo(loaded, out, config, tell)
    if as_json:
        print_json({"summary": result.replacement.summary(), "seconds": result.seconds, "report": str(result.report)})
        return
    cell = (result.replacement.layer, result.replacement.head)
    console.print(cells_table(result.cells, cell))
    console.print(quality_table(result.training.metrics))
    console.print(replacement_table(result.replacement.summary(), cell))
    console.print(f"\n{sum(result.seconds.values()):.0f} s. Report: [bold]{result.report}[/bold]")


@app.command()
def models(as_json: Json = False) -> None:
    """The models that ship with the package: rule, sizes, and what is known of each from its own evaluation."""
    from hooked_recurrent.loading.describe import describe_models

    described = describe_models()
    if as_json:
        print_json(described)
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
    with plain_errors():
        from writesae.interop.published import convert as convert_file
        from writesae.sae.write_sae import WriteSAE

        sizes = {"d_k": d_k, "d_v": d_v}
        saved = convert_file(
            source, out, sae_type=sae_type, layout=layout, model=model, hook=hook, head=head, k=k, **sizes
        )
        dictionary = WriteSAE.load(saved)
    if as_json:
        told = {"config": dictionary.config.to_dict(), "provenance": dictionary.provenance}
        print_json({"saved": str(saved), **told})
        return
    found, shape = dictionary.provenance["published"]["type"], dictionary.config
    console.print(
        f"A {found} dictionary of {shape.n_atoms} atoms of {shape.d_k} x {shape.d_v}, saved in [bold]{saved}[/bold]"
    )
