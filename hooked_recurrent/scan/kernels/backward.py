"""The scan backwards: the transposed chunk map run from the last chunk to the first, then every gradient, all chunks at once.

With g the gradient of the reads and P that of the state after a chunk, a chunk's map transposed is

    x = solver^T (carrier P + asked^T g)        P before = whole P + reader^T g + prober^T x

x is the gradient of y (of u = strength * y + value in the tied form, and thereby of the write value). `transpose` prepares
it, and the kernel that carries the state carries P. Write values then have the gradient

    injector_m P  +  queried_m^T g  +  probed_m^T x

and those of keys and decays stand in gradients.py, from the products of g and x with the values that `weigh` makes.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from hooked_recurrent.factors import Factors
from hooked_recurrent.scan.kernels.forward import carry
from hooked_recurrent.scan.kernels.gradients import reader_gradient_kernel, source_gradient_kernel
from hooked_recurrent.scan.kernels.layout import (
    Launch,
    Precision,
    Sequences,
    block_of,
    recorded,
    rows_of,
    scratch,
    terms_of,
)
from hooked_recurrent.scan.kernels.prepare import Prepared, prepare, terms_in
from hooked_recurrent.scan.kernels.tiles import (
    chunk_place,
    decays_between,
    first_row,
    load_square,
    load_tile,
    scratch_block,
    store_square,
    store_tile,
)
from hooked_recurrent.scan.kernels.variants import Case, Variant, register, variants_of


@triton.jit
@no_type_check
def transpose_kernel(
    chunks, solver, asked, carrier, upstream, solved_carrier, solved_given, heads, d_k, d_v,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """solver^T carrier and solver^T asked^T g. Grid: chunk, head."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    row, start, count = chunk_place(chunks, chunk)
    places = tl.arange(0, C)
    square = scratch_block(0, chunk, head, heads, C * C)
    solved = tl.trans(load_square(solver + square, C))
    rows = scratch_block(0, chunk, head, heads, C * d_k)
    for begin in range(0, d_k, BK):
        columns = begin + tl.arange(0, BK)
        tile = load_tile(carrier + rows, d_k, places, C, columns, d_k)
        tile = tl.dot(solved, tile, input_precision=FAST)
        store_tile(solved_carrier + rows, d_k, places, C, columns, d_k, tile)
    solved = tl.dot(solved, tl.trans(load_square(asked + square, C)), input_precision=FAST)
    first, rows = first_row(upstream, row, start, head), scratch_block(solved_given, chunk, head, heads, C * d_v)
    for begin in range(0, d_v, BV):
        columns = begin + tl.arange(0, BV)
        tile = load_tile(first, upstream[2], places, count, columns, d_v)
        tile = tl.dot(solved, tile, input_precision=FAST)
        store_tile(rows, d_v, places, C, columns, d_v, tile)


