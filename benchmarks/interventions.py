"""One write replaced, many times over: four ways in one process, in turn; and what caching the factors of every write costs.

    python benchmarks/interventions.py [--batch 256] [--repeats 5] [--threads N] [--json PATH]

Model, text and site are those of `support/intervention_routes.py`. Seconds per edit:

    hf        transformers: prefill of the first 256 tokens once (not timed); per edit a copy of the cache, a step over token t,
              the change of the cached state, and the tokens up to the horizon. It misses the read-out of token t itself, so
              that its answer for horizon t would be that of no edit: it has no row there.
    hf x 8    the same with eight edits as one batch.
    tl        transformer_lens's eager scan with a hook that carries the change on; a whole pass up to the horizon per edit.
    ours      `run_edits` with a kept trunk (one plain pass over the text, not timed), one edit per call.
    ours x N  one call for a whole batch (a sixteenth as many with the whole rest as horizon).
    floor     the matrix products alone that ours x N cannot skip.

Before the clock starts, ours and tl must equal a full pass with the same edit, and hf our cache reading (the state changed
after token t was read) at t + 1.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from support.intervention_routes import (
    HEAD,
    LAYER,
    LENGTH,
    WIDTH,
    CachedPrefix,
    EagerScan,
    Forks,
    T,
    build,
    matrix_products,
)
from support.machine import machine, median_seconds, must_equal
from support.report import Row, print_machine, table, write_json
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel, WriteEdit
from hooked_recurrent.hooks import RecurrentHookPoint

HORIZONS = {"t": 0, "t + 1": 1, "the whole rest": None}


def check(hf: CachedPrefix, tl: EagerScan, forks: Forks, keys: Tensor, values: Tensor) -> None:
    """Raise `RuntimeError` unless all sides compute what the module docstring says."""
    model, tokens = forks.model, forks.tokens
    edit = WriteEdit(LAYER, HEAD, T, key=keys[0], value=values[0])
    full = model.run_with_hooks(tokens, edits=[edit])[0, -1]
    cached = WriteEdit(LAYER, HEAD, T, key=keys[0], value=values[0], reading="cache")
    patched = model.run_with_hooks(tokens[:, : T + 2], edits=[cached])[0, -1]
    for name, made, expected in (
        ("ours", forks(keys[:1], values[:1], None)[0], full),
        ("tl", tl(keys[:1], values[:1], None)[0], full),
        ("hf", hf(keys[:1], values[:1], 1)[0], patched),
    ):
        must_equal(f"{name} with its edit", made, expected)


def seconds(run: Callable[[], object], edits: int, repeats: int) -> float:
    """Median seconds per edit after one run that does not count."""
    return median_seconds({"": run}, repeats)[""] / edits


def replacements(batch: int, repeats: int) -> tuple[list[Row], HookedRecurrentModel, Tensor]:
    """A row per horizon: seconds per edit of each route, and the ratio of the best of theirs to our batch."""
    theirs, ours, tokens = build()
    _, cache = ours.run_with_cache(tokens)
    native = tuple(cache[f"blocks.{LAYER}.mixer.hook_write_{side}"][0, T, HEAD] for side in ("key", "value"))
    keys, values = torch.randn(2, batch, WIDTH) * WIDTH**-0.5
    hf, tl, forks = CachedPrefix(theirs, tokens, native), EagerScan(theirs, tokens, native), Forks(ours, tokens)
    check(hf, tl, forks, keys, values)
    rows: list[Row] = []
    for name, horizon in HORIZONS.items():
        row: Row = {"horizon": name, "hf": None, "hf x 8": None}
        if horizon != 0:
            row["hf"] = seconds(lambda h=horizon: hf(keys[:1], values[:1], h), 1, repeats)
            row["hf x 8"] = seconds(lambda h=horizon: hf(keys[:8], values[:8], h), 8, repeats)
        row["tl"] = seconds(lambda h=horizon: tl(keys[:1], values[:1], h), 1, repeats)
        row["ours"] = seconds(lambda h=horizon: forks(keys[:1], values[:1], h), 1, repeats)
        many, length = (batch, horizon + 1) if horizon is not None else (max(8, batch // 16), LENGTH - T)
        row[f"ours x {batch}"] = seconds(lambda h=horizon, m=many: forks(keys[:m], values[:m], h), many, repeats)
        row["floor"] = seconds(lambda m=many, n=length: matrix_products(ours, m, n), many, repeats)
        best = min(row[side] for side in ("hf", "hf x 8", "tl") if row[side] is not None)
        row["ratio"] = best / row[f"ours x {batch}"]  # type: ignore[operator]
        rows.append(row)
        print(row, flush=True)
    return rows, ours, tokens


def overhead(model: HookedRecurrentModel, tokens: Tensor, repeats: int) -> Row:
    """Seconds of a bare pass, of one that caches all factor hooks (in turn with it), and of the unused hooks in it."""
    roles = ("log_decay", "erase", "probe", "write_key", "write_value", "query")
    names = [name for name in model.hook_dict if name.rpartition(".hook_")[2] in roles]
    sides = {
        "bare": lambda: model(tokens),
        "factors cached": lambda: model.run_with_cache(tokens, names_filter=names),
    }
    row: Row = dict(median_seconds(sides, repeats))
    point, x = RecurrentHookPoint(), torch.zeros(1)
    calls = 100_000
    row["unused hooks"] = seconds(lambda: [point(x) for _ in range(calls)], calls, repeats) * len(model.hook_dict)
    row["cached / bare"] = row["factors cached"] / row["bare"]  # type: ignore[operator]
    row["unused / bare"] = row["unused hooks"] / row["bare"]  # type: ignore[operator]
    return row


def main() -> None:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256, help="edits in our batch")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each route")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice when left out")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    if arguments.repeats < 1 or arguments.batch < 8:
        parser.error("--repeats must be at least 1 and --batch at least 8")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with torch.no_grad():
        rows, model, tokens = replacements(arguments.batch, arguments.repeats)
        cost = overhead(model, tokens, arguments.repeats)
    console, where = Console(), machine()
    console.print(table(f"Seconds per replaced write: median of {arguments.repeats}", rows))
    console.print(table(f"Seconds per pass over {LENGTH} tokens", [cost]))
    print_machine(console, where)
    if arguments.json:
        write_json(arguments.json, {"machine": where, "seconds": rows, "overhead": cost})


if __name__ == "__main__":
    main()
