"""The population test: its numbers by hand on a made-up table, its choice of atoms, and a run on every rule."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests.hooked_recurrent.models import RULES
from tests.writesae.evaluation.cells_for_tests import HEAD, LAYER, cell
from writesae.evaluation.firings import encode_cell
from writesae.evaluation.replacing.population import (
    BINS,
    PopulationConfig,
    PopulationResult,
    bins,
    firing_cosines,
    median_cosines,
    population,
    population_of,
    stratified,
)
from writesae.evaluation.replacing.replacement_result import ReplacementResult

pytestmark = pytest.mark.shapes_on_one_rule

CONFIG = PopulationConfig(n_atoms=6, per_atom=4, min_firings=2, horizon=3, first_position=2, seed=3)
# atom: (cosines of its firings, which of them it wins)
MADE_UP = {
    0: ([-0.3, -0.1, 0.4], [1, 1, 1]),  # median -0.1
    1: ([0.04, 0.04, 0.06], [0, 0, 1]),  # 0.04: bundle
    2: ([0.05, 0.05, 0.05, 0.05], [1, 1, 0, 0]),  # 0.05 itself: register
    3: ([0.9, 0.25, 0.2], [1, 1, 0]),  # 0.25
    4: ([0.5], [0]),  # one firing: does not count
    5: ([0.3, 0.3], [1, 1]),
}


def made_up():
    rows = []
    for atom, (cosines, wins) in MADE_UP.items():
        for index, (cosine, won) in enumerate(zip(cosines, wins, strict=True)):
            row = {"firing_id": len(rows), "atom": atom, "dominant": 9, "passage": index, "reading": "in_recurrence"}
            row |= {"cosine": cosine, "cosine_dominant": 0.5, "coefficient": 1.0, "dominant_coefficient": 2.0}
            rows.append(row | {"kl_native": 0.0, "kl_delete": 2.0, "kl_atom_listed_coef": 1.0 if won else 3.0})
            rows[-1]["kl_atom_listed_norm"] = 3.0
    return ReplacementResult(pd.DataFrame(rows), 1, 2, {"horizon": 3, "seed": 7}, {"model": "m"})


def test_numbers_of_a_made_up_table():
    result = population_of(made_up(), CONFIG)
    assert result.config["seed"] == 7 and result.config["min_firings"] == 2 and result.about == {"model": "m"}
    atoms = result.atoms().set_index("atom")
    assert list(atoms.index) == [0, 1, 2, 3, 5]
    assert list(atoms["side"]) == ["bundle", "bundle", "register", "register", "register"]
    assert list(atoms["bin"]) == [BINS[index] for index in (0, 1, 2, 3, 4)]
    rates = np.array([1, 1 / 3, 0.5, 2 / 3, 1])
    rows = {row["part"]: row for row in result.summary(n_resamples=200)}
    assert list(rows) == ["all", "register", "bundle", *BINS]
    whole = rows["all"]
    assert whole["n_atoms"] == 5 and whole["n_firings"] == 15
    assert whole["win_rate"] == pytest.approx(rates.mean()) and whole["median"] == pytest.approx(2 / 3)
    assert whole["range"] == [pytest.approx(1 / 3), 1.0]
    assert whole["firing_rate"] == pytest.approx(10 / 15)
    low, high = whole["by_atom"]
    assert low < whole["win_rate"] < high and whole["by_passage"][0] < 10 / 15 < whole["by_passage"][1]
    cosine = [-0.1, 0.04, 0.05, 0.25, 0.3]
    assert whole["mann_whitney_p"] == pytest.approx(stats.mannwhitneyu(rates[2:], rates[:2]).pvalue)
    assert whole["pearson"] == pytest.approx(stats.pearsonr(rates, cosine)[0])
    assert whole["spearman_p"] == pytest.approx(stats.spearmanr(rates, cosine)[1])
    assert rows["register"]["win_rate"] == pytest.approx(rates[2:].mean())
    assert rows["bundle"]["firing_rate"] == pytest.approx(4 / 6)
    assert [rows[name]["n_atoms"] for name in BINS] == [1, 1, 1, 1, 1]
    assert np.isnan(rows[BINS[0]]["by_atom"]).all()  # one atom has no interval


def test_other_scales_and_thresholds_are_read_off_the_same_table():
    other = PopulationConfig(min_firings=3, threshold=0.04, scale="norm")
    result = population_of(made_up(), other)
    assert result.atoms()["win_rate"].eq(0).all() and len(result.atoms()) == 4
    assert list(result.atoms()["side"]) == ["bundle", "register", "register", "register"]
    row = result.summary(n_resamples=50)[0]
    assert row["win_rate"] == 0 and np.isnan(row["pearson"])  # nothing varies


def test_too_few_firings_and_bad_configs_are_refused():
    with pytest.raises(ValueError, match="no atom was tested on 5 firings; the most of any atom is 4"):
        population_of(made_up())
    with pytest.raises(ValueError, match="'listed' or 'dominant'"):
        PopulationConfig(pool="lists")
    for field in ("n_atoms", "per_atom", "min_firings", "horizon"):
        with pytest.raises(ValueError, match=field):
            PopulationConfig(**{field: 0})
    with pytest.raises(ValueError, match="form"):
        PopulationConfig(form="gross")


def test_edges_belong_to_the_upper_stretch():
    assert list(bins([-0.01, 0.0, 0.049, 0.05, 0.199, 0.2, 0.299, 0.3, 1.0])) == [0, 1, 1, 2, 2, 3, 3, 4, 4]


@given(
    st.dictionaries(st.integers(0, 200), st.floats(-1, 1), min_size=1, max_size=60), st.integers(1, 70), st.integers(0)
)
def test_stratified_is_as_even_as_the_stretches_allow(cosines, count, seed):
    chosen = stratified(cosines, count, seed)
    assert len(set(chosen)) == len(chosen) == min(count, len(cosines))
    assert list(chosen) == sorted(chosen) and set(chosen) <= set(cosines)
    assert chosen == stratified(dict(reversed(cosines.items())), count, seed)
    there = np.bincount(bins(list(cosines.values())), minlength=5)
    taken = np.bincount(bins([cosines[atom] for atom in chosen]), minlength=5)
    left = taken[there > taken]  # a stretch with atoms to spare has no fewer than any other, up to one
    assert not len(left) or left.min() >= taken.max() - 1


def test_stratified_depends_on_the_seed():
    cosines = dict.fromkeys(range(50), 0.1)
    assert stratified(cosines, 10, 0) != stratified(cosines, 10, 1)


@pytest.mark.parametrize("rank", [1, 2])
def test_cosines_are_those_of_the_matrices(rank):
    model, sae, tokens = cell(rank=rank)
    with torch.no_grad():
        sae.decoder.key_atoms.mul_(torch.linspace(0.5, 2, 12)[:, None, None])  # no unit norm is assumed
    writes = encode_cell(model, sae, tokens, LAYER, HEAD)
    found = firing_cosines(sae, writes)
    by_hand: dict[int, list[float]] = {}
    for passage in range(len(tokens)):
        for t in range(tokens.shape[1]):
            write = torch.outer(writes.key[passage, t], writes.value[passage, t])
            for slot in range(4):
                expected = 0.0
                if writes.codes.values[passage, t, slot] > 0:
                    number = int(writes.codes.indices[passage, t, slot])
                    atom = sae.atom(number).AB
                    expected = float((atom * write).sum() / atom.norm() / write.norm())
                    if 2 <= t <= 18:
                        by_hand.setdefault(number, []).append(expected)
                assert float(found[passage, t, slot]) == pytest.approx(expected, abs=1e-10)
    medians = median_cosines(sae, writes, first=2, last=18)
    assert medians == {atom: pytest.approx(np.median(values)) for atom, values in by_hand.items()}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_and_back_from_a_file(rule, tmp_path):
    model, sae, tokens = cell((rule, rule), length=16)
    seen = []
    config = PopulationConfig(**{**CONFIG.to_dict(), "n_atoms": 3, "per_atom": 3, "horizon": 1})
    told = lambda *progress: seen.append(progress)  # noqa: E731
    result = population(model, sae, tokens, layer=LAYER, head=HEAD, config=config, on_progress=told)
    assert seen[-1][0] == seen[-1][1] == result.table["firing_id"].nunique()
    assert result.table["atom"].nunique() == 3
    assert result.table.groupby("atom")["firing_id"].nunique().max() <= 3
    rows = result.summary(n_resamples=20)
    assert {row["reading"] for row in rows} == {"in_recurrence", "cache", "horizon"} and len(rows) == 24
    assert rows[0]["floor_max"] < 1e-12
    later = result.table[result.table["reading"] == "horizon"]
    mine = result.atoms("horizon")
    won = (later["kl_atom_listed_coef"] < later["kl_delete"])[later["atom"].isin(mine["atom"])]
    assert (mine["win_rate"] * mine["firings"]).sum() == pytest.approx(won.sum())
    again = PopulationResult.from_json(result.to_json(tmp_path / "p.json"))
    pd.testing.assert_frame_equal(again.atoms(), result.atoms())
    assert again.config == json.loads(json.dumps(result.config))
    assert result.figure().axes[0].get_xlabel()
