"""Runs the steps of a reproduction, keeps each on disk, and skips those that are there already.

    OUT/reproduce.json           config, versions, machine, command, and per step its seconds
    OUT/<step>.json              summary and config of a result, claims; the files of docs/results.md
    OUT/tables/<step>.csv.gz     every measurement of it
    OUT/dictionaries/<name>/     what was trained on the way

A step that was interrupted is run again from its beginning; what it had trained is kept.
"""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.files import plain, write_text, write_together
from writesae.config import require_one_of
from writesae.evaluation.result import Result
from writesae.reproduce.bench import Bench
from writesae.reproduce.claims import Claim, claims_of
from writesae.reproduce.config import ReproduceConfig
from writesae.reproduce.steps import STEPS

Told = Callable[[str, int, int], None]
"""Told (what is being done, how much of it is done, how much there is)."""


@dataclass(frozen=True)
class Outcome:
    """What a reproduction made or found."""

    folder: Path
    """Where it lies."""
    summaries: dict[str, list[dict[str, Any]]]
    """By step, the rows of its summary."""
    claims: list[Claim]
    """Which way every effect points."""
    seconds: dict[str, float]
    """By step, how long it took, here or when it was made."""


def reproduce(
    model: HookedRecurrentModel,
    config: ReproduceConfig,
    out: str | Path,
    *,
    only: Collection[str] = (),
    redo: Collection[str] = (),
    on_progress: Told | None = None,
) -> Outcome:
    """Run every step, or `only` some, in a folder; a step whose file is there, from the same config, is not run again.

    Args:
        model: the model that `config.model` names.
        config: how large.
        out: the folder of the run, made where it is missing.
        only: names of steps; none means all.
        redo: steps to run though their file is there.
        on_progress: told how far things are.

    Raises:
        ValueError: an unknown step; a folder with the run of another config.
    """
    wanted = check_steps(only, redo)
    out = Path(out)
    tell = on_progress or (lambda stage, done, total: None)
    about = _about(config, model.cfg.mixer.rule)
    _claim_folder(out, about)
    bench = Bench(model, config, out / "dictionaries", tell)
    for number, name in enumerate(wanted):
        tell("steps of the reproduction", number, len(wanted))
        if name in redo or not (out / f"{name}.json").is_file():
            start = time.perf_counter()
            results = STEPS[name](bench)
            _keep(out, name, results, time.perf_counter() - start)
    tell("steps of the reproduction", len(wanted), len(wanted))
    return read(out)


def check_steps(only: Collection[str] = (), redo: Collection[str] = ()) -> list[str]:
    """The steps that are asked for, in order: `only` these, or all; `ValueError` for an unknown one, with the nearest."""
    for name in (*only, *redo):
        require_one_of("reproduce", "step", name, tuple(STEPS))
    return [name for name in STEPS if not only or name in only]


def read(out: str | Path) -> Outcome:
    """What lies in the folder of a run, whole or not.

    Raises:
        ValueError: no run there, or a file that is not whole.
    """
    out = Path(out)
    _load(out / "reproduce.json")
    found = {name: _load(out / f"{name}.json") for name in STEPS if (out / f"{name}.json").is_file()}
    summaries = {name: one["summary"] for name, one in found.items()}
    return Outcome(out, summaries, claims_of(summaries), {name: one["seconds"] for name, one in found.items()})


def _about(config: ReproduceConfig, rule: str) -> dict[str, Any]:
    return {
        "config": config.to_dict(),
        "command": command(config),
        "fingerprint": hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:16],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "transformer-lens", "scipy")},
        "threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}",
        "rule": rule,
    }


def command(config: ReproduceConfig) -> str:
    """The command line that makes this run, with what differs from the model's own sizes."""
    usual = ReproduceConfig.of(config.model, quick=config.quick).to_dict()
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in config.to_dict().items() if value != usual[name]]
    return " ".join(["writesae reproduce --model", config.model, *(["--quick"] if config.quick else []), *flags])


def _claim_folder(out: Path, about: dict[str, Any]) -> None:
    path = out / "reproduce.json"
    if path.is_file():
        there = _load(path)
        if there["fingerprint"] != about["fingerprint"]:
            changed = [
                name for name, value in about["config"].items() if plain(value) != there["config"].get(name, "nothing")
            ]
            raise ValueError(
                f"{out} holds the run of another config ({', '.join(changed)} differ): give another folder, or remove it"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(plain(about), indent=1) + "\n")


def _keep(out: Path, name: str, results: dict[str, Result], seconds: float) -> None:
    """A step's results in one file, a row of the summary per result's row, each with the result's name as `run`."""
    rows = [{"run": variant, **row} for variant, result in results.items() for row in result.summary()]
    content = {
        "step": name,
        "seconds": seconds,
        "summary": rows,
        "results": {
            variant: {"kind": r.kind, "layer": r.layer, "head": r.head, "config": r.config, "about": r.about}
            for variant, r in results.items()
        },
    }
    writers = {
        f"{name}.{variant}.csv.gz": _table_writer(result) for variant, result in results.items() if len(result.table)
    }
    if writers:
        write_together(out / "tables", writers)
    write_text(out / f"{name}.json", _by_rows(plain(content)))


def _by_rows(content: dict[str, Any]) -> str:
    """JSON with a line per row of the summary, so that the file is short and a change shows where it is."""
    rows = ",\n".join(json.dumps(row, allow_nan=False) for row in content["summary"])
    rest = {name: value for name, value in content.items() if name != "summary"}
    return f'{json.dumps(rest, allow_nan=False)[:-1]}, "summary": [\n{rows}\n]}}\n'


def _table_writer(result: Result) -> Callable[[Path], None]:
    # no time in the header: the same measurements are the same file
    return lambda path: result.table.to_csv(
        path, index=False, float_format="%.8g", compression={"method": "gzip", "mtime": 0}
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} holds no reproduction: {path.name} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no whole JSON file ({error}): remove it to have its step run again") from None
