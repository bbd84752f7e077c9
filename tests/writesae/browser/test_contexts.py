"""Firings, histograms and contexts against loops that say the same."""

import numpy as np
import pytest

from writesae.browser.contexts import Firings, choose, cut, fires_on, histogram

N_ATOMS, SHAPE, K = 9, (5, 14), 3


@pytest.fixture(scope="module")
def codes():
    """indices, values and tokens; every token has K different atoms, some with a value of 0, and atom 8 never fires."""
    rng = np.random.default_rng(3)
    indices = np.array([[rng.permutation(N_ATOMS - 1)[:K] for _ in range(SHAPE[1])] for _ in range(SHAPE[0])])
    values = rng.uniform(0.1, 2, (*SHAPE, K)) * (rng.random((*SHAPE, K)) < 0.6)
    return indices, values, rng.integers(0, 6, SHAPE)


def coefficients(codes, atom):
    indices, values, _ = codes
    return np.where(indices == atom, values, 0).sum(-1)


@pytest.fixture(scope="module")
def firings(codes):
    return Firings.of(codes[0], codes[1], N_ATOMS)


def test_every_firing_is_there_once_and_the_strongest_first(codes, firings):
    assert firings.counts[8] == 0 and firings.counts.sum() == (codes[1] > 0).sum()
    for atom, rows in firings.each():
        dense = coefficients(codes, atom)
        mine = firings.coefficient[rows]
        assert np.array_equal(dense[firings.passage[rows], firings.position[rows]], mine)
        assert len(mine) == (dense > 0).sum() and (np.diff(mine) <= 0).all()
        assert (firings.atom[rows] == atom).all()


def test_histograms_hold_every_firing_between_zero_and_the_largest(codes, firings):
    made = histogram(firings, 4)
    assert np.array_equal(made.sum(1), firings.counts)
    for atom in range(8):
        mine = coefficients(codes, atom)
        mine = mine[mine > 0]
        bins = np.minimum((4 * mine / mine.max()).astype(int), 3)
        assert np.array_equal(made[atom], np.bincount(bins, minlength=4))


def test_words_are_ordered_by_their_share_of_the_summed_coefficient(codes, firings):
    made = fires_on(firings, codes[2], 4)
    for atom in range(8):
        mine = coefficients(codes, atom)
        shares = np.array([mine[codes[2] == word].sum() for word in range(6)]) / mine.sum()
        found = made.index[atom][made.index[atom] >= 0]
        assert np.allclose(made.number[atom][: len(found)], np.sort(shares)[::-1][: len(found)])
        assert np.allclose(shares[found], made.number[atom][: len(found)])
    assert (made.index[8] == -1).all()


def test_top_contexts_are_the_strongest_of_different_passages_and_random_ones_are_others(codes, firings):
    rows, is_random, first = choose(firings, 2, 3, seed=5)
    for atom in range(8):
        dense = coefficients(codes, atom)
        here = slice(first[atom], first[atom + 1])
        mine, drawn = rows[here], is_random[here]
        passages = firings.passage[mine[~drawn]]
        best = np.sort(dense.max(1))[::-1][:2]
        assert np.allclose(firings.coefficient[mine[~drawn]], best[best > 0]) and len(set(passages)) == len(passages)
        assert len(set(mine)) == len(mine) and len(mine) == min(firings.counts[atom], len(passages) + 3)
    again = choose(firings, 2, 3, seed=5)[0]
    assert np.array_equal(rows, again) and not np.array_equal(rows, choose(firings, 2, 3, seed=6)[0])


def test_random_contexts_are_drawn_evenly(firings):
    """Over many seeds every firing that is not among the top ones comes up about equally often."""
    atom = int(np.argmax(firings.counts))
    counts = np.zeros(int(firings.counts.sum()))
    for seed in range(400):
        rows, is_random, first = choose(firings, 1, 2, seed)
        mine = slice(first[atom], first[atom + 1])
        counts[rows[mine][is_random[mine]]] += 1
    mine = counts[firings.first[atom] : firings.first[atom + 1]]
    expected = 800 / (len(mine) - 1)
    assert mine[0] == 0 and (np.abs(mine[1:] - expected) < 5 * expected**0.5).all()


def test_contexts_hold_the_tokens_around_and_the_atom_at_each(codes, firings):
    indices, values, tokens = codes
    made = cut(firings, tokens, indices, values, top=3, random=2, before=4, after=2, seed=0)
    assert made.word.shape[1] == 7
    for atom in range(N_ATOMS):
        dense = coefficients(codes, atom)
        for row in range(made.first[atom], made.first[atom + 1]):
            passage, position = made.passage[row], made.position[row]
            window = slice(max(0, position - 4), position + 3)
            length = (made.word[row] >= 0).sum()
            assert np.array_equal(made.word[row, :length], tokens[passage, window])
            assert np.allclose(made.activation[row, :length], dense[passage, window])
            assert (made.word[row, length:] == -1).all() and (made.activation[row, length:] == 0).all()
            assert made.word[row, made.at[row]] == tokens[passage, position] and dense[passage, position] > 0


def test_a_text_without_firings_has_no_contexts():
    empty = Firings.of(np.zeros((2, 3, 1), int), np.zeros((2, 3, 1)), 4)
    made = cut(
        empty,
        np.zeros((2, 3), int),
        np.zeros((2, 3, 1), int),
        np.zeros((2, 3, 1)),
        top=2,
        random=2,
        before=1,
        after=1,
        seed=0,
    )
    assert made.first.tolist() == [0] * 5 and made.word.shape == (0, 3)
    assert len(empty.some(3, 0)) == 0 and histogram(empty, 3).sum() == 0
