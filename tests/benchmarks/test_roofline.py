"""The counts behind the roofline: bytes by hand for a small chunk, products by torch's own counter as a chunk is computed."""

import pytest
import roofline
import torch
from support.traffic import Kernel, Shape, backward, forward, least_bytes, solver_products, step
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hooked_recurrent.scan.kernels.variants import Case
from hooked_recurrent.scan.step import step_scan
from tests.hooked_recurrent.models import distance, random_factors, random_state

C, D_K, D_V = 16, 6, 10


def shape(form, *, vector_decay=False, chunk=C, d_k=D_K, d_v=D_V, heads=1):
    return Shape("small", form, vector_decay, heads, d_k, d_v, chunk)


def by_name(kernels):
    return {kernel.name: kernel for kernel in kernels}


def test_bytes_and_products_of_a_tied_chunk_by_hand():
    """Two positions, d_k = 3, d_v = 5: key rows 12 bytes as input and 24 as scratch, value rows 20 and 40, squares 16."""
    assert forward(shape("tied", chunk=2, d_k=3, d_v=5)) == [
        Kernel("grams", 8 + 12 + 12 + 8, 16 + 16, 2 * 2 * (2 * 2 * 3)),  # decay, key, query, strength
        Kernel("solver", 16, 16, 0),
        Kernel("key rows", 8 + 12 + 12 + 8 + 16, 4 + 24 + 24 + 24, 2 * (2 * 2 * 3)),
        Kernel("value rows", 20 + 16, 40, 2 * (2 * 2 * 5)),
        Kernel("carry", 4 + 24 + 40 + 24, 60 + 40, 2 * 2 * (2 * 3 * 5)),
        Kernel("read", 24 + 60 + 16 + 40, 40, 2 * (2 * 3 * 5) + 2 * (2 * 2 * 5)),
    ]


def test_bytes_of_a_decode_step_by_hand():
    """State in and out, decay (a row of it where it is a vector), keys and queries of 2 bytes, values, and the float32 read."""
    tied, plain, decoupled = (shape(form, d_k=3, d_v=5) for form in ("tied", "plain", "decoupled"))
    assert step(tied) == [Kernel("step", 60 + 4 + 6 + 10 + 6 + 4, 60 + 20, 0, 7 * 15)]
    assert step(plain) == [Kernel("step", 60 + 4 + 6 + 10 + 6, 60 + 20, 0, 5 * 15)]
    assert step(decoupled) == [Kernel("step", 60 + 4 + 6 + 10 + 6 + 6 + 6, 60 + 20, 0, 9 * 15)]
    assert step(shape("plain", vector_decay=True, d_k=3, d_v=5))[0].loaded == 60 + 12 + 6 + 10 + 6
    assert least_bytes(shape("plain", chunk=2, d_k=3, d_v=5), gradients=False) == 8 + 12 + 20 + 12 + 40
    assert least_bytes(shape("plain", chunk=2, d_k=3, d_v=5), gradients=True) == 2 * (8 + 12 + 20 + 12) + 40


def chunk_of(form):
    """One chunk: its factors [pos, ...] of one head without batch, and the state before it."""
    erase = {"plain": "none"}.get(form, form)
    factors = random_factors(C, batch=1, heads=1, d_k=D_K, d_v=D_V, erase=erase)
    return factors, random_state(factors)


def run_forward(factors, state):
    """The products that the kernels make for a chunk with scalar decay; returns the read and the state after it."""
    one = {name: None if tensor is None else tensor[0, :, 0] for name, tensor in vars(factors).items()}
    upto = one["log_decay"].cumsum(0)
    before, last = upto - one["log_decay"], upto[-1]
    exclusive = (before[:, None] - upto).exp().tril(-1)
    inclusive = (upto[:, None] - upto).exp().tril()
    query, key, value, s = one["query"], one["write_key"], one["write_value"], state[0, 0]
    reader, onward = query * upto.exp()[:, None], (last - upto).exp()[:, None]
    read, after = reader @ s, last.exp() * s
    tied = one["erase_strength"] is not None
    if not tied:
        read = read + (inclusive * (query @ key.T)) @ value
        after = after + (onward * key).T @ value
    if tied or one["erase"] is not None:
        erase, probe = (key, key) if tied else (one["erase"], one["probe"])
        scale = one["erase_strength"][:, None] if tied else 1.0
        solver = torch.linalg.inv(torch.eye(C, dtype=s.dtype) - scale * exclusive * (probe @ erase.T))
        given = value if tied else (exclusive * (probe @ key.T)) @ value
        y = solver @ given + (solver @ (scale * probe * before.exp()[:, None])) @ s
        read = read + (inclusive * (query @ erase.T)) @ y
        after = after + (onward * erase).T @ y
    return read, after


