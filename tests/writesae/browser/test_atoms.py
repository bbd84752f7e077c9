"""Every number of a record against its direct computation, on tiny random models with a random dictionary."""

import numpy as np
import pytest
import torch

from hooked_recurrent import HookedRecurrentModel
from tests.hooked_recurrent.models import RULES
from tests.writesae.evaluation.cells_for_tests import HEAD, LAYER, cell
from writesae.browser import BrowserConfig, collect
from writesae.browser.atoms import leading_factors, median_cosine, nearest
from writesae.browser.data import BUNDLE, COLUMNS, REGISTER, SILENT
from writesae.evaluation.firings import encode_cell
from writesae.evaluation.replacing.replacement import ReplacementConfig, replacement

SMALL = BrowserConfig(
    top_contexts=2, random_contexts=1, before=3, after=2, bins=4, listed=3, neighbours=3, tested_atoms=4
)


class Letters:
    """A tokenizer of 29 letters and signs."""

    def decode(self, ids):
        """Token i is the i-th letter."""
        return "".join(chr(97 + number) for number in ids)


def opened(layer_types=("gated_delta_net",) * 2, *, form="additive", kind="write", **more):
    model, sae, tokens = cell(layer_types, **more)
    model.tokenizer = Letters()
    sae.provenance |= {"hook": f"blocks.{LAYER}.mixer.hook_{kind}", "form": form}
    return model, sae, tokens


def described(model, sae, tokens, config=SMALL, **more):
    return collect(model, sae, tokens, layer=LAYER, head=HEAD, config=config, **more)


@pytest.fixture(scope="module")
def study():
    model, sae, tokens = opened()
    return model, sae, tokens, described(model, sae, tokens), encode_cell(model, sae, tokens, LAYER, HEAD)


def test_rates_and_sizes(study):
    _, sae, tokens, data, writes = study
    dense = writes.codes.dense(12)
    assert set(data.atoms.columns) == set(COLUMNS) and len(data) == 12
    for atom in range(12):
        mine = dense[..., atom][dense[..., atom] > 0]
        row = data.atoms.loc[atom]
        assert row["firings"] == len(mine) and row["rate"] == len(mine) / tokens.numel()
        if len(mine):
            assert row["largest"] == pytest.approx(float(mine.max()))
            assert row["median"] == pytest.approx(float(np.median(mine)))
        else:
            assert row["kind"] == SILENT and np.isnan(row["median"])
        assert data.histogram[atom].sum() == len(mine)


def test_cosines_are_medians_over_firings_of_the_matrices_own(study):
    _, sae, _, data, writes = study
    native = writes.key[..., :, None] * writes.value[..., None, :]
    dense = writes.codes.dense(12)
    for atom in range(12):
        found = [
            float((native[place] * sae.atom(atom).AB).sum() / native[place].norm() / sae.atom(atom).AB.norm())
            for place in map(tuple, (dense[..., atom] > 0).nonzero().tolist())
        ]
        row = data.atoms.loc[atom]
        if found:
            assert row["cosine"] == pytest.approx(np.median(found), abs=1e-9)
            assert row["kind"] == (REGISTER if np.median(found) >= SMALL.threshold else BUNDLE)


@pytest.mark.parametrize("kind", [{}, {"rank": 2}, {"decoder": "dense"}])
def test_nearest_atoms_by_the_cosine_of_their_matrices(kind, monkeypatch):
    monkeypatch.setattr("writesae.browser.atoms._ATOMS_AT_ONCE", 5)
    _, sae, _ = cell(**kind)
    flat = sae.decoder.matrices().flatten(1)
    cosine = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1).fill_diagonal_(-2)
    made = nearest(sae, 4)
    assert np.array_equal(made.index, cosine.topk(4, dim=1).indices.numpy())
    assert np.allclose(made.number, cosine.topk(4, dim=1).values.numpy())
    assert nearest(sae, 50).index.shape == (12, 11)


@pytest.mark.parametrize("kind", [{"rank": 2}, {"decoder": "dense"}])
def test_of_other_atoms_the_leading_outer_product_is_shown_and_how_much_it_holds(kind):
    _, sae, _ = cell(**kind)
    with torch.no_grad():
        for parameter in sae.decoder.parameters():  # dense atoms begin as outer products
            parameter.add_(0.3 * torch.randn_like(parameter))
    key, value, share = leading_factors(sae)
    for atom, matrix in enumerate(sae.decoder.matrices().numpy()):
        left = matrix - np.outer(key[atom], value[atom])
        s = np.linalg.svd(matrix, compute_uv=False)
        assert np.square(left).sum() == pytest.approx(np.square(s[1:]).sum(), rel=1e-4, abs=1e-9)
        assert share[atom] == pytest.approx(s[0] ** 2 / np.square(s).sum(), rel=1e-5) and share[atom] < 1


def test_factors_of_rank_one_are_the_dictionarys_own(study):
    _, sae, _, data, _ = study
    assert np.allclose(data.key, sae.key_atoms[:, 0].detach()) and np.allclose(
        data.value, sae.value_atoms[:, 0].detach()
    )
    assert (data.leading == 1).all()


