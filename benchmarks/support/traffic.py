"""What the chunk kernels and the decode step move and compute, counted per chunk (or token) and head, not measured.

Every array that a kernel loads or stores counts once: where several programs load the same rows, the later loads are taken to
find them in the cache. Products are counted as the kernels make them, whole [C, C] squares where half is zero, two operations
for each multiplication with its addition. With a decay per key channel a Gram matrix is no product of matrices: it costs five
operations (a difference, an exponential, two multiplications, an addition) for each of its entries and key channels, outside
the matrix units. Row-wise work (scaling, cumulative sums, masks) is left out, and so are the states at a sequence's ends.
"""

from dataclasses import dataclass

PER_CHANNEL = 5
"""Operations per entry of a Gram matrix and key channel, where every channel decays by itself."""
SOLVER_BLOCK = 32
"""The largest block that the inverse is found on at once; two of them are then coupled."""


@dataclass(frozen=True)
class Shape:
    """One layer of a model, as the scan sees it."""

    model: str
    form: str
    """"tied" (erase_strength), "decoupled" (erase and probe of their own) or "plain" (nothing is erased)."""
    vector_decay: bool
    heads: int
    d_k: int
    d_v: int
    chunk: int
    input_bytes: int = 2
    """Per number of keys, values, queries, erases and probes and of their gradients; all else is float32."""

    @property
    def erases(self) -> bool:
        """Whether the rule removes anything."""
        return self.form != "plain"


@dataclass(frozen=True)
class Kernel:
    """One launch, per chunk and head (of the decode step: per token and head)."""

    name: str
    loaded: int
    """Bytes."""
    stored: int
    products: int
    """Operations in matrix products."""
    other: int = 0
    """Operations outside the matrix units."""


