"""Run every notebook of this folder from top to bottom and keep what it shows: `python -m notebooks.run [NAMES]`.

A name is the beginning of a file name ("01" or "01_look_into_a_memory"); without names all are run. Each notebook runs in
a fresh kernel on one thread, from an empty folder, with this checkout's packages. It is written back, in one piece, only when
every cell ran; what would differ from run to run (times, cell ids, versions) is taken out, so that a diff shows results alone.
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import nbformat
import typer
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from hooked_recurrent.files import write_text

FOLDER = Path(__file__).resolve().parent
SECONDS_PER_CELL = 600
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# A notebook chooses its own backend; and Triton is only interpreted where the tests want it so.
NOT_PASSED_ON = ("MPLBACKEND", "TRITON_INTERPRET")
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class NotebookError(RuntimeError):
    """A cell failed; the message names the notebook and the cell, and ends with the cell's traceback."""


def found(names: Iterable[str] = (), folder: Path = FOLDER) -> list[Path]:
    """The notebooks whose file names begin so, in order; all of them without names.

    Raises:
        ValueError: for a name that no notebook begins with.
    """
    every = sorted(folder.glob("*.ipynb"))
    chosen = set()
    for name in names:
        begins = [path for path in every if path.stem.startswith(Path(name).stem)]
        if not begins:
            there = ", ".join(path.stem for path in every) or "none at all"
            raise ValueError(f"no notebook begins with {name!r}; there are {there}")
        chosen.update(begins)
    return [path for path in every if not names or path in chosen]


def execute(path: Path) -> NotebookNode:
    """A copy of a notebook with fresh outputs, run from top to bottom in a kernel of its own; the file stays as it was.

    Raises:
        NotebookError: where a cell raises, takes longer than ten minutes, or takes the kernel down.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as scratch:
        client = NotebookClient(
            notebook,
            timeout=SECONDS_PER_CELL,
            startup_timeout=SECONDS_PER_CELL,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            # A tag must not skip a cell or excuse its error: all run, and all must succeed.
            skip_cells_with_tag="",
            force_raise_errors=True,
            resources={"metadata": {"path": scratch}},
        )
        try:
            client.execute(env=_environment(scratch))
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            raise NotebookError(f"{path.name}, {_failed(notebook)}:\n{ANSI.sub('', str(error))}") from None
    return settled(notebook)


def settled(notebook: NotebookNode) -> NotebookNode:
    """The notebook without what differs from run to run or from machine to machine; changed in place."""
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index:02d}"
        cell.metadata = nbformat.from_dict({})
        for output in cell.get("outputs", ()):
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
    nbformat.validate(notebook)
    return notebook


def save(notebook: NotebookNode, path: Path) -> None:
    """Write it in one piece, the way Jupyter lays out its files."""
    write_text(path, nbformat.writes(notebook) + "\n")


def _environment(scratch: str) -> dict[str, str]:
    """This process's environment, on one thread, with this checkout first and nobody's own IPython settings."""
    kept = {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}
    paths = [str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **kept,
        **ONE_THREAD,
        "PYTHONPATH": os.pathsep.join(paths),
        "IPYTHONDIR": str(Path(scratch, ".ipython")),
        # tqdm's complaint where JupyterLab's widgets are not installed; nobody watches a bar here.
        "PYTHONWARNINGS": "ignore:IProgress not found",
    }


def _failed(notebook: NotebookNode) -> str:
    """Which cell went wrong: the one with an error, else the last that was begun."""
    begun = [index for index, cell in enumerate(notebook.cells) if cell.get("execution_count")]
    wrong = [
        index
        for index, cell in enumerate(notebook.cells)
        if any(output.output_type == "error" for output in cell.get("outputs", ()))
    ]
    places = wrong or begun[-1:]
    return f"cell {places[0]}" if places else "before the first cell"


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help="Beginnings of file names, such as 01; all by default.")
    ] = None,
) -> None:
    """Run notebooks from top to bottom and keep what they show. A notebook with an error is left as it was."""
    try:
        chosen = found(names or ())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    failed = []
    for path in chosen:
        typer.echo(f"{path.name} ...", err=True)
        try:
            save(execute(path), path)
        except NotebookError as error:
            failed.append(path.name)
            typer.echo(f"{error}\n", err=True)
    if failed:
        typer.echo(f"left as they were, for an error: {', '.join(failed)}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
