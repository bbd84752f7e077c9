"""What the benchmarks share at their two ends: the command line, and tables and JSON of what was measured.

A benchmark is a script with named parts. A part takes the `Options` and returns a `Section`: rows whose columns are seconds,
unless their name says otherwise (see `cell`).
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .machine import allocator, answer_of, in_process, machine, with_allocator

Value = float | int | str | None
Row = dict[str, Value]


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line."""

    script: Path
    """The benchmark itself, so that a part can run a case of it in a fresh process."""
    repeats: int
    """Timed runs of each side."""
    quick: bool
    """Tiny shapes, to see that everything runs; the numbers mean nothing."""
    threads: int | None = None
    """Threads of torch; its own choice when None."""

    cases: Mapping[str, "MemoryCase"] = field(default_factory=dict)
    """What `memory` can run."""

    def memory(self, case: str) -> dict[str, int]:
        """Bytes before and increase of the peak by one run of a case; see `machine.peak_increase`.

        In a fresh process, but for a quick run, which would spend its time on starting them.
        """
        if self.quick:
            return self.cases[case](True)
        flags = ["--threads", str(self.threads)] if self.threads else []
        return answer_of(self.script, ["--memory-of", case, *flags])


@dataclass(frozen=True)
class Section:
    """What a part measured."""

    title: str
    """What the rows are."""
    rows: list[Row]
    """One dict per row; a row may lack columns of others."""
    note: str = ""
    """What one must know to read them."""


Part = Callable[[Options], Section]
MemoryCase = Callable[[bool], dict[str, int]]


def cell(name: str, value: Value) -> str:
    """A value as text. The column says what it is: "a / b" a ratio, "... MB" bytes, "... error", "... tokens/s", "... ms".

    Any other number with a fraction is seconds.
    """
    if value is None or isinstance(value, str):
        return value or "-"
    if isinstance(value, int) and not name.endswith("MB"):
        return f"{value:,}"
    if " / " in name or name.endswith("ratio"):
        return f"{value:.1f}x" if value >= 5 else f"{value:.2g}x" if value < 0.1 else f"{value:.2f}x"
    if name.endswith("MB"):
        return f"{value / 1e6:,.1f}"
    if name.endswith("error"):
        return f"{value:.1e}"
    if name.endswith("tokens/s"):
        return f"{value:,.0f}"
    if name.endswith("ms"):
        return f"{value * 1e3:,.1f}"
    return f"{value:.4f}" if value >= 0.001 else f"{value:.2e}"


def table(title: str, rows: list[Row]) -> Table:
    """The rows as text, with the columns of all of them in the order in which they first come."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    shown = Table(*columns, title=title)
    for row in rows:
        shown.add_row(*(cell(name, row.get(name)) for name in columns))
    return shown


def print_machine(console: Console, where: Mapping[str, Value]) -> None:
    """One line that says what the numbers were measured on."""
    console.print(", ".join(f"{name} {value}" for name, value in where.items()), style="dim")


def write_json(path: Path, content: Any) -> None:
    """Write numbers to a file that people read too."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def wide_console() -> Console:
    """A console that does not fold a table when its output goes to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=180)


def per_allocator(script: Path, options: list[str], allocators: list[str], path: Path | None) -> dict[str, Any]:
    """Run the script again under each allocator setting, one process after the other; what all of them wrote as JSON."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in allocators:
            part = Path(folder) / f"{name}.json"
            in_process(script, [*options, "--json", str(part)], with_allocator(name))
            found |= json.loads(part.read_text(encoding="utf-8"))
    if path is not None:
        write_json(path, found)
    return found


def parser_of(doc: str, repeats: int) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=repeats, help="timed runs of each side")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that the script runs")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice when left out")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument(
        "--allocator",
        choices=["default", "tuned", "both"],
        help="run under this setting of glibc's allocator, in a process of its own; that of the environment when left out",
    )
    return parser


def other_allocator(arguments: argparse.Namespace, script: Path) -> bool:
    """Whether another allocator setting than this process's is asked for; the script is then run again under it."""
    if arguments.allocator is None or arguments.allocator == allocator():
        return False
    wanted = ["default", "tuned"] if arguments.allocator == "both" else [arguments.allocator]
    options, given = [], iter(sys.argv[1:])
    for option in given:
        if option in ("--allocator", "--json"):
            next(given)
        elif not option.startswith(("--allocator=", "--json=")):
            options.append(option)
    per_allocator(script, options, wanted, arguments.json)
    return True


@contextmanager
def torch_threads(threads: int | None):
    """Set torch's number of threads where one is given."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    yield
    torch.set_num_threads(before)


def run_parts(
    script: Path, doc: str, parts: Mapping[str, Part], memory: Mapping[str, MemoryCase] | None = None, repeats: int = 5
) -> None:
    """The whole of a benchmark with named parts: parse, measure, print, and write JSON as {allocator: {machine, parts}}.

    Args:
        script: the file of the benchmark.
        doc: its docstring, the first line of which describes it.
        parts: by the name that `--only` takes.
        memory: by name, what `Options.memory` can run in a fresh process; each is told whether to be quick.
        repeats: timed runs by default.
    """
    memory = memory or {}
    parser = parser_of(doc, repeats)
    parser.add_argument("--only", action="append", choices=list(parts), help="run this part; may be repeated")
    parser.add_argument("--memory-of", choices=list(memory), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    if other_allocator(arguments, script):
        return
    with torch_threads(arguments.threads):
        if arguments.memory_of:
            print(json.dumps(memory[arguments.memory_of](arguments.quick)))
            return
        options = Options(script, arguments.repeats, arguments.quick, arguments.threads, memory)
        console, where, found = wide_console(), machine(), {}
        for name in arguments.only or parts:
            section = parts[name](options)
            console.print(table(section.title, section.rows))
            console.print(section.note, style="dim")
            found[name] = vars(section)
    print_machine(console, where)
    if arguments.json:
        settings = {"repeats": arguments.repeats, "quick": arguments.quick}
        write_json(arguments.json, {allocator(): {"machine": where, "settings": settings, "parts": found}})
