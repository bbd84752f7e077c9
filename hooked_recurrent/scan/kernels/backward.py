"""The scan backwards: the transposed chunk map run from the last chunk to the first, then every gradient, all chunks at once.

With g the gradient of the reads and P that of the state after a chunk, a chunk's map transposed is

    x = solver^T (carrier P + asked^T g)        P before = whole P + reader^T g + prober^T x

x is the gradient of y (of u = strength * y + value in the tied form, and thereby of the write value). `transpose` prepares it, and the
kernel that carries the state carries P. Write values then have the gradient

    injector_m P  +  queried_m^T g  +  probed_m^T x

and those of keys and decays stand in gradients.py, from the products of g and x with the values that `weigh` makes.
"""

import inspect
import os
from collections.abc import Mapping
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
    backend_of,
    block_of,
    rows_of,
    run,
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
    if not VECTOR:
        inclusive, exclusive = decays_between(first_row(log_decay, row, start, head), log_decay[2], places, count)
        read, answer = read * inclusive, answer * exclusive
    square = scratch_block(0, chunk, head, heads, TERMS * C * C) + term * C * C
    store_square(read_weights + square, read, C)
    if answer_gradient is not None:
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
    d_k, like = factors.d_k, factors.query
    precision = Precision.of(like.dtype, backend_of(like.device))
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
    known = common_arguments(factors, sequences, prepared, upstream, precision)
    if factors.erases:
        known["solved_carrier"] = scratch(*prepared.carrier.shape, like=like)
        known["solved_given"] = scratch(*y.shape, like=like)
        run([launch(transpose_kernel, known)])
    x, adjoints, initial_gradient = carry(
        sequences,
        whole=prepared.whole,
        solved_prober=known.get("solved_carrier"),
        solved_given=known.get("solved_given"),
        carrier=prepared.prober,
        injector=prepared.reader[:, :, None],
        value=upstream,
        initial_state=final_gradient,
        d_k=d_k,
        precision=precision,
        reverse=True,
    )
    known |= {"states": states, "adjoints": adjoints, "answers": y, "answer_gradient": x}
    launches, gradients = gradient_launches(factors, known)
    run(launches)
    return gradients.total(factors), initial_gradient


def common_arguments(
    factors: Factors, sequences: Sequences, prepared: Prepared, upstream: Tensor, precision: Precision
) -> dict[str, Any]:
    """What the kernels call alike, by name."""
    names = ("solver", "asked", "carrier", "injector", "queried", "probed")
    return {name: getattr(prepared, name) for name in names} | {
        "chunks": sequences.chunks,
        "log_decay": rows_of(factors.log_decay),
        "query": rows_of(factors.query),
        "strength": rows_of(factors.erase_strength),
        "upstream": rows_of(upstream),
        "heads": factors.query.shape[2],
        "d_k": factors.d_k,
        "d_v": factors.d_v,
        "VECTOR": factors.vector_decay,
        "TERMS": terms_in(factors),
        "C": sequences.size,
        "BK": block_of(factors.d_k, int(os.environ.get("BK", 64))),
        "BV": block_of(factors.d_v, int(os.environ.get("BV", 64))),
        "FAST": precision.fast,
    }


def launch(kernel: Any, known: Mapping[str, Any], across: int = 1, **arguments: Any) -> Launch:
    """A kernel for every chunk and head, and `across` what else; it takes from `known` what `arguments` leave out."""
    known = {**known, **arguments}
    taken = {name: known[name] for name in inspect.signature(kernel.fn).parameters}
    return Launch(kernel, (len(known["chunks"]), known["heads"], across), taken, num_warps=int(os.environ.get("WARPS", 4)))


@dataclass(frozen=True)
class Gradients:
    """Where the kernels leave gradients. Those that several launches or blocks add to are in parts, whose sum they are."""

    roles: dict[str, Tensor]
    decay_parts: Float[Tensor, "part batch pos head *d_k"]
    strength_parts: Float[Tensor, "part batch pos head"] | None

    @classmethod
    def empty(cls, factors: Factors, blocks: int) -> "Gradients":
        """Nothing yet, for launches over so many blocks of key channels."""
        dtypes = {name: tensor.dtype for name, tensor in vars(factors).items() if tensor is not None}
        tied = factors.erase_strength is not None
        if tied:
            dtypes["write_key"] = torch.float32  # two launches add up in it
        roles = {
            name: scratch(*getattr(factors, name).shape, like=factors.query, dtype=dtype)
            for name, dtype in dtypes.items()
            if name not in ("log_decay", "erase_strength")
        }
        launches = 4 if factors.erase is not None else 3 if tied else 2
        parts = launches if factors.vector_decay else launches * blocks
        decay = scratch(parts, *factors.log_decay.shape, like=factors.query)
        strength = scratch(blocks, *factors.erase_strength.shape, like=factors.query) if tied else None
        return cls(roles, decay, strength)

    def total(self, factors: Factors) -> Factors:
        """The gradients in the dtypes of the factors."""
        roles = {**self.roles, "log_decay": self.decay_parts.sum(0)}
        if self.strength_parts is not None:
            roles["erase_strength"] = self.strength_parts.sum(0)
        return Factors(**{name: gradient.to(getattr(factors, name).dtype) for name, gradient in roles.items()})