def arrays(shape: Shape) -> dict[str, int]:
    """Bytes of every array, per chunk and head."""
    c, d_k, d_v, narrow = shape.chunk, shape.d_k, shape.d_v, shape.input_bytes
    decay = 4 * c * (d_k if shape.vector_decay else 1)
    key_rows, value_rows, square = 4 * c * d_k, 4 * c * d_v, 4 * c * c
    keys = ("write_key", "query", "erase", "probe")
    sizes = dict.fromkeys([*keys, *(f"d_{name}" for name in keys)], narrow * c * d_k)
    sizes |= dict.fromkeys(["write_value", "d_write_value"], narrow * c * d_v)
    sizes |= dict.fromkeys(["log_decay", "d_log_decay", "decay_part"], decay)
    sizes |= dict.fromkeys(["strength", "d_strength"], 4 * c)
    sizes |= dict.fromkeys(["solver", "asked", "probed", "queried", "read_weights", "answer_weights"], square)
    sizes |= dict.fromkeys(["erase_read_weights", "erase_answer_weights"], square)
    sizes |= dict.fromkeys(
        ["reader", "carrier", "injector", "prober", "solved_prober", "solved_carrier", "d_key_sum"], key_rows
    )
    sizes |= dict.fromkeys(["solved_given", "solved_upstream", "y", "x", "read", "upstream"], value_rows)
    return sizes | {"whole": decay // c, "states": 4 * d_k * d_v, "adjoints": 4 * d_k * d_v}


def launch(shape: Shape, name: str, loads: list[str], stores: list[str], products: int = 0, other: int = 0) -> Kernel:
    """A kernel from the names of what it loads and stores."""
    sizes = arrays(shape)
    return Kernel(name, sum(sizes[one] for one in loads), sum(sizes[one] for one in stores), products, other)


def only(used: bool, *names: str) -> list[str]:
    """The names where they are used."""
    return list(names) if used else []


def inputs(shape: Shape) -> list[str]:
    """The roles that a form has."""
    common = ["log_decay", "write_key", "write_value", "query"]
    return common + only(shape.form == "decoupled", "erase", "probe") + only(shape.form == "tied", "strength")


def gram_cost(shape: Shape, count: int) -> dict[str, int]:
    """Operations of so many Gram matrices of keys."""
    entries = shape.chunk**2 * shape.d_k * count
    return {"other": PER_CHANNEL * entries} if shape.vector_decay else {"products": 2 * entries}


def solver_products(chunk: int) -> int:
    """Operations of the inverse: two products for each doubling above 2, in blocks, and two that couple a pair of blocks."""
    block = min(chunk, SOLVER_BLOCK)
    doublings = max(0, block.bit_length() - 2)
    return chunk // block * doublings * 2 * 2 * block**3 + (2 * 2 * block**3 if chunk > block else 0)


def prepared(shape: Shape, *, keep_prober: bool) -> list[Kernel]:
    """The kernels that prepare every chunk; the backward pass keeps the prober too."""
    tied, decoupled, erases = shape.form == "tied", shape.form == "decoupled", shape.erases
    square, c = shape.chunk**2, shape.chunk
    keys = ["log_decay", "write_key", "query", *only(decoupled, "erase", "probe"), *only(tied, "strength")]
    squares = only(erases, "solver", "asked") + only(decoupled, "probed") + only(not tied, "queried")
    rows = ["whole", "reader", *only(not tied, "injector"), *only(erases, "carrier", "solved_prober")]
    rows += only(erases and keep_prober, "prober")
    kernels = [launch(shape, "grams", keys, squares, **gram_cost(shape, len(squares)))]
    if erases:
        kernels.append(launch(shape, "solver", ["solver"], ["solver"], solver_products(c)))
    cost = 2 * square * shape.d_k if erases else 0
    kernels.append(launch(shape, "key rows", keys + only(erases, "solver"), rows, cost))
    if erases:
        loads = ["write_value", "solver", *only(decoupled, "probed")]
        kernels.append(launch(shape, "value rows", loads, ["solved_given"], 2 * square * shape.d_v * (1 + decoupled)))
    return kernels


def carried(shape: Shape) -> Kernel:
    """The kernel that takes the state through the chunks."""
    tied, erases = shape.form == "tied", shape.erases
    loads = [
        "whole",
        *only(erases, "solved_prober", "solved_given", "carrier"),
        *only(not tied, "injector", "write_value"),
    ]
    through = 2 * shape.chunk * shape.d_k * shape.d_v
    return launch(shape, "carry", loads, ["states", *only(erases, "y")], through * (2 * erases + (not tied)))


def forward(shape: Shape) -> list[Kernel]:
    """The launches of a forward scan."""
    tied, erases = shape.form == "tied", shape.erases
    loads = ["reader", "states", *only(erases, "asked", "y"), *only(not tied, "queried", "write_value")]
    inside = 2 * shape.chunk**2 * shape.d_v * (erases + (not tied))
    reads = launch(shape, "read", loads, ["read"], 2 * shape.chunk * shape.d_k * shape.d_v + inside)
    return [*prepared(shape, keep_prober=False), carried(shape), reads]


def backward(shape: Shape) -> list[Kernel]:
    """The launches of a backward scan, which prepares and carries the chunks again."""
    erases, c = shape.erases, shape.chunk
    through, square_k, square_v = 2 * c * shape.d_k * shape.d_v, 2 * c**2 * shape.d_k, 2 * c**2 * shape.d_v
    kernels = [*prepared(shape, keep_prober=True), carried(shape)]
    if erases:
        loads = ["solver", "asked", "carrier", "upstream"]
        stores = ["solved_carrier", "solved_upstream"]
        kernels.append(launch(shape, "transpose", loads, stores, square_k + 2 * c**3 + square_v))
    loads = ["whole", "reader", "upstream", *only(erases, "solved_carrier", "solved_upstream", "prober")]
    kernels.append(launch(shape, "carry reversed", loads, ["adjoints", *only(erases, "x")], through * (1 + 2 * erases)))
    return kernels + source_gradients(shape) + reader_gradients(shape) + rest_of_gradients(shape)


def source_gradients(shape: Shape) -> list[Kernel]:
    """Gradients of write keys and erases, and the products of the gradients of reads and answers with their values."""
    tied, decoupled, erases = shape.form == "tied", shape.form == "decoupled", shape.erases
    square_v = 2 * shape.chunk**2 * shape.d_v
    through = 2 * shape.chunk * shape.d_k * shape.d_v
    kernels = []
    for source in ["write_key", *only(decoupled, "erase")]:
        value = "y" if tied or source == "erase" else "write_value"
        prefix = "erase_" if source == "erase" else ""
        weights = [f"{prefix}read_weights", *only(erases, f"{prefix}answer_weights")]
        loads = ["upstream", value, *only(erases, "x"), *only(not shape.vector_decay, "log_decay")]
        kernels.append(launch(shape, f"weights of {source}", loads, weights, square_v * (1 + erases)))
        loads = ["log_decay", source, value, "adjoints", "query", *weights]
        loads += only(decoupled, "probe") + only(tied, "strength")
        stores = ["d_key_sum" if tied else f"d_{source}", "decay_part"]
        kernels.append(_with_paths(shape, f"gradient of {source}", loads, stores, through, 1 + erases))
    return kernels


def reader_gradients(shape: Shape) -> list[Kernel]:
    """Gradients of queries and probes, and of the decay on the way to them."""
    tied, decoupled = shape.form == "tied", shape.form == "decoupled"
    through = 2 * shape.chunk * shape.d_k * shape.d_v
    decays = 0 if shape.vector_decay else 2 * shape.chunk**3
    kernels = []
    for reader in ["query", *only(shape.erases, "probe")]:
        kind = "read_weights" if reader == "query" else "answer_weights"
        upstream = "upstream" if reader == "query" else "x"
        loads = ["log_decay", upstream, "states", "write_key", kind, *only(decoupled, "erase", f"erase_{kind}")]
        loads += only(reader == "query", "adjoints") + only(reader == "query" or decoupled, reader)
        stores = [f"d_{reader}", "decay_part"]
        if reader == "probe" and tied:  # the key's part as a probe is added to its part as a source
            loads += ["strength", "d_key_sum"]
            stores = ["d_key_sum", "decay_part", "d_strength"]
        # With one decay for a head every source also needs the products that its decay is found from.
        grams = (1 + decoupled) * (1 if shape.vector_decay else 2)
        kernels.append(_with_paths(shape, f"gradient of {reader}", loads, stores, through + decays, grams))
    return kernels


def _with_paths(shape: Shape, name: str, loads: list[str], stores: list[str], products: int, grams: int) -> Kernel:
    """A gradient kernel: products of its own, and so many sums over the positions of the chunk."""
    cost = gram_cost(shape, grams)
    return launch(shape, name, loads, stores, products + cost.get("products", 0), cost.get("other", 0))


def rest_of_gradients(shape: Shape) -> list[Kernel]:
    """Gradients of write values, and the sums of what several kernels have found of decays and tied keys."""
    tied, decoupled = shape.form == "tied", shape.form == "decoupled"
    square_v, through = 2 * shape.chunk**2 * shape.d_v, 2 * shape.chunk * shape.d_k * shape.d_v
    if tied:
        values = launch(shape, "gradient of write_value", ["x"], ["d_write_value"])
    else:
        loads = ["upstream", "queried", "injector", "adjoints", *only(decoupled, "probed", "x")]
        values = launch(
            shape, "gradient of write_value", loads, ["d_write_value"], square_v * (1 + decoupled) + through
        )
    parts = {"tied": 3, "decoupled": 4, "plain": 2}[shape.form]
    loads = ["decay_part"] * parts + only(tied, "d_key_sum")
    return [values, launch(shape, "sums", loads, ["d_log_decay", *only(tied, "d_write_key")])]


def step(shape: Shape) -> list[Kernel]:
    """The decode step, per token and head: the state in and out; every operation outside the matrix units."""
    state, one = shape.d_k * shape.d_v, Shape(**{**vars(shape), "chunk": 1})
    sizes = arrays(one)
    loaded = 4 * state + sum(sizes[name] for name in inputs(one))
    # decay; asking and erasing (a tied erase lands on the key, so it only asks); writing; reading
    operations = state * (1 + {"tied": 2, "decoupled": 4, "plain": 0}[shape.form] + 2 + 2)
    return [Kernel("step", loaded, 4 * state + sizes["read"], 0, operations)]


def least_bytes(shape: Shape, *, gradients: bool) -> int:
    """Inputs and outputs alone, per chunk and head: what no kernel can do without."""
    sizes = arrays(shape)
    names = inputs(shape)
    out = ["upstream", *(f"d_{name}" for name in names)] if gradients else ["read"]
    return sum(sizes[name] for name in [*names, *out])
