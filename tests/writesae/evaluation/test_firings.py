"""The sample of firings, the survey of cells and the contexts, against brute force."""

import math

import pytest
import torch

from hooked_recurrent import WriteEdit
from tests.hooked_recurrent.models import RULES, tiny_model, tokens_of
from tests.writesae.evaluation.cells_for_tests import HEAD, LAYER, cell
from writesae.config import WriteSAEConfig
from writesae.evaluation.cells import most_effective, survey
from writesae.evaluation.describing.contexts import atom_coefficients, top_contexts
from writesae.evaluation.firings import encode_cell, sample_firings
from writesae.sae import WriteSAE

pytestmark = pytest.mark.shapes_on_one_rule


def test_sample_respects_its_bounds_and_finds_only_real_firings():
    model, sae, tokens = cell()
    writes = encode_cell(model, sae, tokens, LAYER, HEAD, batch=2)
    dense = writes.codes.dense(12)
    firings = sample_firings(writes, first=3, last=15, atoms=None, per_atom=2, total=9, seed=0)
    assert 0 < len(firings) <= 9
    counts = {}
    for firing in firings:
        assert 3 <= firing.position <= 15
        assert dense[firing.passage, firing.position, firing.atom].item() == pytest.approx(firing.coefficient)
        assert dense[firing.passage, firing.position].argmax() == firing.dominant
        counts[firing.atom] = counts.get(firing.atom, 0) + 1
    assert max(counts.values()) <= 2
    assert firings == sample_firings(writes, first=3, last=15, atoms=None, per_atom=2, total=9, seed=0)
    assert firings != sample_firings(writes, first=3, last=15, atoms=None, per_atom=2, total=9, seed=1)
    only = sample_firings(writes, first=3, last=15, atoms=(firings[0].atom,), per_atom=5, total=9, seed=0)
    assert {firing.atom for firing in only} == {firings[0].atom}


def test_survey_equals_deleting_one_write_at_a_time():
    model = tiny_model()
    tokens = tokens_of(model, batch=1, length=9)
    cells = survey(model, tokens, positions=8, seed=0)
    assert len(cells) == 2 * 4
    plain = model(tokens)[0].log_softmax(-1)
    for row in cells.itertuples():
        effects = []
        for t in range(1, 9):
            edited = model(tokens, edits=[WriteEdit(row.layer, row.head, t, "delete")])[0, t].log_softmax(-1)
            effects.append((edited.exp() * (edited - plain[t])).sum().item())
        assert row.deletion_kl == pytest.approx(torch.tensor(effects, dtype=torch.float64).median().item(), abs=1e-12)
    _, cache = model.run_with_cache(tokens)
    decay = cache["blocks.1.mixer.hook_log_decay"][0, :, 3].median().item()
    row = cells[(cells["layer"] == 1) & (cells["head"] == 3)].iloc[0]
    assert row["half_life"] == pytest.approx(math.log(0.5) / decay)
    best = cells.sort_values("deletion_kl").iloc[-1]
    assert most_effective(cells) == (best["layer"], best["head"])


def test_contexts_show_the_strongest_firing_of_each_passage():
    model, sae, tokens = cell()
    model.to_str_tokens = lambda row: [f"<{int(token)}>" for token in row]
    writes = encode_cell(model, sae, tokens, LAYER, HEAD)
    atom = int(writes.codes.indices[0, 5, 0])
    contexts = top_contexts(model, writes, tokens, atom, files=("a.py", "b.py", "c.py"), count=2, before=3, after=2)
    strongest = atom_coefficients(writes, atom)
    assert [c["coefficient"] for c in contexts] == sorted(strongest.amax(1).tolist(), reverse=True)[: len(contexts)]
    for context in contexts:
        passage = "abc".index(context["file"][0])
        assert context["tokens"][context["firing_index"]] == f"<{int(tokens[passage, context['position']])}>"
        assert context["weights"][context["firing_index"]] == pytest.approx(context["coefficient"])
        assert len(context["tokens"]) == len(context["weights"]) <= 6


def dense_of(model, sae, tokens, kind):
    """What the dictionary was trained on at every token, as matrices [passage, pos, d_k, d_v], from the states alone."""
    prefix = f"blocks.{LAYER}.mixer.hook_"
    names = [prefix + role for role in ("state", "write", "log_decay")]
    _, cache = model.run_with_cache(tokens, names_filter=names)
    states, writes, log_decay = (cache[name][:, :, HEAD] for name in names)
    if kind != "net":
        return states if kind == "state" else writes
    before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], dim=1)
    decay = log_decay.exp()
    return states - (decay[..., None] if decay.ndim == 3 else decay[..., None, None]) * before


@pytest.mark.parametrize("kind", ["write", "net", "state"])
@pytest.mark.parametrize("rule", RULES)
def test_codes_are_those_of_what_the_dictionary_was_trained_on(rule, kind):
    model, sae, tokens = cell((rule, rule))
    hook, form = ("hook_state", None) if kind == "state" else ("hook_write", "additive" if kind == "write" else kind)
    sae.provenance |= {"hook": f"blocks.{LAYER}.mixer.{hook}", "form": form}
    writes = encode_cell(model, sae, tokens, LAYER, HEAD, batch=2, net=True)
    expected = sae.encode_matrix(dense_of(model, sae, tokens, kind))
    assert torch.allclose(writes.codes.dense(12), expected.dense(12), atol=1e-9)
    assert (writes.codes.values > 0).any()
    for form in ("additive", "net"):
        native = writes.native(1, 7, form)
        matrix = dense_of(model, sae, tokens, "net" if form == "net" else "write")[1, 7]
        assert torch.allclose(native.key.T @ native.value, matrix, atol=1e-10)
        assert native.norm() == pytest.approx(float(matrix.norm()), rel=1e-6)
    assert writes.norms[1, 7].item() == pytest.approx(writes.native(1, 7).norm())
    assert torch.allclose(writes.rates(12), (expected.dense(12) > 0).double().mean((0, 1)))
    with pytest.raises(ValueError, match="net=True"):
        encode_cell(model, sae, tokens, LAYER, HEAD).native(1, 7, "net")


def test_dense_atoms_and_their_encoders_are_encoded_too():
    model, sae, tokens = cell(decoder="dense", encoder="linear")
    writes = encode_cell(model, sae, tokens, LAYER, HEAD)
    assert torch.allclose(writes.codes.values, sae.encode(writes.key, writes.value).values)


@pytest.mark.parametrize(
    ("provenance", "fields", "word"),
    [
        ({"hook": "blocks.0.mixer.hook_read"}, {}, "trained on blocks.0.mixer.hook_read; this test needs"),
        ({"hook": "blocks.0.hook_resid_post"}, {}, "trained on blocks.0.hook_resid_post"),
        ({}, {"d_k": 4}, "atoms are 4 x"),
    ],
)
def test_a_dictionary_of_something_else_is_refused(provenance, fields, word):
    model = tiny_model()
    sae = WriteSAE(WriteSAEConfig(**{"d_k": model.cfg.d_k, "d_v": model.cfg.d_v, "n_atoms": 8, "k": 2, **fields}))
    sae.provenance.update(provenance)
    with pytest.raises(ValueError, match=word):
        encode_cell(model, sae, tokens_of(model), 0, 0)