@triton.jit
@no_type_check
def weigh_kernel(
    chunks, log_decay, upstream, answer_gradient, values, read_weights, answer_weights, heads, d_v,
    STACKED: tl.constexpr, VECTOR: tl.constexpr, TERMS: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """g_t . value_j and x_t . value_j; with a scalar decay times the decay between the two. Grid: chunk, head, term."""
    chunk, head, term = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, start, count = chunk_place(chunks, chunk)
    places = tl.arange(0, C)
    first = first_row(upstream, row, start, head)
    value = first_row(values, chunk, start * 0, head) if STACKED else first_row(values, row, start, head)
    read, answer = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for begin in range(0, d_v, BV):
        columns = begin + tl.arange(0, BV)
        tile = tl.trans(load_tile(value + term * values[4], values[2], places, count, columns, d_v))
        left = load_tile(first, upstream[2], places, count, columns, d_v)
        read = tl.dot(left, tile, read, input_precision=FAST)
        if answer_gradient is not None:
            rows = scratch_block(answer_gradient, chunk, head, heads, C * d_v)
            left = load_tile(rows, d_v, places, C, columns, d_v)
            answer = tl.dot(left, tile, answer, input_precision=FAST)
    decay, square = (
        first_row(log_decay, row, start, head),
        scratch_block(0, chunk, head, heads, TERMS * C * C) + term * C * C,
    )
    if not VECTOR:
        read *= decays_between(decay, log_decay[2], places, count, False)
    store_square(read_weights + square, read, C)
    if answer_gradient is not None:
        if not VECTOR:
            answer *= decays_between(decay, log_decay[2], places, count, True)
        store_square(answer_weights + square, answer, C)


@triton.jit
@no_type_check
def value_gradient_kernel(
    chunks, upstream, answer_gradient, adjoints, injector, queried, probed, gradient, heads, d_k, d_v,
    TERMS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gradient of write values: x itself in the tied form. Grid: chunk, head, term and block of value channels."""
    chunk, head, term, block = tl.program_id(0), tl.program_id(1), tl.program_id(2) % TERMS, tl.program_id(2) // TERMS
    row, start, count = chunk_place(chunks, chunk)
    places, columns = tl.arange(0, C), block * BV + tl.arange(0, BV)
    square = scratch_block(0, chunk, head, heads, TERMS * C * C) + term * C * C
    if answer_gradient is not None:
        answers = load_tile(scratch_block(answer_gradient, chunk, head, heads, C * d_v), d_v, places, C, columns, d_v)
    if queried is None:
        total = answers
    else:
        reads = load_tile(first_row(upstream, row, start, head), upstream[2], places, count, columns, d_v)
        total = tl.dot(tl.trans(load_square(queried + square, C)), reads, input_precision=FAST)
        if probed is not None:
            total = tl.dot(tl.trans(load_square(probed + square, C)), answers, total, input_precision=FAST)
        rows = scratch_block(injector, chunk, head, heads, TERMS * C * d_k) + term * C * d_k
        adjoint = scratch_block(adjoints, chunk, head, heads, d_k * d_v)
        for begin in range(0, d_k, BK):
            channels = begin + tl.arange(0, BK)
            tile = load_tile(rows, d_k, places, C, channels, d_k)
            total = tl.dot(tile, load_tile(adjoint, d_v, channels, d_k, columns, d_v), total, input_precision=FAST)
    here = first_row(gradient, row, start, head) + term * gradient[4]
    store_tile(here, gradient[2], places, count, columns, d_v, total)


def scan_backward(
    factors: Factors,
    initial_state: Float[Tensor, "sequences_or_1 head d_k d_v"] | None,
    sequences: Sequences,
    upstream: Float[Tensor, "batch pos head d_v"],
    final_gradient: Float[Tensor, "sequences head d_k d_v"] | None,
) -> tuple[Factors, Float[Tensor, "sequences head d_k d_v"]]:
    """The gradients of a scan's inputs from those of its reads and final states; the chunks are prepared and carried again.

    Returns the gradient of every role, as Factors in the dtypes of the roles, and that of every sequence's initial state.
    """
    d_k, precision = factors.d_k, Precision.of(factors.query.dtype)
    prepared = prepare(factors, sequences, keep_prober=True)
    y, states, _ = carry(
        sequences,
        whole=prepared.whole,
        solved_prober=prepared.solved_prober,
        solved_given=prepared.solved_given,
        carrier=prepared.carrier,
        injector=prepared.injector,
        value=factors.write_value,
        initial_state=initial_state,
        d_k=d_k,
        precision=precision,
        want_final=False,
    )
    known = common_arguments(factors, sequences, prepared, upstream)
    solved_carrier, solved_given = transposed(factors, prepared, known)
    x, adjoints, initial_gradient = carry(
        sequences,
        whole=prepared.whole,
        solved_prober=solved_carrier,
        solved_given=solved_given,
        carrier=prepared.prober,
        injector=prepared.reader[:, :, None],
        value=upstream,
        initial_state=final_gradient,
        d_k=d_k,
        precision=precision,
        reverse=True,
    )
    assert initial_gradient is not None
    known |= {"states": states, "adjoints": adjoints, "answers": y, "answer_gradient": x}
    into = Gradients.empty(factors, known)
    weights = source_gradients(factors, known, into)
    reader_gradients(factors, known, into, weights)
    gradient = terms_of(into.roles["write_value"])
    start(value_gradient_kernel, known, triton.cdiv(factors.d_v, known["BV"]) * known["TERMS"], gradient=gradient)
    return into.total(factors), initial_gradient


def backward_chunk_size(factors: Factors) -> int:
    """Positions per chunk: float32 takes three products for one, and has no registers for those of more than 32 positions."""
    if factors.vector_decay:
        return 16
    return 32 if factors.query.dtype == torch.float32 or factors.d_k > 128 else 64


def common_arguments(factors: Factors, sequences: Sequences, prepared: Prepared, upstream: Tensor) -> dict[str, Any]:
    """What the kernels call alike, by name."""
    names = ("solver", "asked", "carrier", "injector", "queried", "probed")
    key_block = block_of(factors.d_k, 32)
    return {name: getattr(prepared, name) for name in names} | {
        "chunks": sequences.chunks,
        "log_decay": rows_of(factors.log_decay),
        "query": rows_of(factors.query),
        "probe": rows_of(factors.probe if factors.erase_strength is None else factors.write_key),
        "strength": rows_of(factors.erase_strength),
        "upstream": rows_of(upstream),
        "heads": factors.query.shape[2],
        "d_k": factors.d_k,
        "d_v": factors.d_v,
        "VECTOR": factors.vector_decay,
        "TERMS": terms_in(factors),
        "C": sequences.size,
        "BK": key_block,
        "BV": block_of(factors.d_v, 32),
        "FAST": Precision.of(factors.query.dtype).fast,
        "blocks": triton.cdiv(factors.d_k, key_block),
    }


def start(kernel: Any, known: dict[str, Any], across: int = 1, **arguments: Any) -> None:
    """Run a kernel for every chunk and head, and `across` what else; it takes from `known` what `arguments` leave out."""
    known = {**known, **arguments}
    taken = {name: known[name] for name in inspect.signature(kernel.fn).parameters}
    Launch(kernel, (len(known["chunks"]), known["heads"], across), taken).run()


def transposed(factors: Factors, prepared: Prepared, known: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """What takes the place of `solved_prober` and `solved_given` on the way back; None where nothing is erased."""
    if prepared.carrier is None or prepared.solved_given is None:
        return None, None
    carrier = scratch(*prepared.carrier.shape, like=factors.query)
    given = scratch(*prepared.solved_given.shape, like=factors.query)
    start(transpose_kernel, known, solved_carrier=carrier, solved_given=given)
    return carrier, given


@dataclass(frozen=True)
class Gradients:
    """Where the kernels leave gradients. Those that several launches or blocks add to are in parts, whose sum they are."""

    roles: dict[str, Tensor]
    decay: Float[Tensor, "part batch pos head *d_k"]
    decay_of: dict[str, Tensor]
    """The parts of `decay` that paths to each reader, or from each source to the state after, go to."""
    strength: Float[Tensor, "block batch pos head"] | None

    @classmethod
    def empty(cls, factors: Factors, known: dict[str, Any]) -> "Gradients":
        """Nothing yet."""
        present = {name: role for name, role in vars(factors).items() if role is not None}
        strength, decay, like = present.pop("erase_strength", None), present.pop("log_decay"), factors.query
        roles = {name: scratch(*role.shape, like=like, dtype=role.dtype) for name, role in present.items()}
        if strength is not None:
            roles["write_key"] = scratch(*factors.write_key.shape, like=like)  # two launches add up in it
            strength = scratch(known["blocks"], *strength.shape, like=like)
        counts = {"write_key": known["TERMS"], "query": 1}
        counts |= {"probe": 1} if factors.erases else {}
        counts |= {"erase": 1} if factors.erase is not None else {}
        counts = {name: count * (1 if factors.vector_decay else known["blocks"]) for name, count in counts.items()}
        parts = scratch(sum(counts.values()), *decay.shape, like=like)
        return cls(roles, parts, dict(zip(counts, parts.split(list(counts.values())), strict=True)), strength)

    def total(self, factors: Factors) -> Factors:
        """The gradients in the dtypes of the factors."""
        roles = {**self.roles, "log_decay": self.decay.sum(0)}
        if self.strength is not None:
            roles["erase_strength"] = self.strength.sum(0)
        return Factors(**{name: gradient.to(getattr(factors, name).dtype) for name, gradient in roles.items()})


def parts_of(parts: Tensor | None) -> tuple[Tensor, int, int, int, int] | None:
    """[part, batch, pos, head, ...] as kernels take it, with the stride of parts at the end."""
    return None if parts is None else (parts, *parts.stride()[1:4], parts.stride(0))


def stacked(rows: Float[Tensor, "chunk head place d_v"]) -> tuple[Tensor, int, int, int, int]:
    """Rows of scratch as kernels take rows of input, a chunk in the place of a batch row."""
    return rows, rows.stride(0), rows.stride(2), rows.stride(1), 0


Weights = dict[str, dict[str, Tensor | None]]
"""Per source, what `weigh` makes of the gradients of reads and of answers."""


def source_gradients(factors: Factors, known: dict[str, Any], into: Gradients) -> Weights:
    """Gradients of the write keys, and of the erase where it is not one of them."""
    tied, found = factors.erase_strength is not None, {}
    for name in ["write_key"] if factors.erase is None else ["write_key", "erase"]:
        source, in_scratch = getattr(factors, name), tied or name == "erase"
        terms = known["TERMS"] if name == "write_key" else 1
        square = (len(known["chunks"]), known["heads"], terms, known["C"], known["C"])
        answer = scratch(*square, like=factors.query) if factors.erases else None
        found[name] = {"read_weights": scratch(*square, like=factors.query), "answer_weights": answer}
        values = stacked(known["answers"]) if in_scratch else terms_of(factors.write_value)
        shared = {"values": values, "STACKED": in_scratch, "TERMS": terms, **found[name]}
        start(weigh_kernel, known, terms, **shared)
        shared |= {"sources": terms_of(source), "gradient": terms_of(into.roles[name])}
        start(
            source_gradient_kernel, known, known["blocks"] * terms, decay_parts=parts_of(into.decay_of[name]), **shared
        )
    return found


def reader_gradients(factors: Factors, known: dict[str, Any], into: Gradients, weights: Weights) -> None:
    """Gradients of the query and of the probe; a tied rule's probe is its write key, which has a part as a source already."""
    tied = factors.erase_strength is not None
    erase = None if factors.erase is None else terms_of(factors.erase)
    for name in ["query", "probe"] if factors.erases else ["query"]:
        probing, kind = name == "probe", "answer_weights" if name == "probe" else "read_weights"
        start(
            reader_gradient_kernel,
            known,
            known["blocks"],
            readers=known[name],
            strength=known["strength"] if probing else None,
            upstream=stacked(known["answer_gradient"]) if probing else known["upstream"],
            adjoints=None if probing else known["adjoints"],
            erase=erase,
            erase_weights=weights["erase"][kind] if erase is not None else None,
            keys=terms_of(factors.write_key),
            key_weights=weights["write_key"][kind],
            gradient=terms_of(into.roles["write_key" if probing and tied else name]),
            strength_parts=parts_of(into.strength) if probing else None,
            decay_parts=parts_of(into.decay_of[name]),
            STACKED=probing,
            EXCLUSIVE=probing,
        )


@register
def variants(case: Case) -> Iterator[Variant]:
    """What `scan_backward` launches for a case."""
    factors, device = case.factors(), torch.device("meta")
    batch, length, heads = factors.query.shape[:3]
    state, upstream = (
        torch.empty(batch, *shape, device=device) for shape in ((heads, case.d_k, case.d_v), (length, heads, case.d_v))
    )
    sequences = Sequences.of_batch(batch, length, backward_chunk_size(factors), device)
    with recorded(case.backend) as launches:
        scan_backward(factors, state, sequences, upstream, state)
    for launch in launches:
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        yield from variants_of("scan backward", launch.kernel, launch.arguments, case, **options)
