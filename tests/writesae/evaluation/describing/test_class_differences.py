"""Register against bundle on made tables with planted differences, and on real results of one cell."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tests.writesae.evaluation.cells_for_tests import HEAD, LAYER, cell
from writesae.evaluation.describing.class_differences import (
    MEASURES,
    ClassDifferencesConfig,
    ClassDifferencesResult,
    class_differences,
)
from writesae.evaluation.describing.partition import PartitionConfig, partition
from writesae.evaluation.describing.partition_result import PartitionResult
from writesae.evaluation.replacing.replacement import ReplacementConfig, replacement
from writesae.evaluation.replacing.replacement_result import ReplacementResult
from writesae.evaluation.statistics import cliffs_delta, holm

FAST = ClassDifferencesConfig(n_resamples=50)


def made(n_register=12, n_bundle=15, gap=1.0, per_atom=6, seed=0, layer=1):
    """Register atoms 0.. whose deletion costs `gap` nats more; 5 dead atoms behind."""
    rng = np.random.default_rng(seed)
    labels = ["register"] * n_register + ["bundle"] * n_bundle + ["null"] * 5
    atoms = pd.DataFrame({"atom": range(len(labels)), "mixture_additive": labels, "threshold_additive": labels})
    atoms["firings"] = rng.integers(1, 100, len(atoms))
    atoms["cosine_additive"] = np.where(atoms["mixture_additive"] == "register", 0.4, 0.0) + rng.normal(
        0, 0.02, len(atoms)
    )
    tested = np.repeat(np.arange(n_register + n_bundle), per_atom)
    rows = pd.DataFrame({"atom": tested, "reading": "in_recurrence"})
    rows["kl_atom_listed_coef"] = rows["kl_atom_listed_norm"] = rng.uniform(0.1, 0.2, len(rows))
    rows["kl_delete"] = rng.uniform(0.3, 0.4, len(rows)) + gap * (tested < n_register)
    rows["flip_delete"] = rng.integers(0, 2, len(rows)).astype(float)
    rows["flip_atom_listed_coef"] = rows["flip_atom_listed_norm"] = rng.integers(0, 2, len(rows)).astype(float)
    return ReplacementResult(rows, layer, 2, {}), PartitionResult(atoms, 1, 2, {})


def test_a_planted_difference_is_found_and_its_absence_too():
    rows = {row["measure"]: row for row in class_differences(*made(), config=FAST).summary()}
    assert rows["delta_kl"]["cliffs_delta"] == rows["kl_delete"]["cliffs_delta"] == 1
    assert rows["delta_kl"]["p_holm"] < 0.01
    assert rows["delta_kl"]["median_register"] - rows["delta_kl"]["median_bundle"] == pytest.approx(1, abs=0.1)
    assert (
        rows["kl_atom"]["p_holm"] > 0.05
        and rows["kl_atom"]["delta_interval"][0] < 0 < rows["kl_atom"]["delta_interval"][1]
    )
    assert (rows["kl_atom"]["n_register"], rows["kl_atom"]["n_bundle"]) == (12, 15)
    assert rows["kl_delete"]["interval_register"][0] <= rows["kl_delete"]["median_register"]
    reversed_sign = {row["measure"]: row for row in class_differences(*made(gap=-0.25), config=FAST).summary()}
    assert reversed_sign["delta_kl"]["cliffs_delta"] == -1


def test_numbers_are_those_of_their_definitions():
    test, parts = made(seed=3)
    result = class_differences(test, parts, config=FAST)
    rows = test.table
    for atom, row in result.table.set_index("atom").iterrows():
        mine = rows[rows["atom"] == atom]
        assert row["delta_kl"] == pytest.approx((mine["kl_delete"] - mine["kl_atom_listed_coef"]).median())
        assert row["flip_delete"] == pytest.approx(mine["flip_delete"].mean()) and row["tested"] == len(mine)
        assert row["firings"] == parts.table.loc[atom, "firings"]
    summary = result.summary()
    measured = [row for row in summary if row["measure"] in MEASURES]
    for row in measured:
        first, second = (result.group(label)[row["measure"]] for label in ("register", "bundle"))
        assert row["p"] == pytest.approx(stats.mannwhitneyu(first, second).pvalue)
        assert row["cliffs_delta"] == pytest.approx(cliffs_delta(first, second))
    assert [row["p_holm"] for row in measured] == pytest.approx(holm([row["p"] for row in measured]))
    both = result.table
    assert summary[-2]["correlation"] == pytest.approx(stats.spearmanr(both["cosine"], both["firings"]).statistic)
    assert summary[-1]["correlation"] == pytest.approx(stats.pearsonr(both["cosine"], both["flip_delete"]).statistic)


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 1000))
def test_swapping_the_labels_turns_every_delta_round(seed):
    test, parts = made(seed=seed, n_register=5, n_bundle=6, per_atom=3)
    swapped = {"register": "bundle", "bundle": "register", "null": "null"}
    other = PartitionResult(parts.table.assign(mixture_additive=parts.table["mixture_additive"].map(swapped)), 1, 2, {})
    config = ClassDifferencesConfig(n_resamples=5)
    pairs = zip(*(class_differences(test, p, config=config).summary() for p in (parts, other)), strict=True)
    for one, two in list(pairs)[: len(MEASURES)]:
        assert one["cliffs_delta"] == pytest.approx(-two["cliffs_delta"])
        assert one["p"] == pytest.approx(two["p"])


def test_order_of_the_firings_does_not_matter():
    test, parts = made()
    shuffled = ReplacementResult(test.table.sample(frac=1, random_state=1), 1, 2, {})
    one, other = (class_differences(t, parts, config=FAST).summary() for t in (test, shuffled))
    assert one == other


def test_dead_atoms_and_those_tested_too_little_do_not_count():
    test, parts = made()
    few = test.table[(test.table["atom"] > 2) | (test.table.groupby("atom").cumcount() < 2)]
    config = ClassDifferencesConfig(n_resamples=5, min_tested=3)
    result = class_differences(ReplacementResult(few, 1, 2, {}), parts, config=config)
    assert len(result.group("register")) == 9 and set(result.table["label"]) == {"register", "bundle"}
    with pytest.raises(KeyError, match="register and bundle"):
        result.group("null")


def test_on_real_results_of_one_cell(tmp_path):
    model, sae, tokens = cell(passages=4)
    parts = partition(model, sae, tokens, layer=LAYER, head=HEAD, config=PartitionConfig(first_position=2))
    where = {"layer": LAYER, "head": HEAD}
    test = replacement(model, sae, tokens, **where, config=ReplacementConfig(total=24, horizon=2, first_position=2))
    result = class_differences(test, parts, config=FAST)
    again = ClassDifferencesResult.from_json(result.to_json(tmp_path / "result.json"))
    assert [row["measure"] for row in again.summary()] == [row["measure"] for row in result.summary()]
    assert len(result.figure().axes) == len(MEASURES)


def test_results_that_do_not_belong_together_are_refused():
    test, parts = made(layer=0)
    with pytest.raises(ValueError, match="test is of layer 0, head 2, the partition of layer 1, head 2"):
        class_differences(test, parts)
    test, parts = made(n_register=1)
    with pytest.raises(ValueError, match="1 tested atoms are register"):
        class_differences(test, parts)
    test, parts = made()
    with pytest.raises(KeyError, match="no reading 'cache'"):
        class_differences(test, parts, config=ClassDifferencesConfig(reading="cache"))
    stranger = ReplacementResult(test.table.assign(atom=test.table["atom"] + 100), 1, 2, {})
    with pytest.raises(ValueError, match="another dictionary's"):
        class_differences(stranger, parts)
    with pytest.raises(ValueError, match="did you mean 'mixture'"):
        ClassDifferencesConfig(cut="mixtures")
