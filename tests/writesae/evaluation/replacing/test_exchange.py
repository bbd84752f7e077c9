"""Exchanges of single writes against plain full passes, and the invariants that hold for every rule, in float64."""

from functools import cache

import pytest
import torch

from tests.hooked_recurrent.models import HYBRID, RULES
from tests.writesae.evaluation.cells_for_tests import HEAD, LAYER, cell
from writesae.evaluation.firings import encode_cell
from writesae.evaluation.low_rank import LowRank
from writesae.evaluation.replacing.exchange import MOST_TERMS, READINGS, Exchanges, exchange

pytestmark = pytest.mark.shapes_on_one_rule

HORIZON = 3
FORMS = ("additive", "net")
over_rules = pytest.mark.parametrize("rule", RULES)


@cache
def written(rule):
    model, sae, tokens = cell((rule, rule), length=14)
    return model, sae, tokens, encode_cell(model, sae, tokens, LAYER, HEAD, net=True)


def substitutes(sae, native):
    """A zero, an atom, two terms, and more terms than a write edit takes."""
    torch.manual_seed(5)
    many = LowRank(torch.randn(MOST_TERMS + 2, 3).double(), torch.randn(MOST_TERMS + 2, 5).double())
    atom = LowRank(sae.key_atoms[1].detach(), sae.value_atoms[1].detach()).at_norm(native.norm())
    pair = LowRank(torch.cat([native.key[:1], atom.key]), torch.cat([native.value[:1], atom.value]))
    return [native, native.times(0.0), atom, pair, many.at_norm(native.norm())]


def measured(rule, form, positions, chosen, passage=0, readings=READINGS, memory=2**28):
    model, _, tokens, _ = written(rule)
    forks = Exchanges(model, LAYER, HEAD, form, readings, HORIZON, memory)
    found = forks.measure(tokens[passage : passage + 1], positions, chosen)
    return {(entry, reading): numbers["kl"] for entry, reading, numbers in found}


@torch.no_grad()
def kl(edited, plain):
    after, before = edited.log_softmax(-1), plain.log_softmax(-1)
    return (after.exp() * (after - before)).sum(-1)


@torch.no_grad()
def by_states(model, text, t, native, new, form):
    """The cache reading by its definition: S_t is changed by hand between two calls."""
    _, state = model(text[:, : t + 1], return_state=True)
    matrix = state.layers[LAYER].matrix.clone()
    matrix[0, HEAD] += new.matrix() - native.matrix()
    return model(text[:, t + 1 : t + 2], state=state.with_matrix(LAYER, matrix))[0, 0]


@torch.no_grad()
def by_hooks(model, text, t, new, form):
    """The other readings by hooks on the erase and on the write as a matrix."""

    def put(writes, hook):
        writes[:, t, HEAD] = new.matrix()
        return writes

    def zero(erase, hook):
        erase[:, t, HEAD] = 0.0
        return erase

    prefix = f"blocks.{LAYER}.mixer.hook_"
    hooks = [(prefix + "write", put)]
    if form == "net" and prefix + "erase" in model.hook_dict:
        hooks.append((prefix + "erase", zero))
    return model.run_with_hooks(text, fwd_hooks=hooks)[0]


@pytest.mark.parametrize("form", FORMS)
@over_rules
def test_every_reading_equals_plain_full_passes(rule, form):
    model, sae, tokens, writes = written(rule)
    text, positions = tokens[:1], [4, 6]
    natives = [writes.native(0, t, form) for t in positions]
    chosen = [substitutes(sae, native) for native in natives]
    found = measured(rule, form, positions, chosen)
    with torch.no_grad():
        plain = model(text)[0]
    for entry, t in enumerate(positions):
        for place, new in enumerate(chosen[entry]):
            edited = by_hooks(model, text, t, new, form)
            later = slice(t + 1, t + 1 + HORIZON)
            expected = {
                "in_recurrence": kl(edited[t], plain[t]),
                "horizon": kl(edited[later], plain[later]).mean(),
                "cache": kl(by_states(model, text, t, natives[entry], new, form), plain[t + 1]),
            }
            for reading, value in expected.items():
                assert found[entry, reading][place].item() == pytest.approx(value.item(), abs=1e-11)
        for reading in READINGS:
            assert abs(found[entry, reading][0].item()) < 1e-12  # the native write for itself: the floor
            assert found[entry, reading][2].item() > 1e-9


