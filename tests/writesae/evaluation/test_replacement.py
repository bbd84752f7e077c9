"""The replacement test against plain full passes with the same edits, and its invariants, in float64."""

import json

import pytest
import torch

from hooked_recurrent import WriteEdit
from tests.hooked_recurrent.models import HYBRID, RULES
from tests.writesae.evaluation.cells_for_tests import HEAD, LAYER, cell
from writesae.evaluation.firings import encode_cell, sample_firings
from writesae.evaluation.replacement import READINGS, ReplacementConfig, _Test, compare, replacement
from writesae.evaluation.substitutes import CONDITIONS, LowRank, Substitutes

CONFIG = ReplacementConfig(per_atom=2, total=10, horizon=3, first_position=2, seed=3)


@torch.no_grad()
def kl(edited, plain):
    after, before = edited.double().log_softmax(-1), plain.double().log_softmax(-1)
    return (after.exp() * (after - before)).sum(-1)


def machinery(model, sae, tokens, config=CONFIG, layer=LAYER):
    writes = encode_cell(model, sae, tokens, layer, HEAD)
    last = tokens.shape[1] - 2 - config.horizon
    firings = sample_firings(
        writes, first=config.first_position, last=last, atoms=None, per_atom=config.per_atom, total=10, seed=config.seed
    )
    return _Test(model, tokens, layer, HEAD, config, writes, Substitutes(sae, writes, config.seed)), firings


@pytest.mark.parametrize(("layer_types", "layer"), [*(((rule, rule), 1) for rule in RULES), (HYBRID, 0), (HYBRID, 2)])
@pytest.mark.parametrize("form", ["additive", "net"])
def test_native_write_for_itself_is_the_floor(layer_types, layer, form):
    model, sae, tokens = cell(layer_types, layer=layer)
    config = ReplacementConfig(**{**CONFIG.to_dict(), "form": form})
    result = replacement(model, sae, tokens, layer=layer, head=HEAD, config=config)
    assert set(result.table["reading"]) == set(READINGS)
    for reading in READINGS:
        assert result.floor(reading)[1] < 1e-12
        assert (result.reading(reading)["kl_delete"] > 1e-9).any()


@pytest.mark.parametrize("form", ["additive", "net"])
@pytest.mark.parametrize("rule", RULES)
def test_every_condition_equals_a_plain_full_pass(rule, form):
    model, sae, tokens = cell((rule, rule))
    config = ReplacementConfig(**{**CONFIG.to_dict(), "form": form})
    result = replacement(model, sae, tokens, layer=LAYER, head=HEAD, config=config)
    test, firings = machinery(model, sae, tokens, config)
    assert len(firings) == result.table["firing_id"].nunique() > 3
    for index, firing in enumerate(firings):
        text, t = tokens[firing.passage : firing.passage + 1], firing.position
        plain = model(text)[0]
        native = test._native(firing, model.snapshots(text, [t])[t])
        chosen = test.substitutes.draw(firing, native)
        rows = result.table[result.table["firing_id"] == index].set_index("reading")
        for name, substitute in chosen.items():
            edits = [
                WriteEdit(
                    LAYER, HEAD, t, "replace" if m == 0 else "add", key, value, form=form if m == 0 else "additive"
                )
                for m, (key, value) in enumerate(zip(substitute.key, substitute.value, strict=True))
            ]
            edited = model(text, edits=edits)[0]
            assert rows.loc["in_recurrence", f"kl_{name}"] == pytest.approx(float(kl(edited[t], plain[t])), abs=1e-11)
            mean = float(kl(edited[t + 1 : t + 4], plain[t + 1 : t + 4]).mean())
            assert rows.loc["horizon", f"kl_{name}"] == pytest.approx(mean, abs=1e-11)


