"""Erasure against plain full passes and by-hand choices, in float64, and its invariants on every rule."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_recurrent import StateEdit, WriteEdit
from tests.hooked_recurrent.models import ALL_LINEAR, RULES
from tests.writesae.evaluation.cells_for_tests import HEAD, LAYER, cell
from writesae.evaluation.acting.erasure import ErasureConfig, erasure
from writesae.evaluation.acting.erasure_plan import halves
from writesae.evaluation.acting.erasure_result import ErasureResult, slopes
from writesae.evaluation.describing.contexts import atom_coefficients
from writesae.evaluation.firings import encode_cell

pytestmark = pytest.mark.shapes_on_one_rule

SMALL = {"count": 2, "per_atom": 4, "writes": 2, "horizon": 2, "first_position": 2, "doses": (1.0, 2.0), "seed": 5}
STUDIES = {}


def study(layer_types=ALL_LINEAR, **more):
    """(model, sae, tokens, result), each made once."""
    key = (layer_types, *sorted(more.items()))
    if key not in STUDIES:
        model, sae, tokens = cell(layer_types, passages=5, length=13)
        model.requires_grad_(False)
        config = ErasureConfig(**{**SMALL, **more})
        STUDIES[key] = (model, sae, tokens, erasure(model, sae, tokens, layer=LAYER, head=HEAD, config=config))
    return STUDIES[key]


def edited_logits(model, sae, tokens, row, write):
    """Logits of a full pass with the row's intervention made by hand, as an edit of the state."""
    reading = "cache" if row["reading"] == "cache" else "in_recurrence"
    passage, t = int(row["passage"]), int(row["position"])
    if row["condition"] == "native":
        matrix = torch.zeros(3, 5, dtype=torch.float64)
    elif row["condition"] == "delete":
        matrix = -write
    else:
        atom = int(row["atom"] if row["condition"] == "atom" else row["control"])
        sign = -1 if row["test"] == "erase" else 1
        unit = sae.atom(atom).AB.detach() / sae.atom_norms()[atom].detach()
        matrix = sign * row["coefficient"] * unit * sae.atom_norms()[int(row["atom"])].detach()
    edit = StateEdit(LAYER, HEAD, t, "add", matrix=matrix, reading=reading)
    return model(tokens[passage : passage + 1], edits=[edit])[0]


@pytest.mark.parametrize("rule", RULES)
def test_every_row_equals_a_full_pass(rule):
    model, sae, tokens, result = study((rule, rule), count=1)
    writes, seen = encode_cell(model, sae, tokens, LAYER, HEAD), set()
    plain = model(tokens).log_softmax(-1)
    for row in result.table.to_dict("records"):
        kind = tuple(row[name] for name in ("test", "condition", "reading", "token_kind", "dose"))
        if kind in seen:
            continue
        seen.add(kind)
        passage, t = row["passage"], row["position"]
        write = torch.outer(writes.key[passage, t], writes.value[passage, t])
        after = edited_logits(model, sae, tokens, row, write).log_softmax(-1)
        span = {"in_recurrence": slice(t, t + 1), "cache": slice(t + 1, t + 2), "horizon": slice(t + 1, t + 3)}
        here = span[row["reading"]]
        before = plain[passage]
        change = after[here, row["token"]] - before[here, row["token"]]
        assert row["delta"] == pytest.approx(float(change.mean()), abs=1e-10)
        assert row["logprob_native"] == pytest.approx(float(before[here, row["token"]].mean()), abs=1e-10)
        ranks = (after[here] > after[here, row["token"], None]).sum(-1).double().mean()
        assert row["rank"] == pytest.approx(float(ranks))
        kl = (after[here].exp() * (after[here] - before[here])).sum(-1).mean()
        assert row["kl"] == pytest.approx(float(kl), abs=1e-10)
    assert len(seen) == 3 * (2 + 2 + 1 + 2 + 2 * 3)


