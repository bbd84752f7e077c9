"""`writesae report`: one self-contained page with every atom of a saved dictionary."""

from pathlib import Path
from typing import Annotated

import typer

from writesae.cli.base import Json, Seed, app, console, plain_errors, print_json, progress
from writesae.cli.experiments import ItsModel, Length, PassageCount, TextFolder, open_study


@app.command()
def report(
    dictionary: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a saved dictionary.")],
    out: Annotated[
        Path | None, typer.Option(help="The page; by default atoms.html in the dictionary's folder.")
    ] = None,
    model: ItsModel = None,
    passages: PassageCount = 60,
    length: Length = 256,
    tested_atoms: Annotated[
        int, typer.Option(help="Atoms, the most frequent first, that replace writes in the model; 0 for none.")
    ] = 128,
    firings_per_atom: Annotated[int, typer.Option(help="Most firings at which each of them does.")] = 5,
    text: TextFolder = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Write one HTML page with every atom of a dictionary: where it fires, what it looks like, what it does.

    The model reads held-out text once more for it. The page needs no network and nothing beside it: open it in any browser,
    mail it, keep it. Search, sort, and link to an atom as page.html#atom=123.

    Example: writesae report runs/l2h1/sae --out atoms.html --tested-atoms 200
    """
    with plain_errors():
        from writesae.browser import BrowserConfig, collect, write_page

        config = BrowserConfig(tested_atoms=tested_atoms, firings_per_atom=firings_per_atom, seed=seed)
        study = open_study(dictionary, model, passages=passages, length=length, seed=seed, text=text)
        with progress() as tell:
            data = collect(
                study.model,
                study.sae,
                study.tokens,
                layer=study.layer,
                head=study.head,
                files=study.files,
                about=study.about,
                config=config,
                on_progress=tell,
            )
        page = write_page(out or dictionary / "atoms.html", data)
    kinds = data.atoms["kind"].value_counts().to_dict()
    tested = int((data.atoms["tested"] > 0).sum())
    if as_json:
        print_json(
            {"page": str(page), "bytes": page.stat().st_size, "atoms": len(data), "kinds": kinds, "tested": tested}
        )
        return
    described = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    console.print(f"{len(data):,} atoms ({described}), {tested:,} of them measured in place of writes")
    console.print(f"{page.stat().st_size / 1e6:.1f} MB: [bold]{page}[/bold]", soft_wrap=True)
