"""Which variants of WriteSAE find planted atoms again; the table of docs/recovery.md.

    python benchmarks/recovery.py [--only PLANTING]... [--variant NAME]... [--seeds 0 1 2] [--threads N] [--steps N]
                                  [--json PATH] [--markdown PATH]

Every planting is 512 atoms at d_k = d_v = 64; dictionaries have 512 atoms of their own and see fresh samples in every batch.
The numbers are shares of atoms, not times, so the machine does not matter to them, but its name is written beside them.
A JSON file that exists is added to: what it holds already is not trained again, so a run that was stopped goes on.
"""

import argparse
import json
from pathlib import Path

from support.machine import machine
from support.report import Row, print_machine, table, torch_threads, wide_console, write_json

from writesae import TrainConfig
from writesae.evaluation.recovering.planted import Planted
from writesae.evaluation.recovering.recovery import VARIANTS, recovery
from writesae.evaluation.recovering.recovery_result import RecoveryResult

FEW = ("bilinear", "bilinear_tied", "rank1", "flat")
PLANTINGS: dict[str, tuple[Planted, int, tuple[str, ...]]] = {
    "8 atoms, 1% noise": (Planted(), 8, tuple(VARIANTS)),
    "1 atom, 1% noise": (Planted(k=1), 1, FEW),
    "8 atoms, 30% noise": (Planted(noise=0.3), 8, FEW),
    "8 atoms, overlap 0.3": (Planted(overlap=0.3), 8, FEW),
    "8 atoms, overlap 0.6": (Planted(overlap=0.6), 8, FEW),
    "states": (Planted(kind="states", k=1), 8, FEW),
}
"""By name: what is planted, the dictionary's k, and the variants that are trained on it."""
QUICK = dict(n_atoms=12, d_k=8, d_v=8)


def shrunk(planted: Planted) -> Planted:
    """The same planting at a size that only shows that everything runs."""
    return Planted(**{**planted.to_dict(), **QUICK, "k": min(planted.k, 2)})


def run(name: str, variant: str, seed: int, arguments: argparse.Namespace) -> RecoveryResult:
    """Train one dictionary, and count what it finds."""
    planted, k, _ = PLANTINGS[name]
    if arguments.quick:
        planted, k = shrunk(planted), min(k, 2)
    train = TrainConfig(
        steps=3 if arguments.quick else arguments.steps, batch_size=16 if arguments.quick else 256, resample_every=100
    )
    return recovery(planted, variant, name=name, seeds=[seed], k=k, train=train)


def wanted(arguments: argparse.Namespace) -> list[tuple[str, str, int]]:
    """Planting, variant and seed of every dictionary that was asked for."""
    return [
        (name, variant, seed)
        for name in arguments.only or PLANTINGS
        for variant in PLANTINGS[name][2]
        for seed in arguments.seeds
        if variant in (arguments.variant or VARIANTS)
    ]


def main() -> None:
    """Parse, plant, train, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=list(PLANTINGS), help="this planting; may be repeated")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="this variant; may be repeated")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one dictionary for each")
    parser.add_argument("--steps", type=int, default=1200, help="optimiser steps")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that the script runs")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice when left out")
    parser.add_argument("--json", type=Path, help="write every dictionary's score to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    arguments = parser.parse_args()
    console, results = wide_console(), []
    if arguments.json and arguments.json.exists():
        results.append(RecoveryResult.from_json(arguments.json))
    done = {
        key
        for result in results
        for key in result.table[["planted", "variant", "seed"]].itertuples(index=False, name=None)
    }
    with torch_threads(arguments.threads):
        where = machine()
        for case in wanted(arguments):
            if case in done:
                continue
            results.append(run(*case, arguments))
            console.print(*case, f"{results[-1].table['recovered'].max():.3f}", style="dim")
            save(RecoveryResult.joined(results), where, arguments)  # a run takes long, and may be stopped
    if not results:
        parser.error("no planting has any of these variants")
    result = RecoveryResult.joined(results)
    rows: list[Row] = [dict(row) for row in result.summary()]
    console.print(table(f"Planted atoms found at cosine > {result.threshold}", rows))
    print_machine(console, where)


def save(result: RecoveryResult, where: dict[str, str | int], arguments: argparse.Namespace) -> None:
    """Write what is known so far."""
    if arguments.json:
        result.to_json(arguments.json)
        write_json(arguments.json, {"machine": where, **json.loads(arguments.json.read_text(encoding="utf-8"))})
    if arguments.markdown:
        arguments.markdown.write_text(result.to_markdown(), encoding="utf-8")


if __name__ == "__main__":
    main()
