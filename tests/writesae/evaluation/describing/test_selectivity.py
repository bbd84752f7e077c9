"""Selectivity against plain full passes, and the checks that show what it can and cannot tell, in float64."""

import pytest
import torch

from tests.hooked_recurrent.models import RULES
from tests.writesae.evaluation.cells_for_tests import HEAD, LAYER, cell
from writesae import WriteSAE, WriteSAEConfig
from writesae.evaluation.describing.selectivity import (
    ADDED,
    CHECK,
    PAIRS,
    SelectivityConfig,
    SelectivityResult,
    _draw,
    selectivity,
)
from writesae.evaluation.firings import encode_cell, sample_firings

pytestmark = pytest.mark.shapes_on_one_rule

SIZES = (1, 3, 8)
CONFIG = SelectivityConfig(sizes=SIZES, total=6, first_position=2, seed=3)


def run(model, sae, tokens, config=CONFIG, **more):
    return selectivity(model, sae, tokens, layer=LAYER, head=HEAD, config=config, **more)


def drawn(model, sae, tokens, config=CONFIG):
    """(firing, what is added) for every tested firing."""
    writes = encode_cell(model, sae, tokens, LAYER, HEAD)
    last = tokens.shape[1] - 1
    wanted = {"first": 2, "last": last, "atoms": None, "per_atom": 2, "total": config.total, "seed": config.seed}
    generator = torch.Generator().manual_seed(config.seed)
    firings = sample_firings(writes, **wanted)
    return writes, [(firing, _draw(sae, writes, firing, config, generator)) for firing in firings]


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_overlaps_are_those_of_full_passes(rule, rank):
    model, sae, tokens = cell((rule, rule), rank=rank)
    ranked = "absolute" if rank == 1 else "raised"
    config = SelectivityConfig(**{**CONFIG.to_dict(), "ranked": ranked})
    table = run(model, sae, tokens, config).table
    _, tested = drawn(model, sae, tokens, config)
    assert len(table) == len(tested) * len(PAIRS) and len(tested) > 3
    for index, (firing, added) in enumerate(tested):
        text, t = tokens[firing.passage : firing.passage + 1], firing.position
        plain, shifts = model(text)[0, t], {}
        for name in ADDED:
            matrix = added[name].key.T @ added[name].value

            def write(x, hook, t=t, matrix=matrix):
                changed = x.clone()
                changed[0, t, HEAD] += matrix
                return changed

            edited = model.run_with_hooks(text, fwd_hooks=[(f"blocks.{LAYER}.mixer.hook_write", write)])
            shifts[name] = edited[0, t] - plain
        rows = table.iloc[index * len(PAIRS) : (index + 1) * len(PAIRS)].set_index("pair")
        assert (rows["passage"] == firing.passage).all() and (rows["floor"] < 1e-12).all()
        for pair, names in PAIRS.items():
            sets = [shifts[name].abs() if ranked == "absolute" else shifts[name] for name in names]
            for size in SIZES:
                first, second = (set(values.argsort(descending=True)[:size].tolist()) for values in sets)
                assert rows.loc[pair, f"selectivity_{size}"] == pytest.approx(1 - len(first & second) / size)
            assert rows.loc[pair, "shift_first"] == pytest.approx(float(shifts[names[0]].square().mean().sqrt()))


@pytest.mark.parametrize("rank", [1, 2])
def test_controls_have_the_atoms_norm_and_are_what_they_say(rank):
    model, sae, tokens = cell(rank=rank)
    with torch.no_grad():
        sae.decoder.key_atoms.mul_(torch.linspace(0.5, 2, 12)[:, None, None])  # norms are never assumed
    for scale in ("unit", "norm"):
        config = SelectivityConfig(**{**CONFIG.to_dict(), "scale": scale, "epsilon": 0.7})
        writes, tested = drawn(model, sae, tokens, config)
        for firing, added in tested:
            norm = 0.7 * (1.0 if scale == "unit" else float(writes.norms[firing.passage, firing.position]))
            for name in ADDED:
                assert added[name].norm() == pytest.approx(norm / 2 if name == "half_atom" else norm)
            assert abs(added["atom"].cosine(added["orthogonal"])) < 1e-12
            assert (added["orthogonal"].key @ sae.key_atoms[firing.atom].T).abs().max() < 1e-7
            assert added["atom"].cosine(added["half_atom"]) == pytest.approx(1)
            others = [added["other_atom"].cosine(added[name]) for name in ("atom", "gaussian")]
            assert max(others) < 1 - 1e-6
            assert abs(added["gaussian"].cosine(added["second_gaussian"])) < 1 - 1e-6


def test_an_atom_against_itself_overlaps_where_edits_are_small():
    model, sae, tokens = cell()
    config = SelectivityConfig(**{**CONFIG.to_dict(), "epsilon": 1e-5})
    table = run(model, sae, tokens, config).table
    own = table[table["pair"] == "atom~half_atom"]
    assert (own["selectivity_8"] == 0).all()  # linear: half the edit is half the shift
    assert (own["shift_first"] / own["shift_second"]).between(1.99, 2.01).all()
    assert (table.loc[table["pair"] == CHECK, "selectivity_1"] > 0).any()


def test_summary_file_figure_and_progress(tmp_path):
    model, sae, tokens = cell()
    told = []
    result = run(model, sae, tokens, on_progress=lambda *progress: told.append(progress))
    assert told[-1] == (6 * 7, 6 * 7)
    rows = {(row["pair"], row["K"]): row for row in result.summary(n_resamples=50)}
    assert set(rows) == {(pair, size) for pair in PAIRS for size in SIZES}
    assert rows[CHECK, 3]["minus_check"] == 0 and rows[CHECK, 3]["chance"] == pytest.approx(1 - 3 / 29)
    mine = result.table[result.table["pair"] == "atom~gaussian"]["selectivity_3"].to_numpy()
    check = result.table[result.table["pair"] == CHECK]["selectivity_3"].to_numpy()
    row = rows["atom~gaussian", 3]
    assert row["selectivity"] == pytest.approx(mine.mean())
    assert row["minus_check"] == pytest.approx((mine - check).mean())
    assert row["interval"][0] <= row["selectivity"] <= row["interval"][1]
    again = SelectivityResult.from_json(result.to_json(tmp_path / "result.json"))
    assert again.vocabulary == 29 and again.summary(n_resamples=50)[4]["n"] == 6
    assert len(result.figure().axes[0].lines) == len(PAIRS)


def test_what_cannot_be_compared_is_refused():
    model, sae, tokens = cell()
    with pytest.raises(ValueError, match="30 tokens is larger than the vocabulary, 29"):
        run(model, sae, tokens, SelectivityConfig(sizes=(30,)))
    dense = WriteSAE(WriteSAEConfig(d_k=3, d_v=5, n_atoms=4, k=2, decoder="dense", encoder="linear")).double()
    with pytest.raises(ValueError, match="dense"):
        run(model, dense, tokens)
    single = WriteSAE(WriteSAEConfig(d_k=3, d_v=5, n_atoms=1, k=1)).double()
    with pytest.raises(ValueError, match="single atom"):
        run(model, single, tokens)
    with pytest.raises(ValueError, match="did you mean 'raised'"):
        SelectivityConfig(ranked="raise")
    with pytest.raises(ValueError, match="sizes is empty"):
        SelectivityConfig(sizes=())
