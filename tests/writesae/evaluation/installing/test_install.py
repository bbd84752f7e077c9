"""The install: its directions, its controls and its measurements against plain full passes, in float64, on every rule."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_recurrent import WriteEdit
from tests.hooked_recurrent.models import HYBRID, RULES
from tests.writesae.evaluation.cells_for_tests import HEAD, LAYER, cell
from writesae.evaluation.installing.install import InstallConfig, install
from writesae.evaluation.installing.install_context import PLACES, Context, draw_targets, install_sites
from writesae.evaluation.installing.install_directions import fixed_directions, random_directions
from writesae.evaluation.installing.install_edits import Installs
from writesae.evaluation.installing.install_lambda import (
    OBJECTIVES,
    Climb,
    at_cells,
    budget,
    objective,
    promising,
    refine,
    slope,
    steepest,
    top_pairs,
)
from writesae.evaluation.installing.install_measure import collateral, included, measure
from writesae.evaluation.installing.install_result import InstallResult
from writesae.evaluation.installing.install_steering import gradient_steering, match_collateral, unembedding_steering

pytestmark = pytest.mark.shapes_on_one_rule

SMALL = InstallConfig(
    prompts=2,
    positions=1,
    per_stratum=1,
    magnitudes=(1.5, 6.0),
    new_tokens=5,
    middle=(5, 15),
    candidates=3,
    objective_steps=3,
    rounds=3,
    first_position=6,
)
GREEDY = Climb("greedy", 3, "in_recurrence", "native")
CELL = (LAYER, HEAD)
over_rules = pytest.mark.parametrize("rule", RULES)


def opened(rule, position=9, steps=5):
    model, sae, tokens = cell((rule, rule))
    return model, sae, tokens, Context.open(model, tokens, 1, position, steps)


def random_installs(context, count, norms, seed=0):
    made = random_directions(context, (CELL,) * count, norms, torch.arange(count), seed)
    return made["random"]


def norms_at(context, count, magnitude=1.5):
    return context.native_norms(LAYER)[:, HEAD].repeat(count, 1) * magnitude


@over_rules
def test_context_is_the_untouched_model(rule):
    model, _, tokens, context = opened(rule)
    with torch.no_grad():
        full = model(context.text[:, :-1])[0].log_softmax(-1)
    assert torch.equal(context.text[0, :10], tokens[1, :10])
    assert torch.allclose(context.log_probs, full[9:], atol=1e-12)
    assert torch.equal(context.continuation, context.log_probs.argmax(-1))
    _, cache = model.run_with_cache(context.text)
    key, value = (cache[f"blocks.{LAYER}.mixer.hook_write_{side}"][0, 7:10, HEAD] for side in ("key", "value"))
    matrices = key[:, :, None] * value[:, None, :]
    assert torch.allclose(context.native_norms(LAYER)[:, HEAD], matrices.flatten(1).norm(dim=1))


@over_rules
def test_measurements_equal_one_plain_full_pass(rule):
    model, _, _, context = opened(rule)
    targets = torch.tensor([3, 11])
    edits = random_installs(context, 2, norms_at(context, 2))
    found = measure(model, context, edits.single(context.first, "in_recurrence"), targets)
    for trial, target in enumerate(targets.tolist()):
        plain = [
            WriteEdit(LAYER, HEAD, 7 + place, "add", edits.key[trial, place], edits.value[trial, place])
            for place in range(PLACES)
        ]
        with torch.no_grad():
            after = model.run_with_hooks(context.text[:, :-1], edits=plain)[0, 9:].log_softmax(-1)
        assert found["logprob"][trial].item() == pytest.approx(after[0, target].item(), abs=1e-10)
        assert found["rank"][trial] == (after[0] > after[0, target]).sum()
        others = [token for token in range(model.cfg.d_vocab) if token != target]
        p, q = (side[:, others].log_softmax(-1) for side in (after, context.log_probs))
        assert found["collateral_kl"][trial].item() == pytest.approx(
            (p.exp() * (p - q)).sum(-1).mean().item(), abs=1e-10
        )
        reverse = (q.exp() * (q - p)).sum(-1).mean().item()
        assert found["collateral_kl_reverse"][trial].item() == pytest.approx(reverse, abs=1e-10)


@over_rules
def test_generation_with_batched_edits_equals_repeated_full_passes(rule):
    model, _, _, context = opened(rule)
    count = 2
    edits = random_installs(context, count, norms_at(context, count, 8.0))
    steering = unembedding_steering(model, torch.arange(2), (0, LAYER)).scaled(torch.tensor([50.0, 90.0]))
    batch = edits.batched(context.first, "in_recurrence") + steering.batched(context.first, start=count)
    made = []
    singles = edits.single(context.first, "in_recurrence") + steering.single(context.first)
    for single in singles:
        text = context.text[:, :10]
        for _ in range(5):
            with torch.no_grad():
                text = torch.cat([text, model.run_with_hooks(text, edits=single)[:, -1:].argmax(-1)], dim=1)
        made.append(text[0, 10:])
    assert any(not torch.equal(row, context.continuation) for row in made)
    for target in sorted({int(row[-1]) for row in made}):
        inside = included(model, context, batch, torch.full((count + 2,), target), 5)
        assert inside.tolist() == [bool((row == target).any()) for row in made]


@pytest.mark.parametrize("reading", ["in_recurrence", "cache"])
@over_rules
def test_lambda_is_the_derivative_of_the_objective(rule, reading):
    model, _, _, context = opened(rule)
    climb, targets, eps = Climb("greedy", 3, reading, "native"), torch.tensor([3, 11]), 1e-5
    here = slope(model, context, targets, [], climb, model.cfg.recurrent_layers)
    edits = random_installs(context, 2, torch.ones(2, PLACES, dtype=torch.float64))
    moved = []
    for factor in (eps, -eps):
        small = Installs(edits.cells, edits.key, edits.value * factor)
        moved.append(slope(model, context, targets, small.batched(context.first, reading), climb, [LAYER]).value)
    predicted = torch.einsum("tpk,tpkv,tpv->t", edits.key, at_cells(here.writes, edits.cells), edits.value)
    assert torch.allclose((moved[0] - moved[1]) / (2 * eps), predicted, rtol=1e-5, atol=1e-9)


@over_rules
def test_no_write_of_equal_norm_is_steeper_than_lambda(rule):
    model, _, _, context = opened(rule)
    targets, norms = torch.tensor([3, 11]), norms_at(context, 2)
    here = at_cells(slope(model, context, targets, [], GREEDY, [LAYER]).writes, (CELL, CELL))

    def derivative(edits):
        return torch.einsum("tpk,tpkv,tpv->t", edits.key, here, edits.value)

    best = steepest((CELL, CELL), here, norms, "native")
    assert torch.allclose(best.norms, norms)
    split = steepest((CELL, CELL), here, norms, "singular")
    assert torch.allclose(split.norms.norm(dim=-1), norms.norm(dim=-1))
    assert (derivative(split) >= derivative(best) - 1e-12).all()
    rivals = fixed_directions(model, context, targets, (CELL, CELL), norms, None)
    for seed in range(20):
        rivals[f"random {seed}"] = random_installs(context, 2, norms, seed)
    for rival in rivals.values():
        assert torch.allclose(rival.norms, norms)
        assert (derivative(rival) < derivative(best)).all()


@over_rules
def test_refinement_keeps_norms_and_never_falls(rule):
    model, _, _, context = opened(rule)
    targets, norms = torch.tensor([3, 11]), norms_at(context, 2, 3.0)
    start = slope(model, context, targets, [], GREEDY, [LAYER])
    first = steepest((CELL, CELL), at_cells(start.writes, (CELL, CELL)), norms, "native")
    reached = [refine(model, context, targets, first, norms, GREEDY, rounds) for rounds in (0, 2, 6)]
    for edits, value in reached:
        assert torch.allclose(edits.norms, norms)
        now = slope(model, context, targets, edits.batched(context.first, "in_recurrence"), GREEDY, [LAYER]).value
        assert torch.allclose(now, value)
    values = [value for _, value in reached]
    assert (values[1] >= values[0]).all()
    assert (values[2] >= values[1]).all()
    assert (values[2] > values[0]).all()


@over_rules
def test_promise_is_the_steepest_derivative_at_the_native_norm(rule):
    model, _, _, context = opened(rule)
    here = slope(model, context, torch.tensor([3]), [], GREEDY, model.cfg.recurrent_layers)
    cells = [(layer, head) for layer in (0, 1) for head in range(4)]
    promise = []
    for one in cells:
        matrix = at_cells(here.writes, (one,))
        edits = steepest((one,), matrix, context.native_norms(one[0])[None, :, one[1]], "native")
        promise.append(float(torch.einsum("tpk,tpkv,tpv->t", edits.key, matrix, edits.value)))
    in_order = [cells[index] for index in np.argsort(promise)[::-1]]
    assert promising(context, here.writes, 3) == [in_order[:3]]


@over_rules
def test_steering_is_matched_in_collateral_kl(rule):
    model, _, _, context = opened(rule)
    targets = torch.tensor([3, 11])
    wanted = measure(
        model, context, random_installs(context, 2, norms_at(context, 2)).single(7, "in_recurrence"), targets
    )["collateral_kl"]
    residual = slope(model, context, targets, [], GREEDY, [0, LAYER]).residual
    for steering in (unembedding_steering(model, targets, (0, LAYER)), gradient_steering(residual, (0, LAYER))):
        matched, shorter = match_collateral(model, context, steering, targets, wanted)
        kl = measure(model, context, matched.single(7), targets)["collateral_kl"]
        assert (kl <= wanted * (1 + 1e-12)).all()
        assert (kl >= 0.97 * wanted).all()
        found, at_match = (measure(model, context, one.single(7), targets) for one in (shorter, matched))
        assert (found["collateral_kl"] <= wanted * (1 + 1e-12)).all()
        assert (found["logprob"] >= at_match["logprob"] - 1e-12).all()
    direction = model.W_U[:, 3] / model.W_U[:, 3].norm()
    assert torch.allclose(unembedding_steering(model, targets, (0, LAYER)).vector[0, 1], direction)


def test_steering_out_of_reach_stays_below():
    model, _, _, context = opened("gated_delta_net")
    steering = unembedding_steering(model, torch.tensor([3]), (LAYER,))
    matched, _ = match_collateral(model, context, steering, torch.tensor([3]), torch.tensor([1e6]))
    assert torch.isfinite(matched.vector).all()
    assert measure(model, context, matched.single(7), torch.tensor([3]))["collateral_kl"] < 1e6


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10_000), st.floats(0, 40))
def test_collateral_ignores_the_target(seed, raised):
    generator = torch.Generator().manual_seed(seed)
    native = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    edited = native + 0.3 * torch.randn(1, 4, 9, generator=generator, dtype=torch.float64)
    higher = edited.clone()
    higher[..., 5] += raised
    for one, other in zip(
        *(
            collateral(x[None] if x.ndim == 2 else x, native.log_softmax(-1), torch.tensor([5]))
            for x in (edited, higher)
        ),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-10)
        assert one > 0


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10_000))
def test_budgets_are_equal_in_total(seed):
    norms, singular = torch.rand(2, 3, PLACES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    singular[0] = 0.0
    for split in ("native", "singular"):
        assert torch.allclose(budget(norms, singular, split).norm(dim=-1), norms.norm(dim=-1))


def test_objectives_by_hand():
    logits = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([2, 6])
    p = logits.softmax(-1)
    mine = torch.stack([p[row, :, token] for row, token in enumerate(targets)])
    rivals = torch.stack([p[row][:, [i for i in range(7) if i != token]].amax(-1) for row, token in enumerate(targets)])
    expected = {
        "first": mine[:, 0].log(),
        "mean": mine.log().mean(-1),
        "any": mine.mean(-1).log(),
        "greedy": (mine / rivals).sum(-1).log(),
    }
    assert set(expected) == set(OBJECTIVES)
    for kind, value in expected.items():
        assert torch.allclose(objective(logits, targets, kind), value)


def test_targets_lie_in_their_strata():
    model, _, tokens, context = opened("gated_delta_net")
    targets = draw_targets(context, tokens, per_stratum=2, middle=(5, 15), seed=0, frequent=4)
    ranks = context.log_probs[0].argsort(descending=True).tolist()
    prompt = set(context.text[0, :10].tolist())
    assert len({target.token for target in targets}) == len(targets)
    for target in targets:
        assert target.rank == ranks.index(target.token)
        if target.stratum == "middle":
            assert 5 <= target.rank < 15
        elif target.stratum == "rare":
            assert target.rank >= 15
        elif target.stratum == "semantic":
            assert target.token not in prompt
    middle = draw_targets(context, tokens, per_stratum=2, strata=("middle",), middle=(5, 15), seed=0, frequent=4)
    assert middle == [target for target in targets if target.stratum == "middle"]
    words = draw_targets(context, tokens, per_stratum=9, middle=(5, 15), seed=0, is_word=lambda token: token == 7)
    assert {target.token for target in words if target.stratum == "semantic"} <= {7}


def test_sites_are_within_reach():
    sites = install_sites(torch.zeros(5, 12, dtype=torch.long), 3, 4, 6, seed=1)
    assert len(set(sites)) == len(sites) == 12
    assert len({passage for passage, _ in sites}) == 3
    assert all(6 <= position < 12 for _, position in sites)


@pytest.mark.parametrize("layer_types", [*((rule, rule) for rule in RULES), HYBRID], ids=[*RULES, "hybrid"])
def test_install_end_to_end(layer_types):
    layer = 2 if layer_types == HYBRID else LAYER
    model, sae, tokens = cell(layer_types, layer=layer)
    result = install(model, sae, tokens, layer=layer, head=HEAD, config=SMALL)
    table = result.table
    edited = table[table["condition"] != "native"]
    writes = edited[~edited["condition"].str.startswith("steering")]
    trials = ["passage", "position", "target", "magnitude", "cell"]
    spread = writes.groupby(trials)["norm"].agg(["min", "max"])
    assert np.allclose(spread["min"], spread["max"])
    assert (edited.groupby(trials)[["layer", "head"]].nunique() == 1).all().all()
    given_cell = edited[edited["cell"] == "given"]
    assert set(map(tuple, given_cell[["layer", "head"]].to_numpy())) == {(layer, HEAD)}
    assert "fixed_atom_key" in set(given_cell["condition"])
    native = table[table["condition"] == "native"]
    assert (native["rank"] == native["initial_rank"]).all()
    assert np.allclose(edited["rank_improvement"], edited["initial_rank"] - edited["rank"])
    matched = edited.pivot_table(index=trials, columns="condition", values="collateral_kl")
    assert (matched["steering"] <= matched["lambda_refined"] * (1 + 1e-9)).all()


def test_result_pairs_trials_and_goes_through_json(tmp_path):
    model, sae, tokens = cell()
    told = []
    # Two strata: a summary has a row for each and for all, and every row is a dozen intervals.
    config = replace(SMALL, strata=("middle", "rare"))
    result = install(
        model, sae, tokens, layer=LAYER, head=HEAD, config=config, on_progress=lambda *done: told.append(done)
    )
    assert told == [(1, 2), (2, 2)]
    again = InstallResult.from_json(result.to_json(tmp_path / "install.json"))
    assert isinstance(again, InstallResult)
    rows = result.summary(n_resamples=50)
    assert len(rows) == (11 + 10 + 10) * (2 + 1) * (2 + 1)
    whole = next(row for row in rows if row["condition"] == "lambda_refined" and row["stratum"] is None)
    part = result.table[(result.table["condition"] == "lambda_refined") & (result.table["cell"] == whole["cell"])]
    part = part[part["magnitude"] == whole["magnitude"]]
    assert whole["inclusion"] == part["included"].mean()
    native = result.table[result.table["condition"] == "native"]
    assert whole["over_native"] == pytest.approx(part["included"].mean() - native["included"].mean())
    assert len(result.figure().axes) == 3
    with pytest.raises(KeyError, match="no condition 'nobody'"):
        result.advantage("lambda", "nobody", cell="auto")
    with pytest.raises(KeyError, match="no trial with cell"):
        result.trials("best")


def test_same_seed_same_table_whatever_else_runs():
    model, sae, tokens = cell()
    both, alone = (
        install(
            model, sae, tokens, layer=LAYER, head=HEAD, config=InstallConfig(**{**SMALL.to_dict(), **changed})
        ).table
        for changed in ({}, {"cells": ("given",), "steering": False})
    )
    shared = both[both["cell"].isin(["given", "any"]) & ~both["condition"].str.startswith("steering")].reset_index(
        drop=True
    )
    assert len(shared) == len(alone)
    for column in ("target", "condition", "included", "norm"):
        assert shared[column].equals(alone[column]) or np.allclose(shared[column], alone[column], atol=1e-9)
    assert np.allclose(shared["logprob"], alone["logprob"], atol=1e-8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"objective": "greed"}, "did you mean 'greedy'"),
        ({"cells": ("gievn",)}, "did you mean 'given'"),
        ({"magnitudes": (0.0,)}, "positive magnitudes"),
        ({"middle": (10, 5)}, "two rising ranks"),
        ({"objective_steps": 30}, "at most new_tokens=20"),
        ({"first_position": 1}, "at least 3"),
        ({"split": "equal"}, "'native' or 'singular'"),
    ],
)
def test_config_refuses(changed, message):
    with pytest.raises(ValueError, match=message):
        InstallConfig(**changed)


def test_short_passages_are_refused():
    model, sae, tokens = cell()
    with pytest.raises(ValueError, match="needs at least 17"):
        install(model, sae, tokens[:, :16], layer=LAYER, head=HEAD)


def test_top_pairs_of_a_rank_one_matrix():
    key, value = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0, 0.0])
    left, right, size = top_pairs(key[:, None] * value)
    assert torch.allclose(left[:, None] * right * size, key[:, None] * value, atol=1e-6)
    assert size.item() == pytest.approx(10.0)