@pytest.mark.parametrize("form", ["plain", "tied", "decoupled"])
def test_forward_products_are_those_of_a_chunk(form):
    factors, state = chunk_of(form)
    with FlopCounterMode(display=False) as counter:
        read, after = run_forward(factors, state)
    expected_read, expected_state = step_scan(factors, state)
    assert distance(read, expected_read[0, :, 0]) < 1e-10 and distance(after, expected_state[0, 0]) < 1e-10
    counted = sum(kernel.products for kernel in forward(shape(form)))
    assert counted - (solver_products(C) if form != "plain" else 0) == counter.get_total_flops()


def run_backward(form, query, key, value, s, g, adjoint, strength):
    """The products of the gradient kernels where nothing decays; returns the gradients of query, write key and write value."""
    ones = torch.ones(C, C, dtype=s.dtype)
    if form == "plain":
        adjoint_before = query.T @ g + adjoint
        read_weights = (g @ value.T).tril()
        d_query = g @ s.T + read_weights @ key
        d_key = value @ adjoint.T + read_weights.T @ query
        d_value = (query @ key.T).tril().T @ g + key @ adjoint
        _ = (
            query @ key.T,
            ones @ ones,
        )  # of the query kernel, for the decay's gradient; the square of the grams is theirs
        return d_query, d_key, d_value, adjoint_before
    solver = torch.linalg.inv(torch.eye(C, dtype=s.dtype) - strength * (key @ key.T).tril(-1))
    asked, prober = (query @ key.T).tril(), strength * key
    u = solver @ value + (solver @ prober) @ s
    solved_carrier, solved_asked = solver.T @ key, solver.T @ asked.T
    x = solved_asked @ g + solved_carrier @ adjoint
    adjoint_before = adjoint + query.T @ g + prober.T @ x
    read_weights, answer_weights = (g @ u.T).tril(), (x @ u.T).tril(-1)
    d_query = g @ s.T + read_weights @ key
    d_key = u @ adjoint.T + read_weights.T @ query + answer_weights.T @ prober
    d_key = d_key + strength * (x @ s.T + answer_weights @ key)
    _ = query @ key.T, ones @ ones, key @ key.T, ones @ ones  # of the query and probe kernels, for the decay's gradient
    return d_query, d_key, x, adjoint_before


@pytest.mark.parametrize("form", ["plain", "tied"])
def test_backward_products_are_those_of_a_chunk(form):
    """Without decay, so that the gradients are short to write; kernels make the same products whatever decays."""
    factors, state = chunk_of(form)
    factors = type(factors)(**{**vars(factors), "log_decay": torch.zeros_like(factors.log_decay)})
    leaves = [factors.query, factors.write_key, factors.write_value, state]
    for leaf in leaves:
        leaf.requires_grad_()
    g, adjoint = torch.randn(C, D_V, dtype=torch.float64), torch.randn(D_K, D_V, dtype=torch.float64)
    read, after = step_scan(factors, state)
    expected = torch.autograd.grad((read[0, :, 0] * g).sum() + (after[0, 0] * adjoint).sum(), leaves)
    query, key, value = (leaf.detach()[0, :, 0] for leaf in leaves[:3])
    strength = None if form == "plain" else factors.erase_strength[0, :, 0, None]
    with FlopCounterMode(display=False) as counter:
        found = run_backward(form, query, key, value, state.detach()[0, 0], g, adjoint, strength)
    for got, gradient in zip(found, expected, strict=True):
        assert distance(got, gradient.reshape(got.shape)) < 1e-10
    kernels = by_name(backward(shape(form)))
    counted = sum(kernel.products for kernel in kernels.values())
    counted -= kernels["carry"].products // (1 if form == "plain" else 2)  # S_C is not needed for what stands above
    counted -= solver_products(C) if form != "plain" else 0
    assert counted == counter.get_total_flops()