def test_cache_reading_leaves_t_alone_and_edits_the_state_after_it():
    model, sae, tokens = cell()
    result = replacement(model, sae, tokens, layer=LAYER, head=HEAD, config=CONFIG)
    test, firings = machinery(model, sae, tokens)
    firing, t = firings[0], firings[0].position
    text = tokens[firing.passage : firing.passage + 1]
    plain = model(text)[0]
    key, value = test.writes.key[firing.passage, t], test.writes.value[firing.passage, t]
    _, state = model(text[:, : t + 1], return_state=True)
    matrix = state.layers[LAYER].matrix.clone()
    matrix[0, HEAD] -= torch.outer(key, value)
    edited = model(text[:, t + 1 : t + 2], state=state.with_matrix(LAYER, matrix))
    row = result.reading("cache").iloc[0]
    assert row["kl_delete"] == pytest.approx(float(kl(edited[0, 0], plain[t + 1])), abs=1e-11)


def test_net_deletion_is_beta_zero():
    model, sae, tokens = cell()
    config = ReplacementConfig(**{**CONFIG.to_dict(), "form": "net"})
    result = replacement(model, sae, tokens, layer=LAYER, head=HEAD, config=config)
    row = result.reading("in_recurrence").iloc[0]
    text, t = tokens[int(row["passage"])][None], int(row["position"])

    def no_beta(beta, hook):
        beta[:, t, HEAD] = 0.0
        return beta

    without = model.run_with_hooks(text, fwd_hooks=[(f"blocks.{LAYER}.mixer.hook_beta", no_beta)])
    assert row["kl_delete"] == pytest.approx(float(kl(without[0, t], model(text)[0, t])), abs=1e-11)


def test_conditions_do_not_feel_each_other():
    model, sae, tokens = cell()
    test, firings = machinery(model, sae, tokens)
    firing, t = firings[1], firings[1].position
    text = tokens[firing.passage : firing.passage + 1]
    snapshots = model.snapshots(text, [t, t + 1])
    native = test._native(firing, snapshots[t])
    chosen = list(test.substitutes.draw(firing, native).values())
    span = text[:, t : t + 4]
    together = test._replace(span, snapshots[t], chosen, t)
    backwards = test._replace(span, snapshots[t], chosen[::-1], t).flip(0)
    alone = torch.cat([test._replace(span, snapshots[t], [one], t) for one in chosen])
    patched = test._patch(text[:, t + 1 : t + 2], snapshots[t + 1], native, chosen)
    patched_alone = [test._patch(text[:, t + 1 : t + 2], snapshots[t + 1], native, [one]) for one in chosen]
    assert (together - backwards).abs().max() < 1e-12
    assert (together - alone).abs().max() < 1e-12
    assert (patched - torch.cat(patched_alone)).abs().max() < 1e-12


def test_effect_is_proportional_to_a_small_edit():
    model, sae, tokens = cell()
    test, firings = machinery(model, sae, tokens)
    firing, t = firings[0], firings[0].position
    text = tokens[firing.passage : firing.passage + 1]
    before = model.snapshots(text, [t])[t]
    native = test._native(firing, before)
    atom = test.substitutes.atom(firing.atom)

    def nudged(eps):
        both = LowRank(torch.cat([native.key, atom.key]), torch.cat([native.value, atom.times(eps).value]))
        return test._replace(text[:, t : t + 1], before, [both], t)[0, 0] - model(text)[0, t]

    slope, steeper = nudged(1e-6) / 1e-6, nudged(1e-7) / 1e-7
    assert (slope - steeper).abs().max() < 1e-3 * slope.abs().max()


def test_same_seed_same_numbers_and_another_seed_other_controls():
    model, sae, tokens = cell()
    first, second = (replacement(model, sae, tokens, layer=LAYER, head=HEAD, config=CONFIG).table for _ in range(2))
    assert first.equals(second)
    other = ReplacementConfig(**{**CONFIG.to_dict(), "seed": 4})
    third = replacement(model, sae, tokens, layer=LAYER, head=HEAD, config=other).table
    assert not first["kl_random_gaussian_norm"].equals(third["kl_random_gaussian_norm"])


