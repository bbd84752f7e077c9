"""Splices against plain continuations from changed states, on every rule, in float64; and dictionaries that change nothing."""

from math import comb, exp

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hooked_recurrent.models import HYBRID, RULES
from tests.writesae.evaluation.cells_for_tests import HEAD, LAYER, cell
from writesae import WriteSAE, WriteSAEConfig
from writesae.evaluation.describing.perplexity import PerplexityConfig, head_subsets, perplexity
from writesae.evaluation.describing.perplexity_result import PerplexityResult
from writesae.evaluation.describing.splices import native_states, rebuilt_states

pytestmark = pytest.mark.shapes_on_one_rule

N = 9
KINDS = {"state": ("hook_state", "additive"), "writes": ("hook_write", "additive"), "net_writes": ("hook_write", "net")}


def of_kind(sae, kind):
    hook, form = KINDS[kind]
    sae.provenance |= {"hook": f"blocks.{LAYER}.mixer.{hook}", "form": form}
    return sae


def exact(kind):
    """A dictionary that rebuilds every matrix: all unit matrices, and their negatives."""
    sae = WriteSAE(WriteSAEConfig(d_k=3, d_v=5, n_atoms=30, k=30, encoder="tied")).double()
    with torch.no_grad():
        for atom in range(30):
            row, column, sign = atom % 15 // 5, atom % 5, 1.0 if atom < 15 else -1.0
            sae.decoder.key_atoms[atom, 0] = torch.eye(3)[row]
            sae.decoder.value_atoms[atom, 0] = sign * torch.eye(5)[column]
    return of_kind(sae, kind)


def run(model, sae, tokens, head=HEAD, layer=LAYER, **config):
    return perplexity(model, sae, tokens, layer=layer, head=head, config=PerplexityConfig(prefix=N, near=3, **config))


def one(result, **wanted):
    table = result.table
    for name, value in wanted.items():
        table = table[table[name] == value]
    return table.set_index("passage")


@torch.no_grad()
def continued(model, text, layer, matrices):
    """Loss of the rest of a text from a state with some heads' memories exchanged: {head: matrix}."""
    _, state = model(text[:, :N], return_state=True)
    changed = state.layers[layer].matrix.clone()
    for head, matrix in matrices.items():
        changed[0, head] = matrix
    logits = model(text[:, N:], state=state.with_matrix(layer, changed))[0, :-1]
    return torch.nn.functional.cross_entropy(logits, text[0, N + 1 :], reduction="none")


@pytest.mark.parametrize(("layer_types", "layer"), [*(((rule, rule), 1) for rule in RULES), (HYBRID, 0)])
def test_every_condition_equals_a_plain_continuation(layer_types, layer):
    model, sae, tokens = cell(layer_types, layer=layer, length=20)
    of_kind(sae, "state")
    saes = {0: sae, 3: sae}
    result = run(model, saes, tokens, head=None, layer=layer, ranks=(1,))
    assert result.floor() < 1e-12 and result.heads == [0, 3]
    natives = [native_states(model, text[None, :N], layer, [0, 3]) for text in tokens]
    for passage, text in enumerate(tokens):
        mine = natives[passage]
        low = torch.linalg.svd(mine)
        with torch.no_grad():
            put = {
                ("zero", 0): torch.zeros_like(mine),
                ("mean", 0): (natives[passage - 1] + natives[passage - 2]) / 2,
                ("state", 0): sae(mine),
                ("svd", 1): low.S[:, :1, None] * low.U[:, :, :1] * low.Vh[:, :1],
            }
        for (variant, rank), matrices in put.items():
            for heads, chosen in (("0", [0]), ("3", [1]), ("0,3", [0, 1])):
                row = one(result, variant=variant, rank=rank, heads=heads).loc[passage]
                losses = continued(model, text[None], layer, {[0, 3][place]: matrices[place] for place in chosen})
                assert row["ce"] == pytest.approx(float(losses.mean()), abs=1e-11)
                assert row["ce_near"] == pytest.approx(float(losses[:3].mean()), abs=1e-11)
                missed = (matrices - mine)[chosen].square().sum() / mine[chosen].square().sum()
                assert row["error"] == pytest.approx(float(missed), abs=1e-11)
        native = continued(model, text[None], layer, {})
        assert row["ce_native"] == pytest.approx(float(native.mean()), abs=1e-11) and row["tokens"] == len(native) == 10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_a_dictionary_that_rebuilds_everything_does_no_damage(rule, kind):
    model, _, tokens = cell((rule, rule), passages=2, length=14)
    result = run(model, exact(kind), tokens, throughout=kind == "writes", ranks=(1, 3))
    assert result.dictionary == kind
    rise = (result.table["ce"] - result.table["ce_native"]).abs().groupby(result.table["variant"]).max()
    assert rise[kind] < 1e-10 and rise["self"] < 1e-12
    assert (
        one(result, variant="svd", rank=3)["ce"] - one(result, variant="svd", rank=3)["ce_native"]
    ).abs().max() < 1e-10
    if kind == "writes":
        assert rise["throughout"] < 1e-10
    assert rise["zero"] > 1e-6 and rise["mean"] > 1e-6 and rise["svd"] > 1e-6


