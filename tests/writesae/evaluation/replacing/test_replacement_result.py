"""What a replacement test amounts to, counted by hand on a table of random numbers."""

import json

import numpy as np
import pandas as pd
import pytest

from writesae.evaluation.replacing.replacement_result import ReplacementResult
from writesae.evaluation.replacing.substitutes import CONDITIONS

N = 40


def result(readings=("in_recurrence", "cache"), others=()):
    rng = np.random.default_rng(0)
    frame = {"firing_id": np.arange(N), "atom": np.arange(N) % 5, "dominant": np.arange(N) % 4}
    frame |= {"passage": np.arange(N) // 8, "position": np.arange(N) % 7, "write_norm": 1 + np.arange(N) / N}
    for name in ("coefficient", "dominant_coefficient", "rate", "rate_dominant", "cosine", "cosine_dominant"):
        frame[name] = rng.random(N)
    for name in (*CONDITIONS, *others):
        frame |= {f"kl_{name}": rng.random(N), f"norm_{name}": rng.random(N)}
    frame["kl_native"] = 1e-13 * rng.random(N)
    del frame["norm_native"]
    parts = [pd.DataFrame(frame).assign(reading=reading) for reading in readings]
    return ReplacementResult(pd.concat(parts, ignore_index=True), layer=1, head=2, config={"seed": 3})


def test_summary_counts_wins_by_hand_and_survives_json(tmp_path):
    one = result()
    rows = one.reading("cache")
    won = [atom < delete for atom, delete in zip(rows["kl_atom_dominant_coef"], rows["kl_delete"], strict=True)]
    expected = sum(won) / N
    line = next(
        row for row in one.summary(200) if (row["reading"], row["pool"], row["scale"]) == ("cache", "dominant", "coef")
    )
    assert line["win_rate"] == pytest.approx(expected) == one.win_rate("cache", "dominant", "coef")
    assert line["wilson"][0] <= expected <= line["wilson"][1]
    assert line["by_passage"][0] <= expected <= line["by_passage"][1]
    assert (line["n"], line["n_atoms"], line["n_passages"]) == (N, 4, 5)
    assert line["median_kl_random"] == pytest.approx(rows["kl_random_dominant_coef"].median())
    assert line["floor_max"] == rows["kl_native"].max()
    stored = json.loads(one.to_json(tmp_path / "r.json").read_text())
    assert len(stored["records"]) == len(one.table) and stored["config"]["seed"] == 3
    assert list(tmp_path.iterdir()) == [tmp_path / "r.json"]
    again = ReplacementResult.from_json(tmp_path / "r.json")
    assert again.win_rate("cache") == expected and again.others == ()
    assert abs(again.table["kl_delete"] - one.table["kl_delete"]).max() < 1e-14
    by_atom = one.by_atom("cache")
    assert by_atom["wins"].sum() == sum(won) and by_atom["firings"].sum() == N


def test_a_table_of_an_older_version_is_read_without_what_it_lacks():
    one = result()
    old = ReplacementResult(one.table.drop(columns=["kl_atom_listed_best", "kl_atom_dominant_best"]), 1, 2, {})
    assert {row["scale"] for row in old.summary(20)} == {"coef", "norm"}


def test_losses_are_found_where_they_were_put():
    """All losses lie where the write is small: that quarter has them all, and other explanations share them."""
    one = result()
    table = one.table.assign(kl_delete=1.0, kl_atom_dominant_coef=np.where(one.table["write_norm"] < 1.25, 2.0, 0.5))
    losses = ReplacementResult(table, 1, 2, {}).losses("cache", n_resamples=50).set_index(["by", "bin"])
    norm = losses.loc["write_norm"]
    assert norm["n"].tolist() == [10] * 4
    assert norm["win_rate"].tolist() == [0.0, 1.0, 1.0, 1.0] and norm["share_of_losses"].tolist() == [
        1.0,
        0.0,
        0.0,
        0.0,
    ]
    assert norm.loc[0, "high"] < norm.loc[1, "low"] <= 1.25
    assert norm.loc[0, ["median_kl_atom", "median_kl_delete"]].tolist() == [2.0, 1.0]
    assert losses.loc["kl_delete", "n"].tolist() == [N]  # one value throughout is one group
    explanations = {"kl_delete", "write_norm", "rate", "cosine", "coefficient", "size_ratio", "position"}
    assert set(losses.index.get_level_values("by")) == explanations
    for name in explanations:
        here = losses.loc[name]
        assert here["n"].sum() == N and here["wins"].sum() == 30 and here["share_of_losses"].sum() == pytest.approx(1)
        assert ((here["from"] <= here["win_rate"]) & (here["win_rate"] <= here["to"]) | here["from"].isna()).all()
    ratio = table.loc[table["reading"] == "cache", "norm_atom_dominant_coef"] / np.asarray(table["write_norm"][:N])
    assert losses.loc[("size_ratio", 3), "high"] == pytest.approx(ratio.max())
    listed = ReplacementResult(table, 1, 2, {}).losses("cache", "listed").set_index(["by", "bin"])
    assert listed.loc[("cosine", 3), "high"] == table["cosine"].max()
    assert losses.loc[("cosine", 3), "high"] == table["cosine_dominant"].max()


def test_the_figure_shows_every_comparison_and_the_floor():
    one = result(others=("flat",))
    left, right = one.figure().axes
    assert [label.get_text() for label in left.get_xticklabels()] == ["in recurrence", "cache"]
    assert "floor" in [text.get_text() for text in left.get_legend().get_texts()]
    labels = [label.get_text() for label in right.get_yticklabels()]
    assert labels[0] == "listed, coef" and labels[-1] == "flat, given" and len(labels) == 7
    dots = [line for line in right.lines if line.get_linestyle() == "None" and len(line.get_xdata()) == 7]
    assert [line.get_xdata()[3] for line in dots] == [one.win_rate("in_recurrence"), one.win_rate("cache")]
