"""What every command shares: the app, its consoles, live progress, plain errors, JSON."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

app = typer.Typer(
    name="writesae",
    help="Open the matrix memory of recurrent language models, learn a dictionary of its writes, and replace them.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="markdown",
)
console, log = Console(), Console(stderr=True)
STAGES = {
    "cache": "writing to disk",
    "writes": "reading writes",
    "steps": "training atoms",
    "survey": "surveying cells",
    "replace": "replacing writes",
    "erase": "erasing atoms",
    "readers": "deleting writes",
    "steer": "steering",
    "dictionaries": "dictionaries",
    "codes": "reading codes",
    "readout": "predicting tokens",
}

Model = Annotated[
    str, typer.Option(help="A bundled model (see `writesae models`), a local folder, or a hub name 'owner/name'.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of tables.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random; the same seed gives the same numbers.")]


class Bars:
    """A live bar per stage, with a note behind it."""

    def __init__(self, bars: Progress):
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """So much of a stage is done."""
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task(STAGES.get(stage, stage), total=total, note="")
        self.bars.update(self.tasks[stage], completed=done, total=total)

    def note(self, stage: str, text: str) -> None:
        """Numbers to show behind the bar of a stage that has begun."""
        if stage in self.tasks:
            self.bars.update(self.tasks[stage], note=text)


@contextmanager
def progress(speaks: bool = True) -> Iterator[Bars]:
    """Live bars on standard error; none where this process does not speak."""
    columns = (
        TextColumn("{task.description:>17}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=log, disable=not speaks) as bars:
        yield Bars(bars)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Bad input ends in one sentence and exit code 2, an interruption in one and 130; no traceback."""
    try:
        yield
    except (ValueError, KeyError, IndexError, OSError, TypeError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        log.print(f"[red]error:[/red] {escape(str(message))}", highlight=False, markup=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as stop:
        log.print(str(stop) or "interrupted", highlight=False)
        raise typer.Exit(130) from stop


def load_model(name: str) -> Any:
    """A `HookedRecurrentModel` by name."""
    from hooked_recurrent import HookedRecurrentModel

    with log.status(f"loading {name}"):
        return HookedRecurrentModel.from_pretrained(name)


def print_json(value: object) -> None:
    """A value on standard output; what is not finite is null."""
    from hooked_recurrent.files import plain

    typer.echo(json.dumps(plain(value), indent=1, allow_nan=False))