@pytest.mark.parametrize("rule", RULES)
def test_rebuilt_writes_leave_the_state_of_a_run_with_these_writes(rule):
    model, sae, tokens = cell((rule, rule), length=16)
    text = tokens[:1, :N]
    of_kind(sae, "writes")

    def splice(write, hook):
        changed = write.clone()
        changed[:, :, HEAD] = sae(write[:, :, HEAD])
        return changed

    native = native_states(model, text, LAYER, [HEAD])
    with torch.no_grad(), model.hooks(fwd_hooks=[(f"blocks.{LAYER}.mixer.hook_write", splice)]):
        _, state = model(text, return_state=True)
    rebuilt = rebuilt_states(model, {HEAD: sae}, text, LAYER, native)
    assert torch.allclose(rebuilt[0], state.layers[LAYER].matrix[0, HEAD], atol=1e-12)
    assert (rebuilt - native).abs().max() > 1e-4

    # while the prefix is read, and not behind it
    def until(write, hook):
        return torch.cat([splice(write[:, :N], hook), write[:, N:]], dim=1)

    with torch.no_grad():
        loss = model.run_with_hooks(
            tokens[:1],
            fwd_hooks=[(f"blocks.{LAYER}.mixer.hook_write", until)],
            return_type="loss",
            loss_per_token=True,
        )
    found = one(run(model, sae, tokens, throughout=True, ranks=(1,)), variant="throughout").loc[0, "ce"]
    assert found == pytest.approx(float(loss[0, N:].mean()), abs=1e-11)


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_rebuilt_net_writes_only_decay(rule):
    model, sae, tokens = cell((rule, rule), length=16)
    of_kind(sae, "net_writes")
    text, seen = tokens[:1, :N], []
    model.run_with_hooks(
        text, fwd_hooks=[(f"blocks.{LAYER}.mixer.hook_state", lambda s, hook: seen.append(s[0, :, HEAD].clone()))]
    )
    states = torch.cat(seen)
    _, cache = model.run_with_cache(text, names_filter=[f"blocks.{LAYER}.mixer.hook_log_decay"])
    decay = cache[f"blocks.{LAYER}.mixer.hook_log_decay"][0, :, HEAD].exp().reshape(N, -1, 1)
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for t in range(N):
        before = states[t - 1] if t else torch.zeros_like(states[0])
        expected = decay[t] * expected + sae(states[t] - decay[t] * before)
    rebuilt = rebuilt_states(model, {HEAD: sae}, text, LAYER, states[-1:])
    assert torch.allclose(rebuilt[0], expected, atol=1e-10)


def test_conditions_do_not_meet_each_other():
    model, sae, tokens = cell(length=20)
    of_kind(sae, "state")
    before = model(tokens)
    whole = run(model, {0: sae, 1: sae, 2: sae}, tokens, head=None)
    alone = run(model, sae, tokens, head=2, ranks=(2,))
    for wanted in ({"variant": "zero"}, {"variant": "svd", "rank": 2}, {"variant": "state"}):
        ours, theirs = (one(result, heads="2", **wanted)["ce"] for result in (whole, alone))
        assert (ours - theirs).abs().max() < 1e-12
    turned = run(model, {2: sae, 0: sae, 1: sae}, tokens, head=None)
    for heads in ("0", "0,1,2"):
        ours, theirs = (one(result, heads=heads, variant="state")["ce"] for result in (whole, turned))
        assert (ours - theirs).abs().max() < 1e-12
    assert torch.equal(model(tokens), before)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 16), st.integers(1, 6), st.integers(0, 99))
