"""How long an import takes: a fresh process per run, the sides in turn.

    python benchmarks/import_time.py [--repeats 7] [--json PATH]

`hooked_recurrent` imports torch and transformer_lens, so that no import of it can be faster than theirs: the ratio tells what
it adds. `writesae --help` imports neither. Every side is run once before the clock starts, so that files come from memory and
bytecode from its cache. What costs what is told by `python -X importtime -c "import hooked_recurrent"`.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from support.machine import machine, seconds_in_turn
from support.report import Row, print_machine, table, write_json

SIDES = {
    "torch, transformer_lens": "import torch, transformer_lens",
    "hooked_recurrent": "import hooked_recurrent",
    "writesae --help": "import sys; sys.argv[1:] = ['--help']; from writesae.cli import app; app(standalone_mode=False)",
}
BASE = "torch, transformer_lens"


def run(statement: str) -> None:
    """A fresh interpreter that runs one statement and ends. Raises `RuntimeError` with its last words when it fails."""
    done = subprocess.run([sys.executable, "-c", statement], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{statement!r} failed: {done.stderr[-2000:]}")


def import_times(sides: Mapping[str, str], base: str, repeats: int) -> list[Row]:
    """A row per side: its median seconds, the quickest run, and the median over that of `base`."""
    taken = seconds_in_turn({name: lambda s=statement: run(s) for name, statement in sides.items()}, repeats)
    medians = {name: statistics.median(some) for name, some in taken.items()}
    return [
        {
            "import": name,
            "median": medians[name],
            "quickest": min(taken[name]),
            f"median / {base}": medians[name] / medians[base],
        }
        for name in sides
    ]


def main() -> None:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each side")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {arguments.repeats}")
    rows = import_times(SIDES, BASE, arguments.repeats)
    console, where = Console(), machine()
    console.print(table(f"Seconds of a process that imports: {arguments.repeats} runs each, in turn", rows))
    print_machine(console, where)
    if arguments.json:
        write_json(arguments.json, {"machine": where, "repeats": arguments.repeats, "seconds": rows})


if __name__ == "__main__":
    main()
