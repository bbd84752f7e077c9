"""Random plain data for a page, with no model behind it, and texts that try to be more than text."""

import numpy as np
import pandas as pd

from writesae.browser.data import BUNDLE, REGISTER, SILENT, AtomBrowserData, Contexts, Listed

HOSTILE = [
    "<script>window.ran = 1</script>",
    "<img src=x onerror='window.ran = 2'>",
    "</script><script>window.ran = 3</script>",
    "<!-- ",
    "'\"&amp;&lt;",
    "\u202eright to left",
    "שלום",
    "👩\u200d🔬",
    "\x00\x07\x1b[31m",
    "\ud800",
    "\u2028",
    "\ufeff",
    "javascript:alert(1)",
    "{{ 7 * 7 }}",
    "a\nb\tc",
    "",
]
"""Markup, scripts, entities, direction marks, right-to-left text, a joined emoji, control characters, half a surrogate pair,
line separators, templates, line ends, and nothing at all."""


def random_data(
    n_atoms=60, *, words=None, d_k=16, d_v=24, tops=8, randoms=4, width=31, bins=24, listed=10, near=8, seed=0
):
    """A whole `AtomBrowserData`; atom 0 never fires, the last third of the atoms was not tested."""
    rng = np.random.default_rng(seed)
    words = words or ["\n", "\t\n    ", "\x00\u202e", *(f" {chr(97 + i % 26)}{i}" for i in range(3, 400))]
    firings = rng.integers(1, 4000, n_atoms)
    firings[0] = 0
    silent = firings == 0
    cosine = np.where(silent, np.nan, rng.uniform(-0.2, 0.9, n_atoms))
    largest = np.where(silent, np.nan, rng.uniform(0.5, 4, n_atoms))
    tested = np.where(silent | (np.arange(n_atoms) >= 2 * n_atoms // 3), 0, 5)
    kls = {
        name: np.where(tested > 0, rng.exponential(1e-3, n_atoms), np.nan)
        for name in ("kl_atom", "kl_delete", "kl_random")
    }
    kind = np.where(silent, SILENT, np.where(cosine >= 0.05, REGISTER, BUNDLE))
    columns = {"firings": firings, "rate": firings / 15360, "median": largest / 3, "largest": largest, "cosine": cosine}
    table = pd.DataFrame({**columns, "kind": kind, "tested": tested, "won": np.minimum(tested, 3), **kls})
    per_atom = np.where(silent, 0, tops + randoms)
    count = int(per_atom.sum())
    at = rng.integers(0, width, count)
    activation = rng.random((count, width)) * (rng.random((count, width)) < 0.1)
    activation[np.arange(count), at] = 1.0
    word = rng.integers(0, len(words), (count, width))
    is_random = np.concatenate([np.zeros(tops, bool), np.ones(randoms, bool)])
    contexts = Contexts(
        first=np.concatenate([[0], np.cumsum(per_atom)]),
        random=np.tile(is_random, count // len(is_random)),
        passage=rng.integers(0, 60, count),
        position=at + 20,
        at=at,
        word=word,
        activation=activation * np.nan_to_num(np.repeat(largest, per_atom))[:, None],
    )

    def lists(high, places):
        numbers = -np.sort(-rng.random((n_atoms, places)), axis=1)
        return Listed(np.where(silent[:, None], -1, rng.integers(0, high, (n_atoms, places))), numbers)

    about = {
        "model": "tiny-<b>model</b>", "rule": "mamba2", "layer": 2, "head": 1, "hook": "blocks.2.mixer.hook_write",
        "form": "additive", "what": "writes", "passages": 60, "length": 256, "readout": "in_layer", "floor": 2e-11,
        "browser": {"threshold": 0.05, "tested_atoms": 40, "firings_per_atom": 5, "readout_firings": 8},
    }  # fmt: skip
    return AtomBrowserData(
        about=about,
        words=list(words),
        word_ids=np.arange(len(words)) + 1000,
        files=[f"folder/<i>file</i>{row}.py" for row in range(60)],
        atoms=table,
        key=rng.standard_normal((n_atoms, d_k)).astype(np.float32),
        value=rng.standard_normal((n_atoms, d_v)).astype(np.float32),
        leading=np.ones(n_atoms, dtype=np.float32),
        histogram=rng.integers(0, 400, (n_atoms, bins)) * ~silent[:, None],
        contexts=contexts,
        fires_on=lists(len(words), listed),
        promoted=lists(len(words), listed),
        suppressed=lists(len(words), listed),
        neighbours=Listed(rng.integers(0, n_atoms, (n_atoms, near)), -np.sort(-rng.random((n_atoms, near)), axis=1)),
    )
