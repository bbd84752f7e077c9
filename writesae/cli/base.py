"""What every command shares: the app and its panels, its consoles, live progress, plain errors, JSON."""

import inspect
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text
from typer.core import TyperGroup

from writesae.cli.completion import complete_model
from writesae.cli.config_file import ConfigFile

PANELS = {
    "Start here": ("demo", "models", "reproduce"),
    "Learn": ("train", "cache"),
    "Look": ("report", "view"),
    "Replace": ("replace", "replace-cells", "population", "passage-test"),
    "Predict and steer": ("logits", "sign-test", "install", "steer", "erase"),
    "Describe": ("partition", "readers", "selectivity", "perplexity"),
    "Compare": ("baselines", "encoder-swap", "objectives"),
    "Files and records": ("convert",),
}
"""The commands in the order in which a new user needs them."""
OUTPUT = "Output"
"""The panel of what every command has."""
ORDER = {name: (number, panel) for panel, names in PANELS.items() for number, name in enumerate(names)}

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
    str,
    typer.Option(
        help="A bundled model (see `writesae models`), a local folder, or a hub name 'owner/name'.",
        autocompletion=complete_model,
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print the result as JSON on standard output, and nothing else there.", rich_help_panel=OUTPUT
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Say what would be downloaded, computed and written, and how long it may take; then stop.",
        rich_help_panel=OUTPUT,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of everything random; the same seed gives the same numbers.")]


class Verbs(TyperGroup):
    """A group whose help shows the commands in panels, in the order of `PANELS`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names in the order of the panels; what no panel names comes last."""
        panels = [*PANELS]
        places = {name: (panels.index(panel), number) for name, (number, panel) in ORDER.items()}
        return sorted(super().list_commands(ctx), key=lambda name: places.get(name, (len(panels), 0)))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, in its panel."""
        command: Any = super().get_command(ctx, cmd_name)
        if command is not None and cmd_name in ORDER:
            command.rich_help_panel = ORDER[cmd_name][1]
        return command


class App(typer.Typer):
    """A Typer whose commands all take --config and all end bad input in one sentence."""

    def command(  # type: ignore[override]
        self, *names: Any, **more: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """As `typer.Typer.command`."""
        register = super().command(*names, **more)

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            register(_as_command(function))
            return function

        return decorate


def _as_command(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with --config beside its own options and with plain errors."""
    signature = inspect.signature(function, eval_str=True)
    has_its_own = "config" in signature.parameters

    @wraps(function)
    def command(**options: Any) -> Any:
        if not has_its_own:
            options.pop("config")
        with plain_errors():
            return function(**options)

    parameters = list(signature.parameters.values())
    if not has_its_own:
        parameters.append(
            inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=ConfigFile)
        )
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


app = App(
    name="writesae",
    help="Open the matrix memory of recurrent language models, learn a dictionary of its writes, and replace them.",
    epilog="Exit codes: 0 done; 1 measured, but not as expected (`reproduce --quick`); 2 bad input, said in one sentence; "
    "130 interrupted. Results go to standard output, progress and errors to standard error. "
    "WRITESAE_TRACEBACK=1 shows where an error came from.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="markdown",
    cls=Verbs,
)


def show_version(wanted: bool) -> bool:
    """Print the version and stop."""
    if wanted:
        from hooked_recurrent import __version__

        typer.echo(f"writesae {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Open the matrix memory of recurrent language models, learn a dictionary of its writes, and replace them.

    Start with `writesae demo`; then `writesae train`, and any other command with the dictionary that it leaves.
    """


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
    except BrokenPipeError:  # `writesae models | head -1` is no bad input
        raise
    except (ValueError, KeyError, IndexError, OSError, TypeError) as error:
        if os.environ.get("WRITESAE_TRACEBACK"):
            raise
        say_error(error.args[0] if isinstance(error, KeyError) and error.args else error)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as stop:
        log.print(Text(str(stop) or "interrupted"), soft_wrap=True)
        raise typer.Exit(130) from stop


def say_error(message: object) -> None:
    """An error on standard error. As `Text`, because "[batch, pos]" in a message would pass for markup and vanish."""
    log.print(Text("error: ", style="red") + Text(str(message)), soft_wrap=True)


def load_model(name: str) -> Any:
    """A `HookedRecurrentModel` by name."""
    from hooked_recurrent import HookedRecurrentModel

    with log.status(f"loading {name}"):
        return HookedRecurrentModel.from_pretrained(name)


def print_json(value: object) -> None:
    """A value on standard output; what is not finite is null."""
    from hooked_recurrent.files import plain

    typer.echo(json.dumps(plain(value), indent=1, allow_nan=False))
