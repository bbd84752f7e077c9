"""The commands that look at a model and its dictionaries: demo, models, convert."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from writesae.cli.base import OUTPUT, DryRun, Json, Model, Seed, app, console, load_model, print_json, progress
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
from writesae.cli.training_text import cut_text
from writesae.report.terminal import cells_table, models_table, quality_table, replacement_table

if TYPE_CHECKING:
    from writesae.demo import DemoConfig


@app.command()
def demo(
    model: Model = "tiny-gated-deltanet",
    layer: Annotated[int | None, typer.Option(help="Layer of the cell; by default the most effective cell.")] = None,
    head: Annotated[int | None, typer.Option(help="Head of the cell; goes with --layer.")] = None,
    firings: Annotated[int, typer.Option(help="Firings in the replacement test.")] = 600,
    steps: Annotated[int, typer.Option(help="Optimiser steps of the dictionary.")] = 3000,
    seed: Seed = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for the report, the dictionary and the results.", rich_help_panel=OUTPUT)
    ] = Path("demo_out"),
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Learn the writes of one head on real text, then replace writes by atoms on text that nobody has seen.

    1. Survey: what does deleting one write of each (layer, head) do to the output?
    2. Train a WriteSAE, a dictionary of rank-1 matrices, on the writes of the most effective head.
    3. On held-out files, put single atoms in the place of native writes and measure the KL of the output distribution,
       against deleting the write and against random atoms.

    Example: writesae demo --model tiny-mamba2 --out demo_mamba2
    """
    from writesae.demo import DemoConfig, run_demo
    from writesae.evaluation.firings import require_cell

    config = DemoConfig(layer=layer, head=head, firings=firings, steps=steps, seed=seed)
    check_folder("--out", out)
    if dry_run:
        _dry_demo(model, config, out, as_json)
        return
    loaded = load_model(model)
    if layer is not None and head is not None:
        require_cell(loaded, layer, head)
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


def _dry_demo(model: str, config: "DemoConfig", out: Path, as_json: bool) -> None:
    plan, loaded = begin("demo", model)
    counts = {"train": config.train_passages, "heldout": config.heldout_passages}
    plan.reads = "; ".join(passages_in_words(count, config.length, split) for split, count in counts.items())
    where = "the most effective cell" if config.layer is None else f"layer {config.layer}, head {config.head}"
    plan.computes = [
        f"a survey of all cells on {config.survey_passages} passages",
        f"a dictionary of {config.n_atoms} atoms of {where}, {config.steps:,} steps",
        f"a replacement test of at most {config.firings:,} firings",
    ]
    plan.writes = [str(out / name) for name in ("report.html", "results.json", "sae")]
    if loaded is not None:
        plan.measure(_demo_parts(loaded, config), "; the report comes on top")
    plan.show(as_json, {"config": config.to_dict()})


def _demo_parts(loaded: Any, config: "DemoConfig") -> list[Part]:
    from writesae.config import TrainConfig, WriteSAEConfig
    from writesae.evaluation.cells import survey
    from writesae.evaluation.firings import require_cell
    from writesae.training.jobs import Job, Source

    layer, head = config.layer, config.head
    if layer is None or head is None:
        layer, head = loaded.cfg.recurrent_layers[0], 0
    require_cell(loaded, layer, head)
    tokens = cut_text(loaded, "train", passages=8, length=config.length).tokens
    sizes = WriteSAEConfig(loaded.cfg.d_k, loaded.cfg.d_v, n_atoms=config.n_atoms, k=config.k)
    job = Job("sae", Source(f"blocks.{layer}.mixer.hook_write", head), sizes)
    sae = brief_dictionary(loaded, layer, head, sizes, tokens)
    return [
        Part("surveyed passages", config.survey_passages, lambda count: survey(loaded, tokens[:count]), small=1),
        forward_part(loaded, tokens, config.train_passages + config.heldout_passages),
        training_part(loaded, [job], tokens, TrainConfig(steps=config.steps)),
        replacement_part(loaded, sae, tokens, (layer, head), firings=config.firings),
    ]


@app.command()
def models(as_json: Json = False) -> None:
    """The models that ship with the package: rule, sizes, and what is known of each from its own evaluation.

    Example: writesae models --json
    """
    from hooked_recurrent.loading.describe import describe_models

    described = describe_models()
    if as_json:
        print_json(described)
        return
    console.print(models_table(described))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="The .pt file.")],
    out: Annotated[Path, typer.Option(help="Folder to save the dictionary in.", rich_help_panel=OUTPUT)],
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
    from writesae.interop.published import convert as convert_file
    from writesae.sae.write_sae import WriteSAE

    check_folder("--out", out)
    sizes = {"d_k": d_k, "d_v": d_v}
    saved = convert_file(source, out, sae_type=sae_type, layout=layout, model=model, hook=hook, head=head, k=k, **sizes)
    dictionary = WriteSAE.load(saved)
    if as_json:
        told = {"config": dictionary.config.to_dict(), "provenance": dictionary.provenance}
        print_json({"saved": str(saved), **told})
        return
    found, shape = dictionary.provenance["published"]["type"], dictionary.config
    console.print(
        f"A {found} dictionary of {shape.n_atoms} atoms of {shape.d_k} x {shape.d_v}, saved in [bold]{saved}[/bold]"
    )