def test_substitutes_have_the_norms_they_are_named_after():
    model, sae, tokens = cell()
    test, firings = machinery(model, sae, tokens)
    with torch.no_grad():  # atoms may stand off unit norm: the norm must be taken, not assumed
        test.substitutes.key_atoms.mul_(torch.linspace(0.5, 2.0, 12)[:, None, None])
    for firing in firings:
        native = LowRank(
            test.writes.key[firing.passage, firing.position][None],
            test.writes.value[firing.passage, firing.position][None],
        )
        chosen = test.substitutes.draw(firing, native)
        assert tuple(chosen) == CONDITIONS
        for name in CONDITIONS:
            if name.endswith("_norm"):
                assert chosen[name].norm() == pytest.approx(native.norm(), rel=1e-9)
        matrix = chosen["atom_listed_coef"].key.T @ chosen["atom_listed_coef"].value
        expected = (
            firing.coefficient * test.substitutes.key_atoms[firing.atom].T @ test.substitutes.value_atoms[firing.atom]
        )
        assert torch.allclose(matrix, expected)
        assert chosen["delete"].norm() == 0.0
        assert firing.dominant_coefficient >= firing.coefficient > 0


def test_rank_two_atoms_are_substituted_whole():
    model, sae, tokens = cell(rank=2)
    result = replacement(model, sae, tokens, layer=LAYER, head=HEAD, config=CONFIG)
    assert result.floor()[1] < 1e-12
    row = result.reading("in_recurrence").iloc[0]
    text, t = tokens[int(row["passage"])][None], int(row["position"])
    atom = row["coefficient"] * sae.atom(int(row["atom"])).AB

    def put(writes, hook):
        writes[:, t, HEAD] = atom
        return writes

    edited = model.run_with_hooks(text, fwd_hooks=[(f"blocks.{LAYER}.mixer.hook_write", put)])
    assert row["kl_atom_listed_coef"] == pytest.approx(float(kl(edited[0, t], model(text)[0, t])), abs=1e-10)


def test_compare_counts_flips_and_ranks():
    plain = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    edited = torch.tensor([[[0.0, 3.0, 2.0], [3.0, 0.0, 0.0]]])
    measured = compare(edited, plain, torch.tensor([2, 0]))
    assert measured["flip"].item() == 0.5
    assert measured["rank"].item() == 0.5  # second place at the first position, first at the second
    assert measured["kl"].item() > 0
    assert compare(plain[None], plain, torch.tensor([2, 0]))["kl"].item() == 0.0


def test_result_summary_counts_by_hand_and_survives_json(tmp_path):
    model, sae, tokens = cell()
    result = replacement(model, sae, tokens, layer=LAYER, head=HEAD, config=CONFIG)
    rows = result.reading("cache")
    expected = sum(a < d for a, d in zip(rows["kl_atom_dominant_coef"], rows["kl_delete"], strict=True)) / len(rows)
    line = next(
        r for r in result.summary(200) if (r["reading"], r["pool"], r["scale"]) == ("cache", "dominant", "coef")
    )
    assert line["win_rate"] == pytest.approx(expected) == result.win_rate("cache", "dominant", "coef")
    assert line["wilson"][0] <= expected <= line["wilson"][1]
    assert line["floor_max"] < 1e-12
    stored = json.loads(result.to_json(tmp_path / "r.json").read_text())
    assert len(stored["records"]) == len(result.table)
    assert stored["config"]["seed"] == 3
    assert list(tmp_path.iterdir()) == [tmp_path / "r.json"]


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

    with pytest.raises(ValueError, match="4 x 4, but the model's writes are 3 x 5"):
        replacement(
            model, WriteSAE(WriteSAEConfig(4, 4, n_atoms=8, k=2)), tokens, layer=LAYER, head=HEAD, config=CONFIG
        )
    silent = ReplacementConfig(**{**CONFIG.to_dict(), "atoms": (999,)})
    with pytest.raises(ValueError, match="no listed atom fires"):
        replacement(model, sae, tokens, layer=LAYER, head=HEAD, config=silent)
    with pytest.raises(ValueError, match="form"):
        ReplacementConfig(form="nett")
    with pytest.raises(KeyError, match="no reading"):
        replacement(model, sae, tokens, layer=LAYER, head=HEAD, config=CONFIG).reading("chache")
