"""Training a sparse dictionary: ours against the published dense formulation and SAELens's TopK SAE, in one process, in turn.

    python benchmarks/sae.py [--only PART]... [--repeats 5] [--threads N] [--allocator default|tuned|both] [--json PATH]

Parts, all with 2,048 atoms, k = 32, float32, on a CPU:

    writes   a training step on 256 writes at d_k = d_v = 64, 128, 256
    growth   the same step at doubling widths, which take turns as sides do: 2.0x per doubling is linear in d, 4.0x is
             linear in d_k d_v
    states   a step on all states of a passage under scalar decay, per state, and the memory that it takes: ours from the net
             writes by running sums (their making and the states' norms are in its time), the dense formulation on a
             batch of the same states, ready made
    memory   what a dictionary, its optimiser and two steps add to the memory of a fresh process, at its peak

What the sides are is told in `support/sae_sides.py`. All start from the same dictionary and batch, and must have the same
loss before a clock starts; the column "error" shows the largest relative difference. Theirs are given the matrices ready made.
Sides run in turn, and the numbers are medians. At d = 512 the flattened dictionary alone is 4.3 GB and its optimiser three
times that, so only our side goes there. SAELens needs a version of transformer_lens of its own: where `sae_lens` is not
installed, its side is left out and the notes say so.
"""

from functools import partial
from pathlib import Path

import torch
from support.machine import median_seconds, peak_increase
from support.report import Options, Part, Row, Section, run_parts
from support.sae_sides import (
    Step,
    dense_step,
    dictionary,
    has_sae_lens,
    must_agree,
    net_writes,
    our_step,
    sae_lens_step,
    writes,
)

from writesae.sae.states import StateSequences

N_ATOMS, K, BATCH = 2048, 32, 256
LENGTHS = (1024, 4096)
STATE_WIDTH = 128
WIDTHS, OWN_WIDTHS = (64, 128, 256), (64, 128, 256, 512)
QUICK = {"n_atoms": 40, "k": 4, "batch": 16, "widths": (6, 12), "lengths": (20, 40)}
OURS, DENSE, SAE_LENS = "ours", "dense bilinear", "SAELens TopK"
THEIRS = {DENSE: dense_step, **({SAE_LENS: sae_lens_step} if has_sae_lens() else {})}
LEFT_OUT = "" if has_sae_lens() else " SAELens is left out: sae_lens is not installed here."


def shape_of(quick: bool) -> dict[str, int]:
    """Atoms, k and batch."""
    return (
        {name: QUICK[name] for name in ("n_atoms", "k", "batch")} if quick else dict(n_atoms=N_ATOMS, k=K, batch=BATCH)
    )


def widths_of(side: str, quick: bool) -> tuple[int, ...]:
    """The widths that a side is run at."""
    return QUICK["widths"] if quick else OWN_WIDTHS if side == OURS else WIDTHS


def steps_at(width: int, quick: bool, sides: tuple[str, ...] = (OURS, *THEIRS)) -> tuple[dict[str, Step], float]:
    """One training step of each side on writes, and the largest relative difference of their losses."""
    shape = shape_of(quick)
    batch = writes(width, shape["batch"])
    sae = dictionary(width, shape["n_atoms"], shape["k"])
    sae.calibrate_(batch)
    made = {}
    for side in sides:
        if side == OURS:
            continue
        made[side] = THEIRS[side](sae, batch.scaled(sae.input_scale).matrices())
    made = {OURS: our_step(sae, lambda: batch), **made}
    error = must_agree(f"d = {width}", {side: loss for side, (_, loss) in made.items()})
    return {side: step for side, (step, _) in made.items() if side in sides}, error


def ratios(seconds: dict[str, float]) -> Row:
    """How many times longer the others take than ours."""
    return {f"{side} / {OURS}": seconds[side] / seconds[OURS] for side in seconds if side != OURS}


def on_writes(options: Options) -> Section:
    """A training step on writes at every width that all sides are run at."""
    rows: list[Row] = []
    for width in widths_of(DENSE, options.quick):
        steps, error = steps_at(width, options.quick)
        seconds = median_seconds(steps, options.repeats, warmups=2)
        rows.append({"d_k = d_v": width, **seconds, **ratios(seconds), "largest error": error})
    shape = shape_of(options.quick)
    title = f"Seconds of a training step on {shape['batch']} writes, {shape['n_atoms']:,} atoms, k = {shape['k']}"
    return Section(title, rows, "The dense sides' matrices are ready before the clock starts." + LEFT_OUT)


