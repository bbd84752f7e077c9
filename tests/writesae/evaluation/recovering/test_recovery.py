"""Matching and the experiment: known atoms are found, and what is not found is not counted."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from writesae import TrainConfig, WriteSAE, WriteSAEConfig
from writesae.evaluation.recovering.planted import Planted, PlantedAtoms
from writesae.evaluation.recovering.recovery import AS_LEARNED, SVD, VARIANTS, cosines_with, match, recovery
from writesae.evaluation.recovering.recovery_result import RecoveryResult

EASY = Planted(n_atoms=16, d_k=10, d_v=8, k=2)
SHORT = TrainConfig(steps=400, batch_size=64, dead_after=25, resample_every=50, calibration_writes=256)


# --- matching --------------------------------------------------------------------------------------------------


def test_one_learned_atom_cannot_be_two_in_an_assignment():
    found = match(torch.tensor([[0.99, 0.98], [0.1, 0.2]]), 0.95)
    assert (found.recovered, found.recovered_best) == (0.5, 1.0)
    assert found.mean_max_cosine == pytest.approx(0.985)


def test_the_assignment_maximises_the_sum_not_the_greedy_choice():
    # Greedy would give atom 0 its best, 0.99, and leave 0.5 for atom 1.
    assert match(torch.tensor([[0.99, 0.97], [0.96, 0.5]]), 0.95).recovered == 1.0


def test_the_sign_and_the_threshold_count():
    assert match(-torch.eye(3), 0.95).recovered == 0.0
    cosines = 0.9 * torch.eye(4)
    assert match(cosines, 0.95).recovered_best == 0.0 and match(cosines, 0.85).recovered == 1.0


@settings(max_examples=30, deadline=None)
@given(learned=st.integers(1, 8), planted=st.integers(1, 8), seed=st.integers(0, 1000))
def test_match_does_not_depend_on_order_and_never_exceeds_the_best_match(learned, planted, seed):
    generator = torch.Generator().manual_seed(seed)
    cosines = 2 * torch.rand(learned, planted, generator=generator) - 1
    found = match(cosines, 0.3)
    shuffled = cosines[torch.randperm(learned, generator=generator)][:, torch.randperm(planted, generator=generator)]
    again = match(shuffled, 0.3)
    assert found.recovered == pytest.approx(again.recovered)
    assert found.mean_max_cosine == pytest.approx(again.mean_max_cosine)
    assert found.recovered <= found.recovered_best + 1e-12
    assert found.recovered <= min(learned, planted) / planted


def test_nothing_to_match_is_refused():
    with pytest.raises(ValueError, match="some atoms"):
        match(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="finite"):
        match(torch.full((2, 2), float("nan")))


@pytest.mark.parametrize("rank", [1, 2])
def test_cosines_are_those_of_the_matrices_whatever_their_norm(rank):
    atoms = PlantedAtoms(EASY)
    sae = WriteSAE(WriteSAEConfig(d_k=10, d_v=8, n_atoms=6, k=2, rank=rank))
    with torch.no_grad():
        sae.key_atoms.mul_(torch.linspace(0.5, 3, 6)[:, None, None])
        sae.value_atoms[0] = 0
    learned = torch.stack([sae.atom(i).AB for i in range(6)]).flatten(1)
    planted = (atoms.key[:, :, None] * atoms.value[:, None, :]).flatten(1)
    expected = torch.nn.functional.cosine_similarity(learned[:, None], planted[None], dim=-1)
    found = cosines_with(sae, atoms)
    assert list(found) == [AS_LEARNED] and (found[AS_LEARNED][0] == 0).all()
    torch.testing.assert_close(found[AS_LEARNED], expected)


def test_dense_atoms_are_read_as_learned_and_by_their_leading_outer_product():
    atoms = PlantedAtoms(EASY)
    sae = WriteSAE(WriteSAEConfig.preset("flat", d_k=10, d_v=8, n_atoms=16, k=2))
    noise = torch.randn(16, 10, 8, generator=torch.Generator().manual_seed(0))
    planted = 3 * atoms.key[:, :, None] * atoms.value[:, None, :]
    with torch.no_grad():
        sae.decoder.atoms.copy_(planted + 0.2 * noise)
        sae.decoder.atoms[0] = 0
        sae.decoder.atoms[1] *= -1
    found = cosines_with(sae, atoms)
    flat = sae.decoder.atoms.flatten(1)
    expected = torch.nn.functional.cosine_similarity(flat[:, None], planted.flatten(1)[None], dim=-1)
    torch.testing.assert_close(found[AS_LEARNED], expected)
    own, leading = found[AS_LEARNED].diagonal(), found[SVD].diagonal()
    assert leading[0] == 0 and leading[1] < -0.9 and (leading[2:] > own[2:]).all() and leading[2:].min() > 0.9


# --- the experiment --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result():
    return recovery(EASY, ["bilinear", "flat"], seeds=(0, 1), train=SHORT, name="easy")


def test_planted_atoms_are_found_again(result):
    table = result.to_dataframe().set_index(["variant", "atoms", "seed"])
    assert list(table.index) == [
        ("bilinear", AS_LEARNED, 0),
        ("bilinear", AS_LEARNED, 1),
        *(("flat", reading, seed) for seed in (0, 1) for reading in (AS_LEARNED, SVD)),
    ]
    assert (table.loc["bilinear"]["recovered"] >= 0.8).all()
    assert (table.loc["bilinear"]["fvu"] < 0.2).all() and (table["l0"] <= 2).all() and (table["steps"] == 400).all()
    assert (table["recovered"] <= table["recovered_best"]).all()


def test_an_untrained_dictionary_finds_nothing():
    untrained = recovery(EASY, "bilinear", train=TrainConfig(steps=1, batch_size=8, calibration_writes=64))
    (row,) = untrained.summary()
    assert row["recovered"] == 0 and row["planted"] == "writes" and row["mean_max_cosine"] < 0.9


def test_the_same_seeds_give_the_same_table(result):
    again = recovery(EASY, {"own name": {}}, seeds=(1,), train={"own name": SHORT}, name="easy").to_dataframe()
    before = result.to_dataframe().query("variant == 'bilinear' and seed == 1").reset_index(drop=True)
    columns = [name for name in again.columns if name not in ("variant", "seconds")]
    assert again[columns].equals(before[columns]) and again["variant"].tolist() == ["own name"]


def test_the_summary_averages_over_seeds_and_names_the_worst(result):
    rows = {(row["variant"], row["atoms"]): row for row in result.summary()}
    assert set(rows) == {("bilinear", AS_LEARNED), ("flat", AS_LEARNED), ("flat", SVD)}
    own = result.to_dataframe().query("variant == 'flat' and atoms == 'svd'")
    row = rows["flat", SVD]
    assert row["recovered"] == pytest.approx(own["recovered"].mean()) and row["worst"] == own["recovered"].min()
    assert row["n_seeds"] == 2 and row["planted"] == "easy"


def test_json_and_markdown_hold_the_result(result, tmp_path):
    path = result.to_json(tmp_path / "recovery.json")
    content = json.loads(path.read_text())
    assert content["threshold"] == 0.95 and len(content["records"]) == len(result.table)
    assert content["config"]["easy"]["planted"] == EASY.to_dict()
    assert content["config"]["easy"]["train"]["flat"]["steps"] == 400
    assert [row["variant"] for row in content["summary"]] == ["bilinear", "flat", "flat"]
    lines = result.to_markdown().splitlines()
    assert len(lines) == 2 + 3 and lines[-1].startswith("| easy | flat | svd | ")


def test_json_reads_back(result, tmp_path):
    again = RecoveryResult.from_json(result.to_json(tmp_path / "recovery.json"))
    for row, before in zip(again.summary(), result.summary(), strict=True):
        assert row == pytest.approx(before)
    assert again.threshold == result.threshold
    assert again.config["easy"]["variants"] == result.config["easy"]["variants"]


def test_results_join_where_they_fit(result):
    about = result.config["easy"]
    other = RecoveryResult(result.table.assign(planted="other"), 0.95, {"other": about})
    more = RecoveryResult(
        result.table.assign(variant="more"), 0.95, {"easy": {**about, "variants": {"more": {}}, "train": {"more": {}}}}
    )
    both = RecoveryResult.joined([result, other, more])
    assert len(both.summary()) == 3 + 3 + 2 and set(both.config) == {"easy", "other"}
    assert set(both.config["easy"]["variants"]) == set(both.config["easy"]["train"]) == {"bilinear", "flat", "more"}
    with pytest.raises(ValueError, match="one threshold"):
        RecoveryResult.joined([result, RecoveryResult(result.table, 0.9)])
    with pytest.raises(ValueError, match="one threshold"):
        RecoveryResult.joined([])
    different = {"easy": {**about, "planted": Planted(k=1).to_dict()}}
    with pytest.raises(ValueError, match="called 'easy' were planted differently"):
        RecoveryResult.joined([result, RecoveryResult(result.table, 0.95, different)])


def test_what_cannot_be_run_is_refused():
    with pytest.raises(ValueError, match="did you mean 'bilinear_tied'"):
        recovery(EASY, ["bilinear_tie"])
    with pytest.raises(ValueError, match="a variant and a seed, got 0 and 1"):
        recovery(EASY, [])
    with pytest.raises(ValueError, match="a variant and a seed, got 1 and 0"):
        recovery(EASY, "flat", seeds=())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs(variant):
    train = TrainConfig(steps=3, batch_size=16, calibration_writes=32)
    rows = recovery(EASY, variant, train=train).summary()
    assert [row["atoms"] for row in rows] == ([AS_LEARNED, SVD] if "flat" in variant else [AS_LEARNED])
    assert all(0 <= row["recovered"] <= 1 and row["fvu"] > 0 for row in rows)


@pytest.mark.slow
def test_the_promise():
    """512 atoms at d = 64, k = 8, 1% noise: at least 95% are found at cosine > 0.95."""
    result = recovery(Planted(), "bilinear", train=TrainConfig(steps=1500))
    assert result.summary()[0]["recovered"] >= 0.95