def empty_weights(factors: Factors, known: dict[str, Any], terms: int) -> dict[str, Tensor | None]:
    """Where `weigh` leaves the products of the gradients of reads, and of answers, with the values of a source."""
    shape = (len(known["chunks"]), known["heads"], terms, known["C"], known["C"])
    names = {"read_weights": True, "answer_weights": factors.erases}
    return {name: scratch(*shape, like=factors.query) if used else None for name, used in names.items()}


def in_parts(parts: Tensor | None) -> tuple[Tensor, int, int, int, int] | None:
    """[part, batch, pos, head, ...] as kernels take it, with the stride of parts at the end."""
    return None if parts is None else (parts, *parts.stride()[1:4], parts.stride(0))


def gradient_launches(factors: Factors, known: dict[str, Any]) -> tuple[list[Launch], Gradients]:
    """The launches that take every gradient, in order, and where they leave them."""
    tied, decoupled = factors.erase_strength is not None, factors.erase is not None
    blocks = triton.cdiv(known["d_k"], known["BK"])
    into = Gradients.empty(factors, blocks)
    parts = iter(into.decay_parts.split(1 if factors.vector_decay else blocks))

    def outputs(name: str) -> dict[str, Any]:
        part = next(parts)
        return {"gradient": terms_of(into.roles[name]), "decay_parts": in_parts(part)}

    # Rows of scratch as kernels take rows of input: a chunk in the place of a batch row.
    stride = (known["heads"] * known["C"] * known["d_v"], known["d_v"], known["C"] * known["d_v"], 0)
    answers, answer_gradient = (known["answers"], *stride), (known["answer_gradient"], *stride)

    # 1. from sources: the write keys, and the erase where it is not one of them
    values = {"write_key": answers if tied else terms_of(factors.write_value)} | ({"erase": answers} if decoupled else {})
    probe = rows_of(factors.write_key if tied else factors.probe)
    launches, weights = [], {}
    for name, value in values.items():
        weights[name] = empty_weights(factors, known, known["TERMS"] if name == "write_key" else 1)
        shared = {"values": value, "STACKED": value is answers, "TERMS": weights[name]["read_weights"].shape[2]}
        launches.append(launch(weigh_kernel, known, shared["TERMS"], **shared, **weights[name]))
        shared |= {"sources": terms_of(getattr(factors, name)), "probe": probe, **outputs(name)}
        launches.append(launch(source_gradient_kernel, known, blocks, **shared, **weights[name]))

    # 2. from readers: the query, and the probe (of a tied rule: the key's part as probe, after its part as source)
    sources = {"keys": terms_of(factors.write_key), "erase": terms_of(factors.erase) if decoupled else None}
    for reader in ["query", "probe"] if factors.erases else ["query"]:
        probing = reader == "probe"
        kind = "answer_weights" if probing else "read_weights"
        shared = {"key_weights": weights["write_key"][kind], "erase_weights": weights.get("erase", {}).get(kind)}
        shared |= {"STACKED": probing, "EXCLUSIVE": probing, **sources}
        if probing:
            shared |= {"upstream": answer_gradient, "adjoints": None, "strength_parts": in_parts(into.strength_parts)}
        else:
            shared |= {"strength": None, "strength_parts": None}
        shared |= outputs("write_key" if probing and tied else reader)
        readers = probe if probing else known["query"]
        launches.append(launch(reader_gradient_kernel, known, blocks, readers=readers, **shared))

    # 3. of write values
    across = triton.cdiv(known["d_v"], known["BV"]) * known["TERMS"]
    gradient = terms_of(into.roles["write_value"])
    launches.append(launch(value_gradient_kernel, known, across, gradient=gradient))
    return launches, into
