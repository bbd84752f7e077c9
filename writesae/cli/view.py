"""`writesae view`: the atom page of a saved dictionary with a live prompt box, on this machine alone."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from writesae.cli.base import Json, Seed, app, console, load_model, plain_errors, print_json, progress
from writesae.cli.experiments import ItsModel, Length, PassageCount, TextFolder, open_study


@app.command()
def view(
    dictionary: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a saved dictionary.")],
    port: Annotated[int, typer.Option(help="Port of 127.0.0.1 to serve on; 0 takes any free one.")] = 8765,
    model: ItsModel = None,
    page: Annotated[
        Path | None,
        typer.Option(help="A page of this dictionary that `writesae report` wrote; else it is measured now."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What stands in the prompt box at first.")] = None,
    open_it: Annotated[bool, typer.Option("--open/--no-browser", help="Open it in this machine's browser.")] = False,
    passages: PassageCount = 60,
    length: Length = 256,
    tested_atoms: Annotated[
        int, typer.Option(help="Atoms, the most frequent first, that replace writes in the model; 0 for none.")
    ] = 32,
    text: TextFolder = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Serve the atom page with a prompt box: type text, see which atoms fire where, change a write, see what follows change.

    Click a token to see the atoms that fire on it; put one in the place of the write, take it out, scale it, and the page shows
    the next-token distributions before and after, the KL in nats, and what the model writes next with and without the change.
    It answers this machine's own browser alone. Stop it with Ctrl+C.

    Example: writesae view runs/l2h1/sae --page runs/l2h1/sae/atoms.html --open
    """
    with plain_errors():
        from writesae.view import serving

        serving.require()
        from writesae.browser import BrowserConfig, collect
        from writesae.sae.write_sae import WriteSAE
        from writesae.view.live import PROMPT, live_page
        from writesae.view.requests import BOUNDS
        from writesae.view.saved import check_page, read_page
        from writesae.view.server import bind, make_server
        from writesae.view.session import session

        with bind(port) as listening:  # before anything takes time; nobody is answered yet
            if page is not None:
                data, sae = read_page(page), WriteSAE.load(dictionary)
                check_page(data, sae, page)
                name = model or sae.provenance.get("model")
                if name is None:
                    raise ValueError(f"the dictionary in {dictionary} does not say its model: give one with --model")
                asked = session(load_model(name), sae)
            else:
                config = BrowserConfig(tested_atoms=tested_atoms, seed=seed)
                study = open_study(dictionary, model, passages=passages, length=length, seed=seed, text=text)
                asked = session(study.model, study.sae, study.layer, study.head)
                about = {"files": study.files, "about": study.about, "config": config}
                place = {"layer": study.layer, "head": study.head}
                with progress() as tell:
                    data = collect(study.model, study.sae, study.tokens, on_progress=tell, **place, **about)
            html = live_page(asked, data, BOUNDS, PROMPT if prompt is None else prompt)
            server = make_server(asked, html, listening)
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
            if as_json:
                print_json({"url": url, "atoms": len(data)})
            else:
                console.print(f"[bold]{url}[/bold]  (Ctrl+C stops it)", soft_wrap=True)
            if open_it:
                webbrowser.open(url)
            serving.run(server, listening)
