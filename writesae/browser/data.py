"""What the page shows of a dictionary, as plain arrays: no tensors, no model. `atoms.py` collects it, `page.py` draws it.

Tokens are numbers into one list of texts, so that a word that stands in a thousand contexts is kept once; -1 is no token.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

COLUMNS = (
    "firings",
    "rate",
    "median",
    "largest",
    "cosine",
    "kind",
    "tested",
    "won",
    "kl_atom",
    "kl_delete",
    "kl_random",
)
"""The columns of `AtomBrowserData.atoms`; its docstring says what they hold."""
REGISTER, BUNDLE, SILENT = "register", "bundle", "silent"
KINDS = (REGISTER, BUNDLE, SILENT)


@dataclass(frozen=True)
class Contexts:
    """Pieces of text around firings; those of one atom lie side by side, the strongest first, the random ones behind them."""

    first: Int[np.ndarray, " atom_plus_one"]
    """Those of atom i are first[i] up to first[i + 1], exclusive."""
    random: Bool[np.ndarray, " context"]
    """Whether the firing was drawn at random; otherwise it is one of the strongest, at most one per passage."""
    passage: Int[np.ndarray, " context"]
    """Row of the text."""
    position: Int[np.ndarray, " context"]
    """The firing's position in it."""
    at: Int[np.ndarray, " context"]
    """Which token of the piece fires."""
    word: Int[np.ndarray, "context width"]
    """The tokens; -1 behind the end of the passage."""
    activation: Float[np.ndarray, "context width"]
    """The atom's coefficient at each."""


@dataclass(frozen=True)
class Listed:
    """A short list per atom, best first; -1 where the list is shorter."""

    index: Int[np.ndarray, "atom place"]
    """Tokens (numbers into `words`), or atoms."""
    number: Float[np.ndarray, "atom place"]
    """What the list is ordered by."""


@dataclass(frozen=True)
class AtomBrowserData:
    """One dictionary, read on one text."""

    about: dict[str, Any]
    """What was run, as plain JSON values: model, rule, layer, head, hook, form, sizes, text, settings, and `floor`, the largest
    KL in nats of putting the native write in its own place (None where nothing was replaced)."""
    words: list[str]
    """The text of every token that appears."""
    word_ids: Int[np.ndarray, " word"]
    """Their numbers in the tokenizer."""
    files: list[str]
    """Per passage the name of its file."""
    atoms: pd.DataFrame
    """A row per atom. firings, and rate, their share of all tokens; median and largest coefficient; cosine, the median over
    firings of the Frobenius cosine to the native write; kind, "register" (cosine at the threshold or above), "bundle" or
    "silent"; tested, at how many firings the write was replaced, 0 where none was; won, at how many of them the atom moved the
    output less than deletion did; kl_atom, kl_delete and kl_random, medians in nats. What was not measured is NaN."""
    key: Float[np.ndarray, "atom d_k"]
    """Key sides; of an atom that is no single outer product, its leading singular vector times the singular value."""
    value: Float[np.ndarray, "atom d_v"]
    """Value sides."""
    leading: Float[np.ndarray, " atom"]
    """The share of the atom's squared norm that key and value hold: 1 for rank one."""
    histogram: Int[np.ndarray, "atom bin"]
    """Firings by coefficient, in equal bins from 0 to the atom's largest."""
    contexts: Contexts
    """Text around firings."""
    fires_on: Listed
    """The tokens that the atom fires on, by their share of its summed coefficient."""
    promoted: Listed
    """The tokens whose logits the atom is predicted to raise most, by that many nats."""
    suppressed: Listed
    """The tokens whose logits it is predicted to lower most."""
    neighbours: Listed
    """The atoms nearest to it, by Frobenius cosine."""

    def __len__(self) -> int:
        return len(self.atoms)
