"""The recurrence alone, ours against everyone else's plain-torch forms of it, on a CPU.

    python benchmarks/scan.py [--only PART]... [--repeats 5] [--threads N] [--allocator default|tuned|both] [--json PATH]

Parts, each on one layer's heads at a released model's shape, batch 1, float32:

    gdn, mamba2, rwkv7   a forward pass over the whole text, from the raw inputs to what is read
    backward             the same with the gradients of all inputs
    linear               our forward pass at doubling lengths: 2.0x per doubling is linear time
    memory               the peak memory of one forward pass, against all states [T, d_k, d_v] of all heads
    state                the question "S_t of layer l at t" put to transformer_lens and to us; see `support/state_question.py`

"ours" is `hooked_recurrent.scan.dispatch.scan` on `Factors`, native; "ours, edited" the form that it takes once writes are
edited: erase and probe free of the write in Gated DeltaNet, a second write term in the others, where a replaced write by
itself costs nothing. All sides start from the same raw inputs (`support/recurrences.py`), so normalising, scaling and
expanding are in everyone's time, as are the making and checking of `Factors` in ours. Before a clock starts all sides must
give the same numbers; the columns "error" show the largest difference from ours over the largest number. Sides run in turn,
and the numbers are medians.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from support import state_question
from support.machine import median_seconds, must_equal, peak_increase
from support.recurrences import Recurrence, Side, rule_of
from support.report import Options, Part, Row, Section, run_parts
from torch import Tensor

LENGTHS = {"gdn": (1024, 2048, 4096), "mamba2": (2048,), "rwkv7": (1024,)}
LINEAR_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
MEMORY_LENGTHS = (4096, 8192)
QUICK_LENGTHS, WARM_UP_LENGTH = (64, 128), 64
FORWARD_RATIO, BEST_RATIO, EDITED_RATIO = "theirs / ours", "best of theirs / ours", "edited / ours"


def lengths_of(lengths: tuple[int, ...], quick: bool) -> tuple[int, ...]:
    """The lengths, or tiny ones for a quick run."""
    return QUICK_LENGTHS if quick else lengths


@torch.no_grad()
def forward(name: str, options: Options) -> Section:
    """One rule's forward pass at all its lengths."""
    rule, rows = rule_of(name, options.quick), []
    for length in lengths_of(LENGTHS[name], options.quick):
        inputs = rule.inputs(length)
        sides: dict[str, Side] = {"ours": rule.ours, "ours, edited": rule.ours_edited, **rule.theirs}
        expected = rule.ours(**inputs)
        errors = [must_equal(f"{rule.name}, {side}", run(**inputs), expected) for side, run in sides.items()]
        seconds = median_seconds({side: partial(run, **inputs) for side, run in sides.items()}, options.repeats)
        rows.append({"T": length, **seconds, **ratios(seconds, rule), "largest error": max(errors)})
    return Section(f"{rule.name}, {shape_of(rule)}: seconds of a forward pass", rows, NOTES[name])


def ratios(seconds: dict[str, float], rule: Recurrence) -> Row:
    """How many times longer the others take than ours: the usual form, the best of all, and ours under edits."""
    theirs = [seconds[side] for side in rule.theirs if side in seconds]
    own = seconds["ours"]
    return {FORWARD_RATIO: theirs[0] / own, BEST_RATIO: min(theirs) / own, EDITED_RATIO: seconds["ours, edited"] / own}


NOTES = {
    "gdn": "theirs: torch_chunk_gated_delta_rule of modeling_qwen3_5, with its L2 norms.",
    "mamba2": "theirs: mamba2_chunk_scan of modeling_mamba2 at its default chunk, 256; best: whichever chunk is fastest.",
    "rwkv7": "theirs: rwkv7_recurrent of rwkv7-hf; best: also among flash-linear-attention's references, dplr/naive.py.",
}


def shape_of(rule: Recurrence) -> str:
    """Heads and their width as text."""
    heads, d_k, d_v = rule.shape
    return f"{heads} heads of {d_k} x {d_v}"


