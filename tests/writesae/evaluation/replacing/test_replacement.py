"""The replacement test of dictionaries of every kind: its conditions, its table, what it refuses. In float64."""

from functools import cache

import pytest
import torch

from tests.hooked_recurrent.models import RULES
from tests.writesae.evaluation.cells_for_tests import HEAD, LAYER, cell
from writesae.evaluation.firings import encode_cell, sample_firings
from writesae.evaluation.outputs import compare
from writesae.evaluation.replacing.exchange import READINGS
from writesae.evaluation.replacing.replacement import ReplacementConfig, replacement
from writesae.evaluation.replacing.substitutes import CONDITIONS, LowRank, Substitutes

pytestmark = pytest.mark.shapes_on_one_rule

CONFIG = ReplacementConfig(per_atom=2, total=8, horizon=3, first_position=2, seed=3)
STATE = {"hook": f"blocks.{LAYER}.mixer.hook_state"}
NET = {"hook": f"blocks.{LAYER}.mixer.hook_write", "form": "net"}


def config(**changes):
    return ReplacementConfig(**{**CONFIG.to_dict(), **changes})


@torch.no_grad()
def kl(edited, plain):
    after, before = edited.double().log_softmax(-1), plain.double().log_softmax(-1)
    return float((after.exp() * (after - before)).sum(-1))


def firings_of(writes, tokens, settings=CONFIG):
    last = tokens.shape[1] - 2 - settings.horizon
    bounds = {"first": settings.first_position, "last": last, "atoms": None}
    return sample_firings(writes, **bounds, per_atom=settings.per_atom, total=settings.total, seed=settings.seed)


def written_instead(model, text, t, matrix):
    """Logits at t with another matrix in the place of the write."""

    def put(writes, hook):
        writes[:, t, HEAD] = matrix
        return writes

    with torch.no_grad():
        return model.run_with_hooks(text, fwd_hooks=[(f"blocks.{LAYER}.mixer.hook_write", put)])[0, t]


@cache
def outcome(**sae):
    model, dictionary, tokens = cell(length=16, **sae)
    return model, dictionary, tokens, replacement(model, dictionary, tokens, layer=LAYER, head=HEAD, config=CONFIG)


@pytest.mark.parametrize(("origin", "form"), [({}, "additive"), (NET, "net"), (STATE, "additive")])
@pytest.mark.parametrize("rule", RULES)
def test_dictionaries_of_writes_of_net_writes_and_of_states(rule, origin, form):
    model, sae, tokens = cell((rule, rule), length=14)
    sae.provenance |= origin
    settings = config(total=4)
    result = replacement(model, sae, tokens, layer=LAYER, head=HEAD, config=settings)
    assert result.config["form"] == form
    writes = encode_cell(model, sae, tokens, LAYER, HEAD, net=True)
    firings = firings_of(writes, tokens, settings)
    assert [firing.coefficient for firing in firings] == result.reading("cache")["coefficient"].tolist()
    for reading in READINGS:
        assert result.floor(reading)[1] < 1e-12
        assert (result.reading(reading)["kl_delete"] > 1e-9).any()
    natives = [writes.native(firing.passage, firing.position, form) for firing in firings]
    assert result.reading("horizon")["write_norm"].tolist() == [native.norm() for native in natives]
    if form == "additive":
        row, atom = result.reading("in_recurrence").iloc[-1], sae.atom(firings[-1].atom).AB
        text, t = tokens[firings[-1].passage][None], firings[-1].position
        edited = written_instead(model, text, t, row["coefficient"] * atom)
        assert row["kl_atom_listed_coef"] == pytest.approx(kl(edited, model(text)[0, t]), abs=1e-11)


def test_the_table_has_a_row_per_firing_and_reading_and_says_where_it_comes_from():
    model, sae, tokens, result = outcome()
    writes = encode_cell(model, sae, tokens, LAYER, HEAD)
    firings = firings_of(writes, tokens)
    assert len(firings) == CONFIG.total and len(result.table) == len(firings) * len(READINGS)
    assert result.table["reading"].tolist() == [*READINGS] * len(firings)
    assert result.table["firing_id"].tolist() == [index for index in range(len(firings)) for _ in READINGS]
    dense = writes.codes.dense(12)
    for firing, (_, row) in zip(firings, result.reading("cache").iterrows(), strict=True):
        assert (row["atom"], row["passage"], row["position"]) == (firing.atom, firing.passage, firing.position)
        assert row["token"] == tokens[firing.passage, firing.position]
        assert row["rate"] == pytest.approx((dense[..., firing.atom] > 0).double().mean().item())
        assert row["rate_dominant"] == pytest.approx((dense[..., firing.dominant] > 0).double().mean().item())
        native = torch.outer(writes.key[firing.passage, firing.position], writes.value[firing.passage, firing.position])
        atom = sae.atom(firing.atom).AB
        assert row["cosine"] == pytest.approx((native * atom).sum().item() / native.norm().item() / atom.norm().item())


