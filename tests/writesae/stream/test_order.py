"""The order of batches: a function of seed and number, that meets every row once and holds few passages."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from writesae.stream.order import Order, Place, generator_of

sizes = st.integers(1, 30)


def order_of(n=7, per=10, batch=8, buffer=30, seed=0):
    return Order(n, per, batch, buffer, seed)


def met(order, number):
    """Rows of a batch as (passage, position)."""
    place = order.place(number)
    passages = order.passages(place.epoch, place.block)
    return [(int(passages[row // order.per_passage]), row % order.per_passage) for row in order.rows(place).tolist()]


@given(sizes, sizes, sizes, st.integers(1, 400), st.integers(0, 3))
def test_an_epoch_meets_no_row_twice_and_leaves_less_than_a_batch_per_block(n, per, batch, buffer, seed):
    order = order_of(n, per, batch, buffer, seed)
    counts = [order.batches_in(block) for block in range(order.n_blocks)]
    assert sum(order.block_size(block) for block in range(order.n_blocks)) == n
    seen = [row for number in range(sum(counts)) for row in met(order, number)]
    assert len(set(seen)) == len(seen)
    assert all(0 <= passage < n and 0 <= position < per for passage, position in seen)
    assert n * per - len(seen) < batch * order.n_blocks
    assert order.place(sum(counts)).epoch == 1 and order.place(sum(counts)).batch == 0


@given(sizes, sizes, st.integers(1, 20), st.integers(1, 400))
def test_a_block_fits_the_buffer_or_is_as_small_as_a_batch_allows(n, per, batch, buffer):
    order = order_of(n, per, batch, buffer)
    largest = max(order.block_size(block) for block in range(order.n_blocks))
    least = max(1, -(-batch // per))
    # Blocks are evened out to whole passages, and hold a batch where there is one.
    assert (largest - 1) * per < max(buffer, 2 * least * per) or order.n_blocks == 1
    assert min(order.block_size(block) for block in range(order.n_blocks)) * per >= min(batch, n * per)


@given(sizes, sizes, st.integers(1, 60), st.integers(1, 400))
def test_whole_passages_go_round_their_block(n, per, batch, buffer):
    order, count = order_of(n, per, batch, buffer), max(1, batch // per)
    for block in range(order.n_blocks):
        size = order.block_size(block)
        batches = [order.passage_rows(Place(3, block, i), count).tolist() for i in range(order.batches_in(block))]
        assert all(len(set(batch)) == len(batch) == min(count, size) for batch in batches)
        assert all(0 <= passage < size for batch in batches for passage in batch)
        turns = size // min(count, size)
        for start in range(0, len(batches), turns):
            once = [passage for batch in batches[start : start + turns] for passage in batch]
            assert len(set(once)) == len(once)  # none twice in one round


def test_rounds_of_whole_passages_differ():
    order = order_of(n=6, per=10, batch=2, buffer=100)
    rounds = [[int(order.passage_rows(Place(0, 0, 6 * r + i), 1)) for i in range(6)] for r in range(5)]
    assert all(sorted(one) == list(range(6)) for one in rounds) and len({tuple(one) for one in rounds}) > 3


def test_orders_follow_from_the_seed_and_differ_between_epochs_blocks_and_seeds():
    first, again, other = order_of(), order_of(), order_of(seed=1)
    assert [met(first, i) for i in range(40)] == [met(again, i) for i in range(40)]
    assert met(first, 0) != met(other, 0)
    in_memory = order_of(buffer=1000)
    epoch = in_memory.batches_in(0)
    assert in_memory.passages(0, 0).tolist() == in_memory.passages(5, 0).tolist() == list(range(7))
    assert met(in_memory, 0) != met(in_memory, epoch)
    assert not torch.equal(first.passages(0, 0), first.passages(1, 0))


def test_a_batch_mixes_passages():
    order = order_of(n=20, per=50, batch=40, buffer=1000)
    for number in range(20):
        assert len({passage for passage, _ in met(order, number)}) >= 10
    small = order_of(n=20, per=50, batch=40, buffer=200)
    assert all(2 <= len({passage for passage, _ in met(small, number)}) <= 4 for number in range(20))


def test_batches_before_the_first_one_are_an_error():
    with pytest.raises(IndexError, match="counted from 0"):
        order_of().place(-1)


def test_generators_of_different_numbers_differ():
    drawn = {tuple(torch.rand(3, generator=generator_of(*ns)).tolist()) for ns in [(1, 2), (2, 1), (1, 2, 0), (3,)]}
    assert len(drawn) == 4