def test_words_are_the_tokenizers_texts_of_the_texts_tokens(study):
    _, _, tokens, data, _ = study
    assert data.words == [chr(97 + number) for number in data.word_ids]
    contexts = data.contexts
    for row in range(len(contexts.passage)):
        start = contexts.position[row] - contexts.at[row]
        for place, word in enumerate(contexts.word[row]):
            if word >= 0:
                assert data.word_ids[word] == tokens[contexts.passage[row], start + place]
    top = data.word_ids[data.fires_on.index[data.atoms["firings"].idxmax()][0]]
    assert top in tokens


def test_the_most_frequent_atoms_are_replaced_as_the_replacement_test_does(study):
    model, sae, tokens, data, _ = study
    often = data.atoms["firings"].sort_values(ascending=False, kind="stable").index[:4]
    assert set(data.atoms.index[data.atoms["tested"] > 0]) == set(often)
    test = ReplacementConfig(
        atoms=tuple(often), per_atom=5, total=20, horizon=1, readings=("in_recurrence",), seed=SMALL.seed
    )
    rows = replacement(model, sae, tokens, layer=LAYER, head=HEAD, config=test).table
    for atom, mine in rows.groupby("atom"):
        row = data.atoms.loc[atom]
        assert (row["tested"], row["won"]) == (len(mine), (mine["kl_atom_listed_coef"] < mine["kl_delete"]).sum())
        for name, column in (("atom", "atom_listed_coef"), ("delete", "delete"), ("random", "random_listed_coef")):
            assert row[f"kl_{name}"] == pytest.approx(mine[f"kl_{column}"].median())
    others = data.atoms.loc[data.atoms["tested"] == 0, ["kl_atom", "kl_delete", "kl_random"]]
    assert others.isna().all().all() and 0 <= data.about["floor"] < 1e-9


def test_nothing_is_replaced_where_nothing_is_asked_for():
    data = described(*opened(), BrowserConfig(tested_atoms=0))
    assert (data.atoms["tested"] == 0).all() and data.about["floor"] is None


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("kind", "form"), [("write", "additive"), ("write", "net"), ("state", "additive")])
def test_every_rule_and_everything_that_a_dictionary_is_of(rule, kind, form):
    model, sae, tokens = opened((rule, rule), kind=kind, form=form, passages=2, length=14)
    data = described(model, sae, tokens, BrowserConfig(tested_atoms=int(form == "net"), firings_per_atom=1))
    alive = data.atoms["firings"] > 0
    assert alive.sum() > 3 and data.about["rule"] == rule
    assert data.about["what"] == {"write": {"net": "net writes"}.get(form, "writes"), "state": "states"}[kind]
    assert data.atoms.loc[alive, "cosine"].between(-1, 1).all()
    assert (data.promoted.index[alive] >= 0).all() and (data.promoted.index[~alive] == -1).all()
    assert (data.promoted.number[alive, 0] > 0).all() and (data.suppressed.number[alive, 0] < 0).all()


def test_the_cosine_of_a_dictionary_of_net_writes_is_that_to_net_writes():
    model, sae, tokens = opened(form="net")
    writes = encode_cell(model, sae, tokens, LAYER, HEAD, net=True)
    data = described(model, sae, tokens, BrowserConfig(tested_atoms=0))
    assert np.allclose(data.atoms["cosine"], median_cosine(sae, writes, "net"), equal_nan=True)
    assert not np.allclose(data.atoms["cosine"], median_cosine(sae, writes), equal_nan=True)


def test_progress_is_told_stage_by_stage_and_names_of_files_are_kept():
    told, (model, sae, tokens) = [], opened(passages=10, length=12)
    config, files = BrowserConfig(tested_atoms=1, firings_per_atom=1), [f"f{row}" for row in range(10)]
    data = described(model, sae, tokens, config, files=files, on_progress=lambda *of: told.append(of))
    assert [one for one in told if one[0] == "codes"] == [("codes", 8, 10), ("codes", 10, 10)]
    assert ("readout", 10, 10) in told and "replace" in {stage for stage, _, _ in told}
    assert data.files[3] == "f3"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"layer": 7}, IndexError, "layer 7 has no writes"),
        ({"head": 9}, IndexError, "head 9 is out of range"),
        ({"files": ["one"]}, ValueError, "1 names for 3 passages"),
        ({"tokens": torch.zeros(2, 10, dtype=torch.int64)}, ValueError, "need at least 11"),
        ({"tokenizer": None}, ValueError, "no tokenizer"),
    ],
)
def test_bad_input_is_answered_before_anything_runs(change, error, words, monkeypatch):
    model, sae, tokens = opened()
    model.tokenizer = change.pop("tokenizer", model.tokenizer)
    monkeypatch.setattr(HookedRecurrentModel, "forward", lambda *of, **more: pytest.fail("it ran"))
    given = {"layer": LAYER, "head": HEAD, "config": SMALL, **change}
    with pytest.raises(error, match=words):
        collect(model, sae, given.pop("tokens", tokens), **given)


def test_a_config_that_shows_nothing_is_refused():
    with pytest.raises(ValueError, match="bins"):
        BrowserConfig(bins=0)
    with pytest.raises(ValueError, match="tested_atoms"):
        BrowserConfig(tested_atoms=-1)
