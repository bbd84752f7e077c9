"""The prompt panel, and the atom page with the panel in it."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from writesae.browser import AtomBrowserData, render
from writesae.browser.packing import embedded
from writesae.view.session import Session

HERE = Path(__file__).parent
SCRIPTS = ("live", "tokens", "changes", "outcome")
"""The panel's scripts, in the order in which they need each other."""
PROMPT = "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file."
"""What stands in the box at first."""


def live_page(session: Session, data: AtomBrowserData, bounds: dict[str, int], prompt: str = PROMPT) -> str:
    """The atom page of a dictionary with the prompt panel, as one string of HTML.

    Args:
        session: what prompts are read with.
        data: what the page shows of every atom.
        bounds: what a request may ask for, as `requests.BOUNDS` says; the page's fields stop there.
        prompt: what stands in the box at first, and is read at once; may be empty.

    Raises:
        ValueError: for data of another number of atoms than the session's dictionary has.
    """
    if len(data) != session.sae.config.n_atoms:
        raise ValueError(f"the page shows {len(data)} atoms, but the dictionary has {session.sae.config.n_atoms}")
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    about = session.about()
    markup = environment.get_template("panel.html.j2").render(
        about=about, bounds=bounds, prompt=prompt, data=Markup(embedded(about))
    )
    return render(
        data,
        live=True,
        markup=markup,
        styles=[(HERE / "static" / "live.css").read_text(encoding="utf-8")],
        scripts=[(HERE / "static" / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS],
    )