def growth(options: Options) -> Section:
    """Each side's step at doubling widths."""
    rows: list[Row] = []
    for side in (OURS, *THEIRS):
        steps = {width: steps_at(width, options.quick, (side,))[0][side] for width in widths_of(side, options.quick)}
        taken = median_seconds({str(width): step for width, step in steps.items()}, options.repeats, warmups=2)
        before = None
        for width, seconds in zip(steps, taken.values(), strict=True):
            grown = None if before is None else seconds / before
            rows.append({"side": side, "d_k = d_v": width, "a step": seconds, "time / time at half the width": grown})
            before = seconds
    return Section(
        "A training step on writes at doubling widths", rows, "The widths of one side take turns." + LEFT_OUT
    )


def steps_on_states(length: int, quick: bool) -> tuple[dict[str, Step], dict[str, int], float]:
    """One step of each side on states of a passage, how many states each takes, and the relative difference of their losses."""
    shape, width = shape_of(quick), QUICK["widths"][0] if quick else STATE_WIDTH
    changes = net_writes(width, length)
    sae = dictionary(width, shape["n_atoms"], shape["k"])
    sae.calibrate_(StateSequences(*changes))
    few = min(shape["batch"], length)
    ours = float(sae.loss(StateSequences(*changes)).errors[-few:].mean())
    x = StateSequences(*changes).take(torch.arange(length - few, length)).scaled(sae.input_scale).matrices()
    dense, theirs = dense_step(sae, x)
    error = must_agree(f"the last {few} states of {length}", {OURS: ours, DENSE: theirs})
    step = our_step(sae, lambda: StateSequences(*changes))[0]
    return {OURS: step, DENSE: dense}, {OURS: length, DENSE: few}, error


def states(options: Options) -> Section:
    """A training step on states, per state."""
    rows: list[Row] = []
    for length in QUICK["lengths"] if options.quick else LENGTHS:
        steps, counts, error = steps_on_states(length, options.quick)
        taken = median_seconds(steps, options.repeats, warmups=2)
        seconds = {side: taken[side] / counts[side] for side in taken}
        row: Row = {"T": length, "a step of ours": taken[OURS], **{f"{side}, ms": seconds[side] for side in seconds}}
        peak = options.memory(f"states: {length}")["increase"]
        width = QUICK["widths"][0] if options.quick else STATE_WIDTH
        row |= {**ratios(seconds), "peak of ours, MB": peak, "all states, MB": 4 * length * width**2}
        rows.append({**row, "largest error": error})
    batch = shape_of(options.quick)["batch"]
    title = f"Milliseconds per state of a training step on states, d_k = d_v = {width}"
    return Section(title, rows, f"Ours takes all T states of a passage at once, the dense side {batch} of them.")


def state_memory(length: int, quick: bool) -> dict[str, int]:
    """Bytes that our dictionary, its optimiser and two steps on all states of a passage need, in this process."""

    def run(length: int, width: int, quick: bool) -> None:
        shape, changes = shape_of(quick), net_writes(width, length)
        sae = dictionary(width, shape["n_atoms"], shape["k"])
        sae.calibrate_(StateSequences(*changes))
        step = our_step(sae, lambda: StateSequences(*changes))[0]
        step(), step()

    width = QUICK["widths"][0] if quick else STATE_WIDTH
    return peak_increase(partial(run, 16, 8, True), partial(run, length, width, quick))


def step_memory(side: str, width: int, quick: bool) -> dict[str, int]:
    """Bytes that one side's dictionary, optimiser and two steps need, in this process."""

    def run(width: int, quick: bool) -> None:
        step = steps_at(width, quick, (side,))[0][side]
        step(), step()

    return peak_increase(partial(run, 8, True), partial(run, width, quick))


def memory(options: Options) -> Section:
    """The peak of every side at every width that it is run at, each in a fresh process."""
    rows: list[Row] = []
    own = {}
    for side in (OURS, *THEIRS):
        for width in widths_of(side, options.quick):
            taken = options.memory(f"{side}: {width}")["increase"]
            own[width] = taken if side == OURS else own[width]
            row: Row = {"side": side, "d_k = d_v": width, "peak, MB": taken}
            rows.append({**row, "peak / ours": taken / own[width] if own[width] else None})
    note = (
        "Dictionary, gradients, both moments of Adam, the batch as the side takes it, and what a step needs." + LEFT_OUT
    )
    return Section("What training adds to a process's memory", rows, note)


PARTS: dict[str, Part] = {"writes": on_writes, "growth": growth, "states": states, "memory": memory}
MEMORY = {
    f"{side}: {width}": partial(step_memory, side, width)
    for side in (OURS, *THEIRS)
    for width in {*widths_of(side, False), *QUICK["widths"]}
} | {f"states: {length}": partial(state_memory, length) for length in (*LENGTHS, *QUICK["lengths"])}


if __name__ == "__main__":
    run_parts(Path(__file__), __doc__, PARTS, MEMORY)