def test_the_token_is_chosen_on_one_half_and_tested_on_the_other():
    model, sae, tokens, result = study()
    table, plain = result.table, model(tokens).log_softmax(-1)
    erased = table[table["test"] == "erase"]
    for atom, rows in erased.groupby("atom"):
        by_half = {half: set(mine["passage"]) for half, mine in rows.groupby("half")}
        assert set(by_half) == {"select", "test"} and not by_half["select"] & by_half["test"]
        deleted = rows[(rows["condition"] == "delete") & (rows["token_kind"] == "preferred")]
        for reading, offset in (("in_recurrence", 0), ("cache", 1)):
            lost = torch.zeros(29, dtype=torch.float64)
            mine = deleted[deleted["reading"] == reading]
            for row in mine[mine["half"] == "select"].itertuples():
                edit = WriteEdit(LAYER, HEAD, row.position, "delete", reading=reading)
                after = model(tokens[row.passage][None], edits=[edit])[0].log_softmax(-1)
                lost += plain[row.passage, row.position + offset] - after[row.position + offset]
            assert set(mine["token"]) == {int(lost.argmax())}, (atom, reading)
    written = table[table["test"] == "write"]
    for atom, rows in written.groupby("atom"):
        chosen = set(erased[(erased["atom"] == atom) & (erased["half"] == "select")]["passage"])
        assert not set(rows["passage"]) & chosen


def test_erased_where_it_fires_and_written_where_it_is_silent_at_its_median():
    model, sae, tokens, result = study()
    writes = encode_cell(model, sae, tokens, LAYER, HEAD)
    for row in result.table.itertuples():
        code = float(atom_coefficients(writes, row.atom)[row.passage, row.position])
        if row.test == "write":
            fires = atom_coefficients(writes, row.atom)[:, 2:10]
            assert code == 0 and row.coefficient == pytest.approx(row.dose * float(fires[fires > 0].median()))
        else:
            assert code == pytest.approx(row.coefficient) and code > 0
        assert row.control != row.atom


@pytest.mark.parametrize("rule", RULES)
def test_the_floor_is_a_floor(rule):
    result = study((rule, rule), count=1)[3]
    assert all(result.floor(reading) < 1e-10 for reading in ("in_recurrence", "cache", "horizon"))
    deleted = result.rows("erase", "in_recurrence")
    assert deleted[deleted["condition"] == "delete"]["delta"].abs().max() > 1e-6


def test_an_atom_has_the_same_trials_in_any_company():
    model, sae, tokens, result = study()
    atom = int(result.table["atom"].max())
    config = ErasureConfig(**{**SMALL, "atoms": (atom,), "readings": ("cache",)})
    alone = erasure(model, sae, tokens, layer=LAYER, head=HEAD, config=config).table
    table = result.table
    mine = table[(table["atom"] == atom) & (table["reading"] == "cache")].reset_index(drop=True)
    assert set(alone["reading"]) == {"cache"}
    pd.testing.assert_frame_equal(alone, mine, rtol=1e-9, atol=1e-10)


def test_small_doses_act_in_proportion():
    model, sae, tokens, _ = study()
    config = ErasureConfig(**{**SMALL, "doses": (1e-4, 2e-4), "readings": ("in_recurrence",)})
    rows = erasure(model, sae, tokens, layer=LAYER, head=HEAD, config=config).rows("write", "in_recurrence")
    rows = rows[(rows["condition"] == "atom") & (rows["token_kind"] == "preferred")]
    once, twice = (rows[rows["dose"] == dose]["delta"].to_numpy() for dose in (1e-4, 2e-4))
    assert np.allclose(twice, 2 * once, rtol=1e-2, atol=1e-12) and np.abs(once).max() > 0


