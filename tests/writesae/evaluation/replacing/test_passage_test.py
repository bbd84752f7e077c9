"""The passage test against plain full passes with the same writes changed by a hook, in float64, on every rule."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from tests.hooked_recurrent.models import HYBRID, RULES
from tests.writesae.evaluation.cells_for_tests import HEAD, LAYER, cell
from writesae.evaluation.firings import encode_cell
from writesae.evaluation.replacing.passage_test import (
    CONDITIONS,
    PassageTestConfig,
    PassageTestResult,
    _Test,
    passage_test,
)
from writesae.evaluation.replacing.population import median_cosines

pytestmark = pytest.mark.shapes_on_one_rule

CONFIG = PassageTestConfig(atoms=(1, 5), draws=2, first_position=3, seed=4)


@torch.no_grad()
def bits(model, text, first, hooks=()):
    logits = model.run_with_hooks(text[None], fwd_hooks=list(hooks))[0].log_softmax(-1)
    loss = [-float(logits[t, text[t + 1]]) / math.log(2) for t in range(first, len(text) - 1)]
    return sum(loss) / len(loss)


@pytest.mark.parametrize(("layer_types", "layer"), [*(((rule, rule), 1) for rule in RULES), (HYBRID, 0)])
def test_deleting_equals_a_hook_that_zeroes_the_writes(layer_types, layer):
    model, sae, tokens = cell(layer_types, layer=layer, length=12)
    seen = []
    result = passage_test(
        model, sae, tokens, layer=layer, head=HEAD, config=CONFIG, on_progress=lambda *now: seen.append(now)
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    codes = encode_cell(model, sae, tokens, layer, HEAD).codes
    table = result.table.set_index(["passage", "pool", "condition", "draw"])
    for pool in ("listed", "dominant"):
        for passage, text in enumerate(tokens):
            active = torch.isin(codes.indices[passage], torch.tensor(CONFIG.atoms)) & (codes.values[passage] > 0)
            strongest = active.any(-1) if pool == "listed" else active[:, 0]
            positions = [t for t in range(3, 11) if strongest[t]]
            if not positions:
                assert (passage, pool, "delete", 0) not in table.index
                continue

            def without(value, hook, positions=positions):
                value = value.clone()
                value[:, positions, HEAD] = 0.0
                return value

            row = table.loc[(passage, pool, "delete", 0)]
            native = bits(model, text, 3)
            edited = bits(model, text, 3, [(f"blocks.{layer}.mixer.hook_write_value", without)])
            assert row["n_edits"] == len(positions) and row["n_tokens"] == 8
            assert row["native_bits"] == pytest.approx(native, abs=1e-10)
            assert row["change"] == pytest.approx(edited - native, abs=1e-10)
            assert abs(table.loc[(passage, pool, "native", 0)]["change"]) < 1e-10


def test_atoms_stand_in_at_their_coefficients_even_of_rank_two():
    model, sae, tokens = cell(rank=2, length=12)
    config = PassageTestConfig(side="all", pools=("dominant",), draws=1, first_position=3)
    result = passage_test(model, sae, tokens, layer=LAYER, head=HEAD, config=config)
    codes = encode_cell(model, sae, tokens, LAYER, HEAD).codes
    passage, text = 1, tokens[1]
    positions = [t for t in range(3, 11) if codes.values[passage, t, 0] > 0]

    def put(write, hook):
        write = write.clone()
        for t in positions:
            atom = sae.atom(int(codes.indices[passage, t, 0])).AB
            write[:, t, HEAD] = codes.values[passage, t, 0] * atom
        return write

    rows = result.table[(result.table["passage"] == passage) & (result.table["condition"] == "atom")]
    expected = bits(model, text, 3, [(f"blocks.{LAYER}.mixer.hook_write", put)])
    assert float(rows["bits"].iloc[0]) == pytest.approx(expected, abs=1e-10)


def plans_of(config, **sizes):
    model, sae, tokens = cell(**sizes)
    writes = encode_cell(model, sae, tokens, LAYER, HEAD)
    test = _Test(model, sae, tokens, LAYER, HEAD, config, writes, torch.tensor(config.atoms))
    return test, [plan for passage in range(len(tokens)) for plan in test.plans(passage)]


def test_random_writes_have_the_native_norms_and_others_are_others():
    test, plans = plans_of(CONFIG)
    assert {plan.condition for plan in plans} == set(CONDITIONS)
    deleted = {(plan.passage, plan.pool): plan.positions for plan in plans if plan.condition == "delete"}
    drawn: dict[tuple, list] = {}
    for plan in plans:
        mine = deleted[plan.passage, plan.pool]
        if plan.condition == "delete_other":
            assert len(plan.positions) == len(mine) == len(set(plan.positions.tolist()))
            assert not set(plan.positions.tolist()) & set(mine.tolist())
            assert plan.positions.min() >= 3 and plan.positions.max() < 23
        else:
            assert torch.equal(plan.positions, mine)
        if plan.condition.startswith("random"):
            size = plan.key.norm(dim=-1) * plan.value.norm(dim=-1)
            assert torch.allclose(size[:, 0], test.writes.norms[plan.passage, mine])
            drawn.setdefault((plan.passage, plan.pool, plan.condition), []).append(plan.key)
    assert all(len(keys) == 2 and not torch.equal(*keys) for keys in drawn.values())
    natives = test.writes.key.flatten(0, 1)
    empirical = next(plan for plan in plans if plan.condition == "random_empirical")
    assert all(torch.isin(empirical.key[:, 0, d], natives[:, d]).all() for d in range(3))  # coordinate by coordinate


def test_no_row_where_too_few_other_writes_are_left():
    config = PassageTestConfig(atoms=tuple(range(12)), draws=1, first_position=3)
    _, plans = plans_of(config)
    assert not any(plan.condition == "delete_other" for plan in plans)


def test_what_is_drawn_depends_on_the_seed_and_on_nothing_beside_it():
    model, sae, tokens = cell(length=12)

    def run(tokens, **fields):
        config = PassageTestConfig(**{**CONFIG.to_dict(), **fields})
        return passage_test(model, sae, tokens, layer=LAYER, head=HEAD, config=config).table

    whole, one_pool = run(tokens), run(tokens, pools=("dominant",))
    same = whole[whole["pool"] == "dominant"].reset_index(drop=True)
    pd.testing.assert_frame_equal(same, one_pool, rtol=1e-9, atol=1e-12)
    other = run(tokens, seed=5)
    fixed = ~whole["condition"].str.startswith("random") & (whole["condition"] != "delete_other")
    assert np.allclose(whole["change"][fixed], other["change"][fixed], atol=1e-12)
    gaussian = whole["condition"] == "random_gaussian"
    assert not np.isclose(whole["change"][gaussian], other["change"][gaussian]).any()


def test_sides_are_parted_by_the_median_cosine():
    model, sae, tokens = cell()
    cosines = median_cosines(sae, encode_cell(model, sae, tokens, LAYER, HEAD), first=3)
    fields = {"layer": LAYER, "head": HEAD}
    atoms = {}
    for side in ("register", "bundle", "all"):
        config = PassageTestConfig(side=side, threshold=0.2, first_position=3, draws=1, pools=("listed",))
        atoms[side] = passage_test(model, sae, tokens, config=config, **fields).atoms
    assert atoms["register"] == sorted(atom for atom, cosine in cosines.items() if cosine >= 0.2)
    assert atoms["bundle"] == sorted(atom for atom, cosine in cosines.items() if cosine < 0.2)
    assert atoms["all"] == sorted(cosines) and atoms["register"] and atoms["bundle"]
    few = PassageTestConfig(side="all", most=3, first_position=3, draws=1, pools=("listed",))
    drawn = [passage_test(model, sae, tokens, config=few, **fields).atoms for _ in range(2)]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 3 and set(drawn[0]) <= set(cosines)


def made_up(changes):
    rows = []
    for condition, column in changes.items():
        for passage, draws in enumerate(column):
            for draw, change in enumerate(draws):
                row = {"passage": passage, "pool": "listed", "condition": condition, "draw": draw, "change": change}
                rows.append(row | {"n_edits": 2, "n_tokens": 10, "native_bits": 4.0, "bits": 4.0 + change})
    return PassageTestResult(pd.DataFrame(rows), 1, 2, CONFIG.to_dict(), atoms=[1, 5])


def test_numbers_of_a_made_up_table(tmp_path):
    result = made_up(
        {
            "native": [[0.0], [1e-9], [0.0]],
            "delete": [[0.1], [0.2], [0.3]],
            "random_gaussian": [[0.4, 0.6], [0.1, 0.1], [0.9, 1.1]],
            "delete_other": [[0.2], [], [0.2]],
        }
    )
    rows = {row["condition"]: row for row in result.summary(n_resamples=100)}
    gaussian, other = rows["random_gaussian"], rows["delete_other"]
    assert gaussian["change"] == pytest.approx(1.6 / 3) and gaussian["ratio"] == pytest.approx(1.6 / 0.6)
    assert gaussian["worse"] == 2 and gaussian["n_passages"] == 3 and gaussian["floor_max"] == pytest.approx(1e-9)
    assert gaussian["share_edited"] == pytest.approx(0.2) and gaussian["median"] == pytest.approx(0.5)
    assert gaussian["by_passage"][0] < gaussian["change"] < gaussian["by_passage"][1]
    assert gaussian["wilcoxon_p"] == pytest.approx(0.5)  # ranks 1 against 2 + 3 of three pairs, two-sided
    assert other["n_passages"] == 2 and other["worse"] == 1 and other["ratio"] == pytest.approx(1.0)
    assert "ratio" not in rows["delete"] and rows["delete"]["change"] == pytest.approx(0.2)
    again = PassageTestResult.from_json(result.to_json(tmp_path / "r.json"))
    assert again.atoms == [1, 5] and str(again.summary(n_resamples=100)) == str(result.summary(n_resamples=100))
    assert len(result.figure().axes) == 1


def test_bad_input_is_refused():
    model, sae, tokens = cell(length=12)
    run = lambda config, tokens=tokens: passage_test(model, sae, tokens, layer=LAYER, head=HEAD, config=config)  # noqa: E731
    with pytest.raises(IndexError, match="atom 12 is outside this dictionary of 12"):
        run(PassageTestConfig(atoms=(12,)))
    with pytest.raises(ValueError, match="needs at least 10"):
        run(PassageTestConfig(), tokens[:, :9])
    with pytest.raises(ValueError, match="no register atom"):
        run(PassageTestConfig(threshold=0.999))
    with torch.no_grad():
        sae.encoder.bias[3] = -1e9
    with pytest.raises(ValueError, match="none of the 1 atoms fires"):
        run(PassageTestConfig(atoms=(3,)))
    for fields, word in (
        ({"side": "left"}, "side"),
        ({"pools": ("x",)}, "pools"),
        ({"atoms": ()}, "atoms"),
        ({"most": 0}, "most"),
    ):
        with pytest.raises(ValueError, match=word):
            PassageTestConfig(**fields)
    with pytest.raises(ValueError, match="draws"):
        PassageTestConfig(draws=0)
    with pytest.raises(KeyError, match="no pool 'x'"):
        made_up({"native": [[0.0]]}).changes("x")
