"""Streams of samples: the right ones, any batch by its number, a bounded buffer, one pass for all, in several processes."""

from collections import Counter

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
    assert stream.cached == bool(cache_bytes) and stream.order.n_blocks == (1 if cache_bytes else 3 if skip == 0 else 2)
    every = homes(stream, source)
    occurs = Counter(names_of(stream.sample(10_000)[source]))
    epoch = sum(stream.order.batches_in(block) for block in range(stream.order.n_blocks))
    batches = [names_of(stream.batch(number)[source]) for number in range(epoch)]
    assert all(len(batch) == 10 for batch in batches)
    seen = Counter(row for batch in batches for row in batch)
    assert set(occurs) == set(every) and seen <= occurs and stream.n_samples(source) == occurs.total()
    assert occurs.total() - seen.total() < 10 * stream.order.n_blocks
    if cache_bytes:
        assert all(len({every[row] for row in batch}) >= 3 for batch in batches)


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

    def counted(model, tokens, sources):
        seen.append(len(tokens))
        return collect(model, tokens, sources)

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
    expected = every[stream.order.passage_rows(place)].flatten(0, 1)
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


class Part(World):
    """One of two processes, played one after the other: the first leaves its share, the second finds it."""

    left: list = []

    def all_gather(self, tensor):
        """The parts of both, where this is the second one."""
        if self.rank == 0:
            Part.left.append(tensor)
            return tensor
        return torch.cat([Part.left.pop(0), tensor])


def test_two_processes_share_the_forward_passes_and_hold_the_same_batches(monkeypatch):
    seen = count_passages(monkeypatch)
    Part.left.clear()
    stream_of([WRITES, VECTORS], world=Part(0, 2)).prepare()
    assert sum(seen) == 3
    second, alone = stream_of([WRITES, VECTORS], world=Part(1, 2)), stream_of([WRITES, VECTORS])
    for source in (WRITES, VECTORS):
        ours, theirs = second.batch(3)[source].matrices(), alone.batch(3)[source].matrices()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert sum(seen) == 3 + 4 + 7


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


def test_passages_are_split_whole():
    tokens = torch.arange(40).view(20, 2)
    train, rest = split_passages(tokens, 0.25, seed=3)
    assert len(rest) == 5 and sorted([*train[:, 0].tolist(), *rest[:, 0].tolist()]) == tokens[:, 0].tolist()
    assert not torch.equal(split_passages(tokens, 0.25, seed=4)[1], rest)
    with pytest.raises(ValueError, match="without a passage"):
        split_passages(tokens, 0.0)
