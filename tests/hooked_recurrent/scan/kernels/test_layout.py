"""The tables of chunks, the tensors that kernels are given, and recorded launches."""

import pytest
import torch

from hooked_recurrent.scan.kernels import layout
from hooked_recurrent.scan.kernels.layout import Launch, Precision, Sequences
from hooked_recurrent.scan.kernels.tiles import store_square

CPU = torch.device("cpu")


def test_chunks_of_a_batch():
    sequences = Sequences.of_batch(2, 7, 3, CPU)
    assert sequences.chunks.tolist() == [[0, 0, 3], [0, 3, 3], [0, 6, 1], [1, 0, 3], [1, 3, 3], [1, 6, 1]]
    assert sequences.first_chunk.tolist() == [0, 3, 6]
    assert (sequences.count, sequences.size) == (2, 3)


def test_chunks_of_packed_sequences():
    sequences = Sequences.packed(torch.tensor([0, 4, 4, 5]), 3, CPU)
    assert sequences.chunks.tolist() == [[0, 0, 3], [0, 3, 1], [0, 4, 1]]
    assert sequences.first_chunk.tolist() == [0, 2, 2, 3]
    assert sequences.count == 3
    assert Sequences.packed(torch.tensor([0, 0]), 3, CPU).chunks.shape == (0, 3)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_a_batch_is_packed_sequences_in_rows_of_their_own(length):
    batch, packed = Sequences.of_batch(1, length, 64, CPU), Sequences.packed(torch.tensor([0, length]), 64, CPU)
    assert torch.equal(batch.chunks, packed.chunks)
    assert torch.equal(batch.first_chunk, packed.first_chunk)


def test_rows_are_copied_only_for_a_strided_last_axis():
    wide = torch.randn(2, 3, 4, 6)
    turned = wide.permute(1, 0, 2, 3)
    assert layout.rows_of(turned)[0].data_ptr() == wide.data_ptr()
    assert layout.rows_of(turned)[1:] == (24, 72, 6)
    tensor, *strides = layout.rows_of(wide[..., ::2])
    assert torch.equal(tensor, wide[..., ::2])
    assert strides == [36, 12, 3]
    assert layout.rows_of(None) is None
    assert layout.terms_of(torch.randn(2, 3, 4, 5, 6))[1:] == (360, 120, 30, 6)


def test_one_state_serves_every_sequence():
    state = torch.randn(1, 4, 5, 6)
    assert layout.states_of(state)[1:] == (0, 6, 30)
    assert layout.states_of(state.expand(2, -1, -1, -1))[1:] == (0, 6, 30)
    assert layout.states_of(torch.randn(2, 4, 5, 6))[1:] == (120, 6, 30)


@pytest.mark.parametrize(("width", "block"), [(3, 16), (16, 16), (17, 32), (48, 64), (64, 64), (80, 64)])
def test_blocks_are_powers_of_two(width, block):
    assert layout.block_of(width, 64) == block


def test_float32_keeps_its_precision_on_either_vendor():
    with layout.recorded("cuda"):
        assert Precision.of(torch.float32) == Precision("tf32x3", "tf32x3")
        assert Precision.of(torch.bfloat16) == Precision("tf32x3", "tf32")
    with layout.recorded("hip"):
        assert Precision.of(torch.float32) == Precision("ieee", "ieee")
        assert Precision.of(torch.float16) == Precision("ieee", "tf32")


def test_recorded_launches_do_not_run():
    matrix = torch.zeros(16, 16)
    launch = Launch(store_square, (1,), {"first": matrix, "matrix": 1.0, "C": 16})
    with layout.recorded("cuda") as launches:
        launch.run()
    assert launches == [launch]
    assert (matrix == 0).all()
    launch.run()
    assert (matrix == 1).all()