def test_net_deletion_takes_the_erase_too():
    model, sae, tokens, result = study(form="net", readings=("in_recurrence",))
    rows = result.rows("erase", "in_recurrence")
    row = rows[(rows["condition"] == "delete")].iloc[0]
    edit = WriteEdit(LAYER, HEAD, int(row["position"]), "delete", form="net")
    text = tokens[int(row["passage"])][None]
    both = (logits.log_softmax(-1)[0, int(row["position"])] for logits in (model(text, edits=[edit]), model(text)))
    after, before = (logprobs[int(row["token"])] for logprobs in both)
    assert row["delta"] == pytest.approx(float(after - before), abs=1e-10)


def test_dense_atoms_and_atoms_of_rank_two():
    from writesae.evaluation.acting.atom_edits import adding

    for more in ({"rank": 2}, {"encoder": "linear", "decoder": "dense"}):
        model, sae, tokens = cell(passages=1, length=9, **more)
        expected = StateEdit(LAYER, HEAD, 4, "add", matrix=-1.5 * sae.atom(3).AB.detach())
        edits = adding(sae, 3, -1.5, layer=LAYER, head=HEAD, position=4)
        assert (model(tokens, edits=edits) - model(tokens, edits=[expected])).abs().max() < 1e-12
        assert (model(tokens, edits=edits) - model(tokens)).abs().max() > 1e-9
    with pytest.raises(IndexError, match="atom 12 is outside this dictionary of 12 atoms"):
        adding(sae, 12, 1.0, layer=LAYER, head=HEAD, position=4)


def test_result_travels_as_json(tmp_path):
    result = study(readings=("in_recurrence",), count=1)[3]
    back = ErasureResult.from_json(result.to_json(tmp_path / "erase.json"))
    pd.testing.assert_frame_equal(back.table, result.table)
    summary = back.summary(20)
    assert {row["half"] for row in summary} == {"test", "same_half"}
    assert result.figure().axes[0].get_title() == "erased at its firings"
    with pytest.raises(KeyError, match="no rows of test 'erase', reading 'cache' and half 'best'"):
        result.rows("erase", "cache", "best")


@given(delta=st.floats(-2, 2), doses=st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=1, unique=True))
def test_slopes_of_a_line_are_its_slope(delta, doses):
    rows = pd.DataFrame({"dose": doses, "delta": [delta * dose for dose in doses]})
    rows = rows.assign(atom=1, passage=0, position=3, token=7)
    assert slopes(rows)["delta"].tolist() == pytest.approx([delta])


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.integers(0, 99))
def test_halves_split_the_passages_that_fire(fires, seed):
    chosen = halves(torch.tensor(fires), torch.Generator().manual_seed(seed))
    assert int(chosen.sum()) == sum(fires) // 2 and not (chosen & ~torch.tensor(fires)).any()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"per_atom": 1}, "per_atom must be at least 2"),
        ({"doses": ()}, "doses must be different numbers greater than 0"),
        ({"doses": (1.0, -1.0)}, "doses must be different numbers"),
        ({"readings": ("cahce",)}, "did you mean 'cache'"),
        ({"form": "nett"}, "did you mean 'net'"),
    ],
)
def test_bad_configs(fields, words):
    with pytest.raises(ValueError, match=words):
        ErasureConfig(**fields)


def test_bad_studies():
    model, sae, tokens, _ = study()
    for atoms, error, words in (
        ((99,), IndexError, "atom 99 is outside this dictionary of 12 atoms"),
        (None, ValueError, "no atom fires in 4 passages"),
    ):
        with pytest.raises(error, match=words):
            config = ErasureConfig(**{**SMALL, "atoms": atoms})
            erasure(model, sae, tokens[:3], layer=LAYER, head=HEAD, config=config)
    with pytest.raises(ValueError, match="passages have 6 tokens; this test needs at least 8"):
        erasure(model, sae, tokens[:, :6], layer=LAYER, head=HEAD, config=ErasureConfig(**{**SMALL, "horizon": 4}))
