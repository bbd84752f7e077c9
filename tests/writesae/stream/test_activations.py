"""Streams of samples: the right ones, any batch by its number, a bounded buffer, one pass for all, in several processes."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.hooked_recurrent.models import HYBRID, tiny_model, tokens_of
from writesae.parallel import World
from writesae.sae.samples import Factored, Matrices
from writesae.sae.states import StateSequences
from writesae.stream.activations import ActivationStream, split_passages
from writesae.stream.sources import Source, collect

WRITES = Source("blocks.2.mixer.hook_write", 1)
STATES = Source("blocks.2.mixer.hook_state", 1)
VECTORS = Source("blocks.1.hook_resid_post")


def stream_of(sources=(WRITES,), layers=HYBRID, tokens=None, **options):
    model = tiny_model(layers)
    tokens = tokens_of(model, batch=7, length=11) if tokens is None else tokens
    options = {"batch_size": 10, "passages_per_forward": 3, "dtype": torch.float64, **options}
    return ActivationStream(model, tokens, sources, **options)


def names_of(samples):
    """Samples as hashable rows, to be counted; the last digits depend on what else was in the forward pass."""
    return [tuple(round(number, 7) for number in row) for row in samples.matrices().flatten(1).tolist()]


def homes(stream, source):
    """Which passage every sample is of; passages that begin alike share samples."""
    record = collect(stream.origin, stream.tokens, [source])[source]
    matrices = [record["x"]] if "x" in record else [torch.einsum("ptk,ptv->ptkv", record["key"], record["value"])]
    rows = matrices[0][:, stream.skip :].flatten(2)
    return {tuple(round(n, 7) for n in row): p for p in range(len(rows)) for row in rows[p].tolist()}


@pytest.mark.parametrize("source", [WRITES, VECTORS])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize("skip", [0, 3])
def test_an_epoch_holds_every_sample_but_the_rest_of_a_block(source, cache_bytes, skip):
    stream = stream_of([source], cache_bytes=cache_bytes, skip_positions=skip, buffer_samples=35)
    assert stream.cached == bool(cache_bytes) and stream.order.n_blocks == (3 if skip == 0 else 2)
    every = homes(stream, source)
    occurs = Counter(names_of(stream.sample(10_000)[source]))
    epoch = sum(stream.order.batches_in(block) for block in range(stream.order.n_blocks))
    batches = [names_of(stream.batch(number)[source]) for number in range(epoch)]
    assert all(len(batch) == 10 for batch in batches)
    seen = Counter(row for batch in batches for row in batch)
    assert set(occurs) == set(every) and seen <= occurs and stream.n_samples(source) == occurs.total()
    assert occurs.total() - seen.total() < 10 * stream.order.n_blocks
    # in 7 of 8 a batch of 10 from 2 or 3 passages meets them all; in order it would meet one or two
    assert sum(len({every[row] for row in batch}) for batch in batches) > 1.8 * epoch


def test_batches_mix_many_passages_where_the_buffer_is_large():
    stream = stream_of()
    every = homes(stream, WRITES)
    batches = [{every[row] for row in names_of(stream.batch(number)[WRITES])} for number in range(14)]
    assert all(len(batch) >= 3 for batch in batches) and sum(map(len, batches)) > 5 * 14


OTHERS = [STATES, VECTORS, Source("blocks.0.mixer.hook_write", 0, "net")]


@pytest.mark.parametrize("length", [4, 11])  # shorter than a batch, and longer
def test_what_a_source_gives_depends_on_nothing_beside_it_nor_on_what_is_kept_in_memory(length):
    tokens = tokens_of(tiny_model(HYBRID), batch=9, length=length)
    alone = stream_of([WRITES], tokens=tokens, buffer_samples=20, batch_size=6)
    states = stream_of([STATES], tokens=tokens, buffer_samples=20, batch_size=6)
    for cache_bytes in (0, 1 << 20):
        beside = stream_of([WRITES, *OTHERS], tokens=tokens, buffer_samples=20, batch_size=6, cache_bytes=cache_bytes)
        assert beside.cached == bool(cache_bytes) and beside.order.n_blocks > 1
        for number in (0, 1, 8, 30):
            together = beside.batch(number)
            for stream, source in ((alone, WRITES), (states, STATES)):
                expected = stream.batch(number)[source].matrices()
                torch.testing.assert_close(together[source].matrices(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_any_batch_is_found_by_its_number(cache_bytes):
    one, other = (stream_of([WRITES, VECTORS], cache_bytes=cache_bytes, buffer_samples=30) for _ in range(2))
    iterator = iter(one)
    in_turn = [next(iterator) for _ in range(17)]
    for number in (16, 0, 9, 3):
        found = other.batch(number)
        for source in (WRITES, VECTORS):
            torch.testing.assert_close(found[source].matrices(), in_turn[number][source].matrices(), rtol=0, atol=1e-12)
    different = stream_of([WRITES], cache_bytes=cache_bytes, buffer_samples=30, seed=1).batch(0)
    assert names_of(different[WRITES]) != names_of(in_turn[0][WRITES])


def test_sources_are_met_at_the_same_tokens():
    key, value = (Source(f"blocks.2.mixer.hook_write_{side}", 1) for side in ("key", "value"))
    batch = stream_of([WRITES, key, value]).batch(2)
    outer = batch[key].matrices() @ batch[value].matrices().transpose(1, 2)
    torch.testing.assert_close(batch[WRITES].matrices(), outer, rtol=1e-12, atol=1e-12)


def count_passages(monkeypatch):
    """Passages of every forward pass to come."""
    seen = []

    def counted(model, tokens, sources, **options):
        seen.append(len(tokens))
        return collect(model, tokens, sources, **options)

    monkeypatch.setattr("writesae.stream.activations.collect", counted)
    return seen


def test_records_are_made_once_where_they_fit_and_a_block_at_a_time_elsewhere(monkeypatch):
    seen, stream, told = count_passages(monkeypatch), stream_of([WRITES, VECTORS]), []
    stream.prepare(lambda done, total: told.append((done, total)))
    for number in range(20):
        stream.batch(number)
    assert seen == [3, 3, 1] and told == [(3, 7), (6, 7), (7, 7)]
    seen.clear()
    stream = stream_of([WRITES, VECTORS], cache_bytes=0, buffer_samples=20)
    assert [stream.order.block_size(block) for block in range(stream.order.n_blocks)] == [1, 2, 2, 2]
    stream.batch(0)
    assert sum(seen) == 1  # the buffer holds two passages at most
    stream.batch(1)
    stream.batch(2)
    assert sum(seen) == 3
    stream.batch(100)  # a jump makes its own block and no other
    assert sum(seen) <= 5


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_a_sample_is_made_of_the_streams_own(cache_bytes):
    stream = stream_of(cache_bytes=cache_bytes)
    sample = stream.sample(25)[WRITES]
    assert len(sample) == 25 and set(names_of(sample)) <= set(homes(stream, WRITES))
    assert names_of(sample) == names_of(stream.sample(25)[WRITES])
    assert len(stream.sample(10_000)[WRITES]) == stream.n_samples()


def test_states_under_scalar_decay_come_by_whole_passages():
    stream = stream_of([STATES, WRITES], batch_size=20)
    batch = stream.batch(1)
    assert isinstance(batch[STATES], StateSequences) and isinstance(batch[WRITES], Factored)
    assert len(batch[STATES]) == len(batch[WRITES]) == 20  # two passages of ten positions each
    _, cache = stream.origin.run_with_cache(stream.tokens, names_filter=[STATES.hook])
    every = cache[STATES.hook][:, 1:, 1]
    place = stream.order.place(1)
    expected = every[stream.order.passage_rows(place, 2)].flatten(0, 1)
    torch.testing.assert_close(batch[STATES].matrices(), expected, rtol=1e-10, atol=1e-10)
    sample = stream.sample(30)[STATES]
    assert isinstance(sample, StateSequences) and len(sample) == 30


def test_states_under_vector_decay_are_formed_at_random_positions_and_it_says_so():
    with pytest.warns(UserWarning, match="every state is formed|each of these states is formed|formed"):
        stream = stream_of([STATES], layers=("rwkv7",) * 3, batch_size=20)
        batch = stream.batch(0)[STATES]
    assert isinstance(batch, Matrices) and 20 <= len(batch) <= 21
    _, cache = stream.origin.run_with_cache(stream.tokens, names_filter=[STATES.hook])
    states = cache[STATES.hook][:, 1:, 1].flatten(2)
    homes = {tuple(round(n, 7) for n in row): p for p in range(7) for row in states[p].tolist()}
    found = names_of(batch)
    assert set(found) <= set(homes) and len(set(found)) == len(found) and len({homes[row] for row in found}) == 7


class Threads(World):
    """Processes played by threads: each leaves its part on the table, and all of them read it."""

    table: dict = {}
    barrier: threading.Barrier

    def exchanged(self, tensor):
        """The parts of all, in order."""
        Threads.table[self.rank] = tensor
        Threads.barrier.wait()
        parts = [Threads.table[rank] for rank in range(self.size)]
        Threads.barrier.wait()
        return parts

    def all_gather(self, tensor):
        """As in `World`: shapes must agree but for the first axis."""
        return torch.cat(self.exchanged(tensor))

    def max_(self, tensor):
        """As in `World`."""
        return torch.stack(self.exchanged(tensor)).amax(0)


def in_threads(size, work):
    """What `work(world)` gives in each of the processes."""
    Threads.barrier = threading.Barrier(size, timeout=60)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, [Threads(rank, size) for rank in range(size)]))


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize("size", [2, 4])
def test_processes_share_the_forward_passes_and_hold_the_same_batches(monkeypatch, size, cache_bytes):
    sources, options = [WRITES, *OTHERS], {"cache_bytes": cache_bytes, "buffer_samples": 40}
    alone = stream_of(sources, **options)
    expected = [alone.batch(number) for number in (0, 7)]
    seen = count_passages(monkeypatch)
    models = {rank: tiny_model(HYBRID) for rank in range(size)}

    def batches(world):
        stream = ActivationStream(
            models[world.rank],
            alone.tokens,
            sources,
            batch_size=10,
            passages_per_forward=3,
            dtype=torch.float64,
            world=world,
            **options,
        )
        return [stream.batch(number) for number in (0, 7)]

    for found in in_threads(size, batches):
        for ours, theirs in zip(found, expected, strict=True):
            assert all(torch.equal(ours[s].matrices(), theirs[s].matrices()) for s in sources)  # bit for bit
    if cache_bytes and size == 2:
        assert sum(seen) == 7


def test_processes_agree_on_the_number_of_terms():
    def gathered(world):
        stream = stream_of(world=world)
        return stream._gathered(torch.ones(2, 3, 1 + world.rank, 4))

    for found in in_threads(2, gathered):
        assert found.shape == (4, 3, 2, 4) and found[:2, :, 1].eq(0).all() and found.sum() == 2 * 3 * 3 * 4


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_a_bad_number_is_found_at_its_passage_of_the_tokens(cache_bytes):
    stream = stream_of(cache_bytes=cache_bytes, buffer_samples=20)
    bad = stream.tokens[5]

    def look(embedded, hook):
        rows = (embedded == stream.origin.embed(bad)).flatten(1).all(1)
        stream.origin.hook_dict["blocks.2.mixer.hook_write_value"].ctx = {"bad": rows} if rows.any() else {}

    def spoil_row(value, hook):
        if "bad" in hook.ctx:
            value[hook.ctx["bad"], 4, 1] = torch.nan
        return value

    hooks = [("hook_embed", look), ("blocks.2.mixer.hook_write_value", spoil_row)]
    hooks.append(("blocks.2.mixer.hook_z", lambda z, hook: torch.zeros_like(z)))  # nothing above reads what was spoiled
    with stream.origin.hooks(hooks), pytest.raises(ValueError, match="head 1, at position 4 of passage 5"):
        for number in range(20):
            stream.batch(number)


def test_batches_are_float32_unless_asked_otherwise_and_never_larger_than_what_there_is():
    model = tiny_model(HYBRID)
    stream = ActivationStream(model, tokens_of(model, batch=2, length=11), [WRITES])
    assert stream.batch(0)[WRITES].dtype == torch.float32 and len(stream.batch(5)[WRITES]) == 20


@pytest.mark.parametrize("shape", [(0, 5), (2, 1)])
def test_no_tokens_are_a_clear_error(shape):
    with pytest.raises(ValueError, match="tokens must be"):
        stream_of(tokens=torch.zeros(shape, dtype=torch.long))


def test_no_sources_are_a_clear_error():
    with pytest.raises(ValueError, match="at least one source"):
        stream_of([])


def test_equal_passages_are_never_on_both_sides_of_a_split():
    tokens = torch.arange(12).view(6, 2).repeat(5, 1)
    for seed in range(5):
        train, rest = split_passages(tokens, 0.34, seed=seed)
        assert len(train) == 20 and len(rest) == 10
        assert not set(train[:, 0].tolist()) & set(rest[:, 0].tolist())


def test_batches_go_where_they_are_asked_to():
    batch = stream_of([WRITES, STATES], device="meta").batch(0)
    assert batch[WRITES].device.type == batch[STATES].device.type == "meta"


def test_passages_are_split_whole():
    tokens = torch.arange(40).view(20, 2)
    train, rest = split_passages(tokens, 0.25, seed=3)
    assert len(rest) == 5 and sorted([*train[:, 0].tolist(), *rest[:, 0].tolist()]) == tokens[:, 0].tolist()
    assert not torch.equal(split_passages(tokens, 0.25, seed=4)[1], rest)
    with pytest.raises(ValueError, match="without a passage"):
        split_passages(tokens, 0.0)
