"""Made-up firings, atoms and curves of the shape that a report takes; none of them was measured."""

import numpy as np
import pandas as pd
import pytest

from writesae.evaluation.statistics import wilson_interval

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "</bdi></div></section>",
    '" onmouseover="alert(3)',
    "&lt;b&gt; &amp;",
    "\x00\x07\x1b[31m\x7f",
    "\u202eevil\u202c",
    "\u200b\u2028\ufeff",
    "שלום عليكم",
    "👩\u200d👩\u200d👧 🎉",
    "\ud800",
    "  \t\n",
    "{{ 7 * 7 }}{% raw %}",
    "<!-- ",
    "]]>",
]


def make_firings(n_atoms: int = 6, per_atom: int = 8) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for atom in range(n_atoms):
        for firing in range(per_atom):
            delete = 10 ** rng.normal(-2, 0.6)
            better = delete / 10 ** rng.normal(0.3, 0.3)
            for reading in ("cache", "in_recurrence"):
                rows.append(
                    {
                        "firing_id": f"{atom}-{firing}",
                        "atom": 10 * atom,
                        "passage": firing,
                        "reading": reading,
                        "kl_native": 1e-9 * rng.random(),
                        "kl_delete": delete,
                        "kl_atom_listed_coef": better,
                        "kl_atom_dominant_coef": better / 2 if reading == "cache" else np.nan,
                        "kl_random_listed_coef": 3 * delete,
                        "kl_something_new": delete,
                        "kl_reverse_delete": delete,
                    }
                )
    return pd.DataFrame(rows)


def make_atom(number: int, tokens: list[str]) -> dict:
    rng = np.random.default_rng(number)
    weights = np.linspace(0, 2, len(tokens)).tolist()
    context = {"tokens": tokens, "weights": weights, "firing_index": 1, "file": "a/b.py", "coefficient": 2.0}
    return {
        "id": number,
        "key_factor": rng.normal(size=5),
        "value_factor": rng.normal(size=7),
        "firing_rate": 0.01,
        "median_coefficient": 1.5,
        "win_rate": 0.8,
        "contexts": [context, {**context, "position": 12}],
    }


@pytest.fixture
def firings():
    return make_firings()


@pytest.fixture
def hostile():
    return list(HOSTILE)


@pytest.fixture
def report(firings):
    """Every argument of `write_report` but the path; a test may change some of them."""
    log = [{"step": step, "fvu": 1 / (1 + step), "dead": 3} for step in range(0, 50, 10)]
    half_lives = pd.DataFrame([{"layer": i, "head": j, "median": 2.0 ** (i + j)} for i in (0, 2) for j in range(3)])
    return {
        "title": "A made-up report",
        "settings": {"seed": 0, "hook": "blocks.0.mixer.hook_write"},
        "firings": firings,
        "summary": {"in_recurrence": {"firings": 48, "win_rate": wilson_interval(40, 48), "median_kl_atom": 0.0123}},
        "atoms": [make_atom(10, ["def", " f", "(", "\n"]), make_atom(30, ["x", "\t", "y"])],
        "training_log": log,
        "half_lives": half_lives,
        "notes": ["One.", "Two."],
        "cell": (2, 1),
    }