def test_subsets_of_heads(n_heads, most, seed):
    heads = list(range(3, 3 + n_heads))
    subsets = head_subsets(heads, most, seed)
    assert len(set(subsets)) == len(subsets) and subsets == head_subsets(heads, most, seed)
    assert {(head,) for head in heads} <= set(subsets) and tuple(heads) in subsets
    for size in {len(subset) for subset in subsets}:
        assert size == n_heads or size & (size - 1) == 0
        count = sum(len(subset) == size for subset in subsets)
        assert count == (n_heads if size == 1 else min(most, comb(n_heads, size)))
    assert all(set(subset) <= set(heads) and list(subset) == sorted(set(subset)) for subset in subsets)


def test_summary_file_and_figure(tmp_path):
    model, sae, tokens = cell(passages=4, length=20)
    of_kind(sae, "writes")
    told = []
    result = perplexity(
        model,
        {0: sae, 1: sae},
        tokens,
        layer=LAYER,
        config=PerplexityConfig(prefix=N),
        on_progress=lambda *progress: told.append(progress),
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    rows = {(row["variant"], row["rank"], row["k"]): row for row in result.summary(n_resamples=100)}
    assert set(rows) == {(v, 0, k) for v in ("self", "zero", "mean", "writes") for k in (1, 2)} | {
        ("svd", r, k) for r in (1, 2, 3) for k in (1, 2)
    }
    zero = rows["zero", 0, 2]
    table = one(result, variant="zero", k=2)
    assert zero["perplexity"] == pytest.approx(exp(table["ce"].mean()))
    assert zero["percent"] == pytest.approx(100 * (zero["perplexity"] / zero["native_perplexity"] - 1))
    assert zero["percent_interval"][0] <= zero["percent"] <= zero["percent_interval"][1]
    assert rows["writes", 0, 1]["n_subsets"] == 2 and len(result.by_heads(n_resamples=20)) == 3 * 7
    assert rows["svd", 3, 2]["rise"] == pytest.approx(0, abs=1e-12)
    again = PerplexityResult.from_json(result.to_json(tmp_path / "result.json"))
    assert again.heads == [0, 1] and again.dictionary == "writes"
    assert again.summary(n_resamples=100)[3]["ce"] == pytest.approx(result.summary(n_resamples=100)[3]["ce"])
    assert len(result.figure().axes) == 2


def test_what_cannot_be_spliced_is_refused():
    model, sae, tokens = cell(length=20)
    of_kind(sae, "writes")
    resid = WriteSAE(sae.config).double()
    resid.provenance |= {"hook": "blocks.1.hook_resid_pre"}
    states = of_kind(WriteSAE(sae.config).double(), "state")
    wide = WriteSAE(WriteSAEConfig(d_k=5, d_v=3, n_atoms=4, k=2))
    centred = of_kind(WriteSAE(WriteSAEConfig(d_k=3, d_v=5, n_atoms=4, k=2, center=True)).double(), "writes")
    for dictionary, head, config, error, words in (
        (sae, None, {}, ValueError, "got None"),
        ({0: sae}, 1, {}, ValueError, "head 1 was given too"),
        ({}, None, {}, ValueError, "at least one head"),
        (sae, 9, {}, IndexError, "heads 0 to 3"),
        (resid, 1, {}, ValueError, "hook_resid_pre"),
        ({0: sae, 1: states}, None, {}, ValueError, "head 0 writes, head 1 state"),
        (wide, 1, {}, ValueError, "5 x 3"),
        (sae, 1, {"ranks": (4,)}, ValueError, "rank 4"),
        (states, 1, {"throughout": True}, ValueError, "rebuilds state"),
        (centred, 1, {"throughout": True}, ValueError, "a mean"),
    ):
        with pytest.raises(error, match=words):
            run(model, dictionary, tokens, head=head, **config)
    with pytest.raises(ValueError, match="nothing to predict"):
        run(model, sae, tokens[:, : N + 1])
    with pytest.raises(ValueError, match="two passages"):
        run(model, sae, tokens[:1])