@pytest.mark.parametrize(("rule", "memory"), [*((rule, 2**28) for rule in RULES), ("gated_delta_net", 1)])
def test_neither_order_nor_company_nor_another_passage_matters(rule, memory):
    _, sae, _, writes = written(rule)
    positions = [3, 3, 5]
    chosen = [substitutes(sae, writes.native(0, t)) for t in positions]
    together = measured(rule, "additive", positions, chosen, memory=memory)
    elsewhere = measured(rule, "additive", [5], [chosen[2]], passage=1)
    backwards = measured(rule, "additive", positions, [rows[::-1] for rows in chosen])
    alone = measured(rule, "additive", [5], [chosen[2][3:4]], readings=("horizon", "cache"))
    for key, values in together.items():
        assert (values - backwards[key].flip(0)).abs().max() < 1e-12
    for reading in ("horizon", "cache"):
        assert abs(together[2, reading][3] - alone[0, reading][0]) < 1e-12
        assert abs(together[2, reading][3] - elsewhere[0, reading][3]) > 1e-9
    assert torch.equal(together[0, "cache"], together[1, "cache"])


@over_rules
def test_the_effect_of_a_small_edit_is_proportional_to_it(rule):
    """A change of the logits by eps is a KL of eps squared, and the norm that counts is the atom's own."""
    _, sae, _, writes = written(rule)
    native = writes.native(0, 5)
    atom = LowRank(sae.key_atoms[1].detach() * 1.7, sae.value_atoms[1].detach())
    assert atom.norm() == pytest.approx(1.7)

    def nudged(eps):
        small = atom.at_norm(eps * native.norm())
        return LowRank(torch.cat([native.key, small.key]), torch.cat([native.value, small.value]))

    found = measured(rule, "additive", [5], [[nudged(eps) for eps in (1e-2, 1e-3, 5e-4)]])
    for reading in READINGS:
        kls = found[0, reading]
        assert (kls[1] / kls[2]).item() == pytest.approx(4, rel=0.01)
        assert (kls[0] / kls[1]).item() == pytest.approx(100, rel=0.2)


@pytest.mark.parametrize("rule", ["gated_delta_net", "delta_net", "kimi_delta_attention"])
def test_deleting_the_net_write_is_beta_zero(rule):
    model, _, tokens, writes = written(rule)
    native = writes.native(0, 5, "net")
    found = measured(rule, "net", [5], [[native.times(0.0)]], readings=("in_recurrence",))

    def no_beta(beta, hook):
        beta[:, 5, HEAD] = 0.0
        return beta

    with torch.no_grad():
        without = model.run_with_hooks(tokens[:1], fwd_hooks=[(f"blocks.{LAYER}.mixer.hook_beta", no_beta)])
        plain = model(tokens[:1])
    assert found[0, "in_recurrence"][0].item() == pytest.approx(kl(without[0, 5], plain[0, 5]).item(), abs=1e-11)


@over_rules
def test_deleting_the_net_write_leaves_decay_alone(rule):
    model, _, tokens, writes = written(rule)
    edits = exchange(LAYER, HEAD, 5, writes.native(0, 5, "net").times(0.0), "net")
    names = [f"blocks.{LAYER}.mixer.hook_{role}" for role in ("state", "log_decay")]
    with torch.no_grad(), model.hooks(fwd_hooks=[]):
        _, cache = model.run_with_cache(tokens[:1], names_filter=names, edits=edits)
    state, log_decay = (cache[name][0, :, HEAD] for name in names)
    decay = log_decay[5].exp()
    assert torch.allclose(state[5], (decay[:, None] if decay.ndim else decay) * state[4], atol=1e-12)


def test_a_hybrid_and_its_first_layer():
    model, sae, tokens = cell(HYBRID, layer=0, length=14)
    writes = encode_cell(model, sae, tokens, 0, HEAD)
    native = writes.native(0, 5)
    forks = Exchanges(model, 0, HEAD, "additive", READINGS, HORIZON, 2**28)
    for _, _, numbers in forks.measure(tokens[:1], [5], [[native, native.times(0.0)]]):
        assert abs(numbers["kl"][0].item()) < 1e-12 < 1e-9 < numbers["kl"][1].item()


def test_many_firings_take_few_and_short_passes(monkeypatch):
    """Side by side where positions are close; the cache reading and the reading at t pay for what they read."""
    model, sae, tokens, writes = written("gated_delta_net")
    runs = []
    original = type(model).run_from

    def counted(self, layer, inputs, state, **more):
        runs.append((more["rows"], inputs.shape[1]))
        return original(self, layer, inputs, state, **more)

    monkeypatch.setattr(type(model), "run_from", counted)
    positions = [4, 4, 5, 5, 6, 6]
    chosen = [substitutes(sae, writes.native(0, t))[:3] for t in positions]
    for reading, length in (("horizon", HORIZON + 1), ("in_recurrence", 1), ("cache", 2)):
        runs.clear()
        measured("gated_delta_net", "additive", positions, chosen, readings=(reading,))
        assert sum(rows for rows, _ in runs) == 18
        assert len(runs) <= 3  # one per position at most, not one per firing
        assert all(rows * tokens <= max(32, 1.25 * rows * length) for rows, tokens in runs)
    runs.clear()
    measured("gated_delta_net", "additive", positions, chosen)
    assert len(runs) <= 6  # the reading at t and the horizon share their forks