def gradients(run: Side, inputs: dict[str, Tensor], towards: Tensor) -> list[Tensor]:
    """Forward and backward: the gradients of all inputs for a fixed gradient of what is read."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    return list(torch.autograd.grad(run(**leaves), list(leaves.values()), towards))


def backward(options: Options) -> Section:
    """Forward and backward of each rule at its shortest length."""
    rows: list[Row] = []
    for name in LENGTHS:
        rule = rule_of(name, options.quick)
        length = lengths_of(LENGTHS[name], options.quick)[0]
        inputs = rule.inputs(length)
        towards = torch.randn_like(rule.inputs(length, seed=1)["x" if name == "mamba2" else "value"])
        # fla's references are no one's way to train, and their own gradients are not what is asked about here.
        theirs = {side: run for side, run in rule.theirs.items() if not side.startswith("fla")}
        sides: dict[str, Callable] = {"ours": rule.ours, "ours, edited": rule.ours_edited, **theirs}
        runs = {side: partial(gradients, run, inputs, towards) for side, run in sides.items()}
        expected, errors = runs["ours"](), []
        for side, run in runs.items():
            pairs = zip(inputs, run(), expected, strict=True)
            errors += [must_equal(f"{rule.name}, {side}, gradient of {of}", made, own) for of, made, own in pairs]
        seconds = median_seconds(runs, options.repeats)
        found = {"ours": seconds["ours"], "ours, edited": seconds["ours, edited"]}
        usual, best = next(iter(theirs)), min(theirs, key=lambda side: seconds[side])
        found |= {"theirs": seconds[usual], "best of theirs": seconds[best]}
        about = {"rule": f"{rule.name}, T = {length}", "theirs is": usual, "best is": best}
        rows.append({**about, **found, **ratios(seconds, rule), "largest error": max(errors)})
    return Section("Seconds of a forward and backward pass, gradients of all inputs", rows)


@torch.no_grad()
def linear(options: Options) -> Section:
    """Our native forward pass at doubling lengths, which take turns as sides do."""
    rows: list[Row] = []
    for name in LENGTHS:
        rule, before = rule_of(name, options.quick), None
        lengths = lengths_of(LINEAR_LENGTHS, options.quick)
        sides = {str(length): partial(rule.ours, **rule.inputs(length)) for length in lengths}
        for length, seconds in zip(lengths, median_seconds(sides, options.repeats).values(), strict=True):
            row: Row = {"rule": rule.name, "T": length, "ours": seconds, "seconds per token": seconds / length}
            row["time / time of half the length"] = None if before is None else seconds / before
            rows.append(row)
            before = seconds
    note = "Under glibc's default allocator the larger temporaries of longer texts are faulted in anew on every run."
    return Section("Our forward pass at doubling lengths", rows, note)


@torch.no_grad()
def forward_memory(name: str, side: str, length: int, quick: bool) -> dict[str, int]:
    """Bytes of one forward pass of one side, in this process."""
    rule = rule_of(name, quick)
    run = {"ours": rule.ours, "ours, edited": rule.ours_edited, **rule.theirs}[side]
    few, many = rule.inputs(WARM_UP_LENGTH), rule.inputs(length)
    return peak_increase(partial(run, **few), partial(run, **many))


@torch.no_grad()
def state_memory(way: str, quick: bool) -> dict[str, int]:
    """Bytes of asking for one state, in this process."""
    ask = state_question.WAYS[way](quick)
    few, many = (state_question.text(length) for length in (16, state_length(quick)))
    return peak_increase(partial(ask, few), partial(ask, many))


def state_length(quick: bool) -> int:
    """Tokens of the text whose last state is asked for."""
    return 64 if quick else 1024


def compared_memory(name: str) -> list[str]:
    """The sides whose memory is measured: ours, and theirs at the default and at a small chunk."""
    return {
        "gdn": ["ours", "ours, edited", "transformers"],
        "mamba2": ["ours", "ours, edited", "transformers, chunk 256", "transformers, chunk 64"],
        "rwkv7": ["ours", "ours, edited", "rwkv7-hf"],
    }[name]


def memory(options: Options) -> Section:
    """The peak of a forward pass at each length and side, each in a fresh process, against all states."""
    rows: list[Row] = []
    for name in LENGTHS:
        rule = rule_of(name, options.quick)
        lengths = {*lengths_of(MEMORY_LENGTHS, options.quick), lengths_of(LENGTHS[name], options.quick)[0]}
        for length in sorted(lengths):
            states = rule.trajectory_bytes(length)
            for side in compared_memory(name):
                taken = options.memory(f"{name}: {side}: {length}")["increase"]
                row: Row = {"rule": rule.name, "T": length, "side": side, "peak, MB": taken}
                row |= {"states of a head, MB": states // rule.shape[0], "states of all heads, MB": states}
                rows.append({**row, "peak / states of all heads": taken / states})
    note = "The peak is what one pass adds to the process: its output is counted, its inputs are not."
    return Section("Peak memory of a forward pass, beside the states [T, d_k, d_v]", rows, note)


@torch.no_grad()
def state(options: Options) -> Section:
    """Seconds and peak memory of asking for one state."""
    ways = {name: make(options.quick) for name, make in state_question.WAYS.items()}
    tokens = state_question.text(state_length(options.quick))
    answers = {name: ask(tokens) for name, ask in ways.items()}
    expected = answers["ours, all heads"]
    errors = {name: must_equal(name, made, expected[: len(made)]) for name, made in answers.items()}
    seconds = median_seconds({name: partial(ask, tokens) for name, ask in ways.items()}, options.repeats)
    rows: list[Row] = []
    for name in ways:
        row: Row = {
            "asked": name,
            "seconds": seconds[name],
            "time / ours, all heads": seconds[name] / seconds["ours, all heads"],
        }
        rows.append({**row, "peak, MB": options.memory(f"state: {name}")["increase"], "error": errors[name]})
    title = f"S_t of layer {state_question.LAYER} after {tokens.shape[1]} tokens through a four-layer hybrid"
    return Section(title, rows, "One plain pass over the text is in every row; the peak is what a question adds.")


PARTS: dict[str, Part] = {
    **{name: partial(forward, name) for name in LENGTHS},
    "backward": backward,
    "linear": linear,
    "memory": memory,
    "state": state,
}
MEMORY = {f"state: {way}": partial(state_memory, way) for way in state_question.WAYS} | {
    f"{name}: {side}: {length}": partial(forward_memory, name, side, length)
    for name in LENGTHS
    for side in compared_memory(name)
    for length in {*MEMORY_LENGTHS, *LENGTHS[name], *QUICK_LENGTHS}
}


if __name__ == "__main__":
    run_parts(Path(__file__), __doc__, PARTS, MEMORY)