def test_fewer_readings_cost_nothing_else_and_give_the_same_numbers():
    model, sae, tokens, whole = outcome()
    told = []
    for readings in (("horizon",), ("cache", "in_recurrence")):
        part = replacement(
            model,
            sae,
            tokens,
            layer=LAYER,
            head=HEAD,
            config=config(readings=readings),
            on_progress=lambda done, total: told.append((done, total)),
        )
        assert set(part.table["reading"]) == set(readings)
        for reading in readings:
            mine, theirs = (result.reading(reading).filter(like="kl_").to_numpy() for result in (part, whole))
            assert abs(mine - theirs).max() < 1e-12
    assert told == [(done, 8) for done in range(1, 9)] * 2
    with pytest.raises(KeyError, match="no reading"):
        part.reading("horizon")


def test_further_conditions_stand_beside_the_built_in_ones():
    model, sae, tokens, plain = outcome()
    writes = encode_cell(model, sae, tokens, LAYER, HEAD)
    others = {
        "itself": lambda firing: writes.native(firing.passage, firing.position),
        "nothing": lambda firing: writes.native(firing.passage, firing.position).times(0.0),
    }
    result = replacement(model, sae, tokens, layer=LAYER, head=HEAD, config=CONFIG, others=others)
    assert result.others == tuple(others) and plain.others == ()
    assert result.table["kl_itself"].abs().max() < 1e-12
    assert (result.table["kl_nothing"] - result.table["kl_delete"]).abs().max() < 1e-12
    shared = [f"kl_{name}" for name in CONDITIONS]
    assert abs(result.table[shared].to_numpy() - plain.table[shared].to_numpy()).max() < 1e-12
    rows = {(row["reading"], row["pool"]): row for row in result.summary(50) if row["scale"] == "given"}
    assert len(rows) == 6
    assert (rows["horizon", "itself"]["win_rate"], rows["cache", "nothing"]["win_rate"]) == (1.0, 0.0)
    for name, said in {"delete": "has a column", "a-b": "letters", "reverse_x": "has a column"}.items():
        with pytest.raises(ValueError, match=said):
            replacement(model, sae, tokens, layer=LAYER, head=HEAD, others={name: others["itself"]})


@pytest.mark.parametrize("dense_atoms", ["leading", "whole"])
def test_dense_atoms_stand_in_by_their_leading_pair_or_whole(dense_atoms):
    model, sae, tokens = cell(length=16, decoder="dense", encoder="linear")
    settings = config(dense_atoms=dense_atoms, readings=("in_recurrence",))
    result = replacement(model, sae, tokens, layer=LAYER, head=HEAD, config=settings)
    row = result.table.iloc[0]
    text, t = tokens[int(row["passage"])][None], int(row["position"])
    atom = sae.decoder.atoms[int(row["atom"])].detach()
    if dense_atoms == "leading":
        u, s, vh = torch.linalg.svd(atom)
        atom = s[0] * torch.outer(u[:, 0], vh[0])
    edited = written_instead(model, text, t, row["coefficient"] * atom)
    assert row["kl_atom_listed_coef"] == pytest.approx(kl(edited, model(text)[0, t]), abs=1e-11)
    assert row["norm_atom_listed_coef"] == pytest.approx(row["coefficient"] * atom.norm().item())


def test_rank_two_atoms_are_substituted_whole():
    model, sae, tokens, result = outcome(rank=2)
    row = result.reading("in_recurrence").iloc[0]
    text, t = tokens[int(row["passage"])][None], int(row["position"])
    edited = written_instead(model, text, t, row["coefficient"] * sae.atom(int(row["atom"])).AB)
    assert row["kl_atom_listed_coef"] == pytest.approx(kl(edited, model(text)[0, t]), abs=1e-10)


