"""Runs a command-line function so that bad input ends in one sentence, not in a stack of frames."""

import sys
from collections.abc import Callable

import typer


def run_command(function: Callable[..., None]) -> None:
    """`typer.run`, but an error of the user's input is printed as `error: ...` and ends the process with status 1."""
    try:
        typer.run(function)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