@pytest.mark.parametrize("chunk", [2, 8, 16, 32, 64])
def test_solver_products_are_those_of_the_inverse_by_doubling(chunk):
    matrix = torch.randn(chunk, chunk, dtype=torch.float64).tril(-1) / chunk

    def inverse(part: Tensor) -> Tensor:
        apart = torch.arange(len(part))[:, None] ^ torch.arange(len(part))[None, :]
        found, width = torch.where(apart == 0, 1.0, torch.where(apart == 1, part, 0.0)), 2
        while width < len(part):
            couples = torch.where((apart >= width) & (apart < 2 * width), part, 0.0)
            found, width = found + found @ couples @ found, 2 * width
        return found

    with FlopCounterMode(display=False) as counter:
        if chunk <= 32:
            found = inverse(matrix)
        else:
            early, late = inverse(matrix[:32, :32]), inverse(matrix[32:, 32:])
            found = torch.cat([torch.cat([early, 0 * early], 1), torch.cat([late @ matrix[32:, :32] @ early, late], 1)])
    assert (
        distance(found @ (torch.eye(chunk, dtype=matrix.dtype) - matrix), torch.eye(chunk, dtype=matrix.dtype)) < 1e-12
    )
    assert solver_products(chunk) == counter.get_total_flops()


def test_a_vector_decay_moves_its_gram_matrices_off_the_matrix_units():
    scalar, vector = (by_name(forward(shape("decoupled", vector_decay=each))) for each in (False, True))
    assert scalar["grams"].products == 2 * 4 * C * C * D_K and scalar["grams"].other == 0
    assert vector["grams"].products == 0 and vector["grams"].other == 5 * 4 * C * C * D_K
    assert vector["grams"].loaded - scalar["grams"].loaded == 4 * C * (D_K - 1)
    assert vector["carry"].products == scalar["carry"].products


def test_what_binds():
    memory = Kernel("m", int(roofline.BANDWIDTH), 0, 10, 10)
    assert roofline.kernel_time(memory, 1e15) == (1.0, "memory")
    assert roofline.kernel_time(Kernel("p", 8, 8, 10**15), 1e15) == (1.0, "matrix products")
    assert roofline.kernel_time(Kernel("o", 8, 8, 10, int(2 * roofline.OTHER)), 1e15) == (2.0, "other operations")
    need = roofline.floor([memory, Kernel("p", 0, 0, 3 * 10**15)], shape("plain", heads=2), tokens=4, peak=1e15)
    assert (need.seconds, need.bound) == (2.0, "matrix products")
    assert need.bytes == 2 * int(roofline.BANDWIDTH) / 4 and need.operations == (20 + 3 * 10**15) / 2


def test_the_page_says_that_nothing_was_measured(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    monkeypatch.setattr("sys.argv", ["roofline.py", "--markdown", str(page)])
    roofline.main()
    text = page.read_text()
    assert text.index("not measured: no GPU was used") < text.index("| model |")
    for one in roofline.SHAPES:
        assert text.count(f"| {one.model} | {roofline.size(one)} |") == 3


def test_the_stored_page_is_current():
    stored = roofline.Path(roofline.__file__).parent / "results/roofline.md"
    assert stored.read_text() == roofline.page("tf32")


@pytest.mark.parametrize(("rule", "number"), [("gated delta", 0), ("mamba2", 3), ("rwkv7", 5)])
def test_bytes_are_near_those_of_what_launches_are_given(rule, number):
    """Launches also name tensors that they do not read, and one that is changed in place is named once, hence the margin."""
    launching = pytest.importorskip("hooked_recurrent.scan.kernels.backward")
    from hooked_recurrent.scan.kernels.forward import scan_chunks
    from hooked_recurrent.scan.kernels.layout import Sequences, recorded

    layer = roofline.SHAPES[number]
    factors = Case(rule, layer.d_k, layer.d_v, "bfloat16", "cuda").factors(1024, batch=1, heads=2)
    sequences = Sequences.of_batch(1, 1024, layer.chunk, factors.query.device)
    for counted in (forward(layer), backward(layer)):
        with recorded("cuda") as launches:
            if counted == forward(layer):
                scan_chunks(factors, sequences, None)
            else:
                upstream = torch.empty(1, 1024, 2, layer.d_v, device="meta")
                launching.scan_backward(factors, None, sequences, upstream, None)
        named = 0
        for launch in launches:
            given = (value if isinstance(value, tuple) else (value,) for value in launch.arguments.values())
            tensors = {id(one): one for values in given for one in values if isinstance(one, Tensor)}
            named += sum(one.numel() * one.element_size() for one in tensors.values() if one.is_floating_point())
        chunks = 2 * 1024 // layer.chunk
        assert named / chunks == pytest.approx(sum(kernel.loaded + kernel.stored for kernel in counted), rel=0.05)