def test_same_seed_same_numbers_and_another_seed_other_controls():
    model, sae, tokens, first = outcome()
    again, other = (
        replacement(model, sae, tokens, layer=LAYER, head=HEAD, config=config(seed=seed)).table for seed in (3, 4)
    )
    assert first.table.equals(again)
    assert not again["kl_random_gaussian_norm"].equals(other["kl_random_gaussian_norm"])


def test_substitutes_have_the_norms_they_are_named_after():
    model, sae, tokens = cell()
    with torch.no_grad():  # atoms may stand off unit norm: the norm must be taken, not assumed
        sae.decoder.key_atoms.mul_(torch.linspace(0.5, 2.0, 12)[:, None, None])
    writes = encode_cell(model, sae, tokens, LAYER, HEAD)
    drawing = Substitutes(sae, writes, 3)
    for firing in firings_of(writes, tokens):
        native = writes.native(firing.passage, firing.position)
        chosen = drawing.draw(firing, native)
        assert tuple(chosen) == CONDITIONS
        for name in CONDITIONS:
            if name.endswith("_norm"):
                assert chosen[name].norm() == pytest.approx(native.norm(), rel=1e-9)
        assert torch.allclose(chosen["atom_listed_coef"].matrix(), firing.coefficient * sae.atom(firing.atom).AB)
        assert chosen["delete"].norm() == 0.0
        assert firing.dominant_coefficient >= firing.coefficient > 0
        best = chosen["atom_dominant_best"].matrix()
        left = native.matrix() - best
        assert (left * sae.atom(firing.dominant).AB).sum().abs() < 1e-12  # nothing along the atom is left over
        assert (best - 1.01 * best).norm() > 0 and left.norm() <= native.norm() + 1e-12


def test_compare_counts_flips_and_ranks():
    plain = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    edited = torch.tensor([[[0.0, 3.0, 2.0], [3.0, 0.0, 0.0]]])
    measured = compare(edited, plain, torch.tensor([2, 0]))
    assert measured["flip"].item() == 0.5
    assert measured["rank"].item() == 0.5  # second place at the first position, first at the second
    assert measured["kl"].item() > 0
    assert compare(plain[None], plain, torch.tensor([2, 0]))["kl"].item() == 0.0


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"layer": 7}, IndexError, "layer 7"),
        ({"head": 9}, IndexError, "head 9"),
        ({"tokens": slice(0, 5)}, ValueError, "needs at least"),
    ],
)
def test_bad_cells_and_short_passages(change, error, words):
    model, sae, tokens = cell()
    if "tokens" in change:
        tokens = tokens[:, change["tokens"]]
    site = {"layer": change.get("layer", LAYER), "head": change.get("head", HEAD)}
    with pytest.raises(error, match=words):
        replacement(model, sae, tokens, config=CONFIG, **site)


def test_a_dictionary_of_another_shape_and_silent_atoms_are_refused():
    model, sae, tokens = cell()
    from writesae import WriteSAE, WriteSAEConfig

    other = WriteSAE(WriteSAEConfig(4, 4, n_atoms=8, k=2))
    with pytest.raises(ValueError, match="4 x 4, but the model's writes are 3 x 5"):
        replacement(model, other, tokens, layer=LAYER, head=HEAD, config=CONFIG)
    with pytest.raises(IndexError, match="atom 999 is outside this dictionary of 12 atoms"):
        replacement(model, sae, tokens, layer=LAYER, head=HEAD, config=config(atoms=(999,)))
    for wrong, said in (
        ({"form": "nett"}, "form"),
        ({"readings": ("horizn",)}, "did you mean 'horizon'"),
        ({"readings": ()}, "readings must name"),
        ({"dense_atoms": "first"}, "dense_atoms"),
    ):
        with pytest.raises(ValueError, match=said):
            ReplacementConfig(**wrong)


def test_low_rank_matrices_know_their_norms():
    torch.manual_seed(0)
    one, other = (LowRank(torch.randn(3, 4).double(), torch.randn(3, 5).double()) for _ in range(2))
    assert one.norm() == pytest.approx(one.matrix().norm().item())
    assert one.inner(other) == pytest.approx((one.matrix() * other.matrix()).sum().item())
    assert one.at_norm(2.0).norm() == pytest.approx(2.0) and one.times(0.0).at_norm(2.0).norm() == 0.0
