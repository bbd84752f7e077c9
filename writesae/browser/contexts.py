"""Every firing of a text, sorted by atom: how strong, on which tokens, and in what contexts.

Plain numpy. Memory goes with the number of firings and with what is kept, never with atoms times tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from writesae.browser.data import Contexts, Listed

_AT_ONCE = 4096  # contexts whose codes are looked up at once


@dataclass(frozen=True)
class Firings:
    """All firings, those of one atom side by side, the strongest first."""

    first: Int[np.ndarray, " atom_plus_one"]
    """Those of atom i are first[i] up to first[i + 1], exclusive."""
    passage: Int[np.ndarray, " firing"]
    """Row of the text."""
    position: Int[np.ndarray, " firing"]
    """Position in it."""
    coefficient: Float[np.ndarray, " firing"]
    """The atom's coefficient there."""

    @staticmethod
    def of(
        indices: Int[np.ndarray, "passage pos k"], values: Float[np.ndarray, "passage pos k"], n_atoms: int
    ) -> "Firings":
        """Sort the active entries of a text's codes."""
        passage, position, slot = np.nonzero(values > 0)
        atom, coefficient = indices[passage, position, slot], values[passage, position, slot]
        order = np.lexsort((-coefficient, atom))
        first = np.searchsorted(atom[order], np.arange(n_atoms + 1))
        return Firings(first, passage[order], position[order], coefficient[order])

    @property
    def counts(self) -> Int[np.ndarray, " atom"]:
        """Firings of every atom."""
        return np.diff(self.first)

    @property
    def atom(self) -> Int[np.ndarray, " firing"]:
        """The atom of every firing."""
        return np.repeat(np.arange(len(self.first) - 1), self.counts)

    def each(self) -> Iterator[tuple[int, slice]]:
        """Atoms with their firings, the silent ones left out."""
        for atom in np.flatnonzero(self.counts):
            yield int(atom), slice(int(self.first[atom]), int(self.first[atom + 1]))

    def some(self, most: int, seed: int) -> Int[np.ndarray, " chosen"]:
        """At most so many firings of every atom, drawn at random."""
        drawn = [rows.start + _draw(rows.stop - rows.start, most, seed, atom) for atom, rows in self.each()]
        return np.concatenate(drawn) if drawn else np.zeros(0, dtype=np.int64)


def _draw(count: int, most: int, seed: int, atom: int) -> Int[np.ndarray, " drawn"]:
    """Every atom has its own generator, so that one atom's draw does not depend on the others."""
    return np.sort(np.random.default_rng([seed, atom]).permutation(count)[:most])


def histogram(firings: Firings, bins: int) -> Int[np.ndarray, "atom bin"]:
    """Firings by coefficient, in equal bins from 0 to each atom's largest, which belongs to the last bin."""
    counts = np.zeros((len(firings.first) - 1, bins), dtype=np.int64)
    for atom, rows in firings.each():
        mine = firings.coefficient[rows]
        counts[atom] = np.histogram(mine, bins=bins, range=(0.0, float(mine[0])))[0]
    return counts


def fires_on(firings: Firings, tokens: Int[np.ndarray, "passage pos"], count: int) -> Listed:
    """Per atom the tokens with the largest share of its summed coefficient."""
    index = np.full((len(firings.first) - 1, count), -1, dtype=np.int64)
    share = np.zeros(index.shape)
    for atom, rows in firings.each():
        found, place = np.unique(tokens[firings.passage[rows], firings.position[rows]], return_inverse=True)
        summed = np.bincount(place, weights=firings.coefficient[rows])
        best = np.argsort(-summed, kind="stable")[:count]
        index[atom, : len(best)], share[atom, : len(best)] = found[best], summed[best] / summed.sum()
    return Listed(index, share)


def choose(firings: Firings, top: int, random: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which firings are shown: (rows of `firings`, whether each is a random one, where each atom's begin).

    The top ones are an atom's strongest, one per passage at most; the random ones are drawn from all its other firings.
    """
    rows, is_random, counts = [], [], np.zeros(len(firings.first) - 1, dtype=np.int64)
    for atom, mine in firings.each():
        _, strongest = np.unique(firings.passage[mine], return_index=True)
        best = mine.start + np.sort(strongest)[:top]
        others = np.setdiff1d(np.arange(mine.start, mine.stop), best)
        drawn = others[_draw(len(others), random, seed, atom)]
        rows += [best, drawn]
        is_random += [np.zeros(len(best), dtype=bool), np.ones(len(drawn), dtype=bool)]
        counts[atom] = len(best) + len(drawn)
    first = np.concatenate([[0], np.cumsum(counts)])
    if not rows:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool), first
    return np.concatenate(rows), np.concatenate(is_random), first


def cut(
    firings: Firings,
    tokens: Int[np.ndarray, "passage pos"],
    indices: Int[np.ndarray, "passage pos k"],
    values: Float[np.ndarray, "passage pos k"],
    *,
    top: int,
    random: int,
    before: int,
    after: int,
    seed: int,
) -> Contexts:
    """The text around the chosen firings, with the atom's coefficient at every token of it."""
    rows, is_random, first = choose(firings, top, random, seed)
    passage, position, atom = firings.passage[rows], firings.position[rows], firings.atom[rows]
    start = np.maximum(position - before, 0)
    places = start[:, None] + np.arange(before + after + 1)
    inside = (places < tokens.shape[1]) & (places <= position[:, None] + after)
    places = np.minimum(places, tokens.shape[1] - 1)
    word = np.where(inside, tokens[passage[:, None], places], -1)
    activation = np.zeros(word.shape, dtype=np.float32)
    for begin in range(0, len(rows), _AT_ONCE):
        here = slice(begin, begin + _AT_ONCE)
        at = passage[here, None], places[here]
        mine = indices[at] == atom[here, None, None]
        activation[here] = np.where(mine, values[at], 0).sum(-1) * inside[here]
    return Contexts(first, is_random, passage, position, position - start, word, activation)
