"""Every predictor against what it claims to be: the derivative, the exact change of a layer, the formula by hand."""

from functools import lru_cache

import pytest
import torch

from hooked_recurrent import ActivationEdit, WriteEdit
from hooked_recurrent.patching.forks import Trunk, run_edits
from tests.hooked_recurrent.models import ALL_LINEAR, HYBRID, RULES, distance, over_stacks, tiny_model, tokens_of
from writesae.evaluation.predicting.logit_shift_context import TAIL, TOP, Context, Targets
from writesae.evaluation.predicting.logit_shift_predictors import (
    PREDICTORS,
    Added,
    channel_gain,
    in_layer,
    mixer_change,
    predict,
    propagated,
    reach,
    read_change,
    three_factor,
)

pytestmark = pytest.mark.shapes_on_one_rule

T, HORIZONS = 6, (0, 1, 5)
over_rules = pytest.mark.parametrize("rule", RULES)


@lru_cache
def context_of(layer_types=ALL_LINEAR):
    model = tiny_model(layer_types, seed=2).requires_grad_(False)
    trunk = Trunk.grow(model, tokens_of(model, batch=1, length=14), [T])
    layers = model.cfg.recurrent_layers
    return Context.run(model, trunk, T, layers, horizons=HORIZONS, top=3, tail_rank=20)


def added(edits=2, terms=1, size=1.0):
    generator = torch.Generator().manual_seed(7)
    key, value = (torch.randn(edits, terms, width, generator=generator, dtype=torch.float64) for width in (3, 5))
    return Added(key, size * value)


def measured(context, cell, given, factor=1.0):
    """By forks."""
    edits = [
        [WriteEdit(*cell, T, "add", k, factor * v) for k, v in zip(keys, values, strict=True)]
        for keys, values in zip(given.key, given.value, strict=True)
    ]
    made = torch.empty(len(edits), len(context.native), dtype=torch.float64)
    for fork in run_edits(context.model, context.trunk.text, edits, horizon=max(HORIZONS), trunk=context.trunk):
        made[fork.index] = context.targets.of(fork.logits[None])[0] - context.native
    return made


def cells_of(context):
    layers = context.model.cfg.recurrent_layers
    return [(layers[0], 1), (layers[-1], 2)]


def test_targets_are_the_baselines_top_and_one_of_its_tail():
    context = context_of()
    logits = context.model(context.trunk.text)[0]
    targets = context.targets
    assert targets.horizon.tolist() == [h for h in HORIZONS for _ in range(4)]
    assert targets.kind == [TOP, TOP, TOP, TAIL] * 3 and targets.rank.tolist() == [1, 2, 3, 20] * 3
    for row, (horizon, token, rank) in enumerate(zip(targets.horizon, targets.token, targets.rank, strict=True)):
        here = logits[T + horizon]
        assert int((here > here[token]).sum()) == rank - 1
        assert abs(float(here[token] - context.native[row])) < 1e-12
    scores = torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 6.0]])
    assert Targets.choose(scores, (1,), 1, 3).token.tolist() == [2, 1]


@over_stacks
def test_first_order_is_the_derivative_of_every_logit(layer_types):
    """Central differences of fourth order, two terms per edit."""
    context = context_of(layer_types)
    given = added(terms=2)
    for cell in cells_of(context):
        steps = ((1e-5, 8), (-1e-5, -8), (2e-5, -1), (-2e-5, 1))
        derivative = sum(weight * measured(context, cell, given, amount) for amount, weight in steps) / 12e-5
        assert derivative.abs().max() > 1e-3
        assert distance(predict(context, cell, given, ("first_order",))["first_order"], derivative) < 1e-6


@over_stacks
def test_the_edited_layer_is_exact_at_any_size(layer_types):
    """What its queries read and what its mixer puts out, in one case with an edit many times the native write."""
    context, given = context_of(layer_types), added(terms=2, size=5.0)
    for layer, head in cells_of(context):
        edits = [
            WriteEdit(layer, head, T, "add", key, value)
            for key, value in zip(given.key[1], given.value[1], strict=True)
        ]
        names = [f"blocks.{layer}.mixer.hook_read", f"blocks.{layer}.hook_mixer_out"]
        (_, plain), (_, changed) = (
            context.model.run_with_cache(context.trunk.text, names_filter=names, edits=made) for made in ([], edits)
        )
        here = slice(T, T + context.length)
        read, out = ((changed[name] - plain[name])[0, here] for name in names)
        predicted = read_change(context, (layer, head), given)
        assert distance(predicted[1], read[:, head]) < 1e-9
        assert distance(mixer_change(context, (layer, head), predicted, context.layer(layer))[1], out) < 1e-9


@over_stacks
def test_errors_shrink_as_their_order_says(layer_types):
    """Halving an edit: first_order and norm_exact miss a quarter as much, norm_midpoint an eighth."""
    context = context_of(layer_types)
    for cell in cells_of(context):
        errors = []
        for size in (2e-4, 1e-4):
            given = added(size=size)
            true = measured(context, cell, given)
            errors.append({name: (made - true).norm() for name, made in predict(context, cell, given).items()})
        for name, order in (("first_order", 2), ("norm_exact", 2), ("norm_midpoint", 3)):
            ratio = float(errors[0][name] / errors[1][name])
            assert abs(ratio - 2**order) < 0.05 * 2**order, (name, cell, ratio)


@over_rules
def test_norm_exact_is_the_gradient_times_the_true_change_of_the_mixer(rule):
    """Against an activation edit that puts the true change in: its derivative, by central differences."""
    context, given, cell = context_of((rule, rule)), added(edits=1, size=3.0), (0, 1)
    edit = WriteEdit(*cell, T, "add", given.key[0, 0], given.value[0, 0])
    name = "blocks.0.hook_mixer_out"
    text = context.trunk.text
    change = context.model.run_with_cache(text, names_filter=name, edits=[edit])[1][name]
    change = change - context.model.run_with_cache(text, names_filter=name)[1][name]

    def at(amount):
        here = slice(T, T + context.length)
        pushed = ActivationEdit(name, here, amount * change[0, here], op="add")
        return context.targets.of(context.model(text, edits=[pushed])[:, T:])[0]

    for predictor, around in (("norm_exact", 0.0), ("norm_midpoint", 0.5)):
        step = 1e-3
        near, far = (at(around + n * step) - at(around - n * step) for n in (1, 2))
        derivative = (8 * near - far) / (12 * step)
        assert distance(predict(context, cell, given, (predictor,))[predictor][0], derivative) < 1e-7, predictor


@over_rules
def test_where_nothing_stands_above_the_layer_in_layer_is_the_derivative(rule):
    """A model of one layer; where its block has an MLP, the MLP is silenced."""
    model = tiny_model((rule,), seed=3).requires_grad_(False)
    if model.blocks[0].mlp is not None:
        for weight in model.blocks[0].mlp.parameters():
            weight.zero_()
    trunk = Trunk.grow(model, tokens_of(model, batch=1, length=14), [T])
    context = Context.run(model, trunk, T, [0], horizons=HORIZONS, top=3, tail_rank=20)
    made = predict(context, (0, 2), added())
    assert distance(made["in_layer"], made["first_order"]) < 1e-9
    assert distance(made["three_factor"], made["first_order"]) > 1e-2


@over_rules
def test_three_factor_is_the_formula(rule):
    """Gate product, query match, unembedding match, written out for one edit and target."""
    context, cell, given = context_of((rule, rule)), (1, 2), added(edits=1)
    model, native = context.model, context.layer(1)
    prefix = "blocks.1.mixer.hook_"
    _, cache = model.run_with_cache(context.trunk.text)
    gains, row = channel_gain(context, cell, native), 5
    s = T + int(context.targets.horizon[row])
    log_decay = cache[f"{prefix}log_decay"][0, T + 1 : s + 1, 2]
    gate = log_decay.sum(0).exp()
    match = (gate * given.key[0, 0] * cache[f"{prefix}query"][0, s, 2]).sum()
    out = (gains[s - T] * given.value[0, 0]) @ model.blocks[1].W_O[2]
    if model.cfg.norm == "layer":
        out = out - out.mean()
    weight = model.ln_final.weight + getattr(model.ln_final, "offset", 0.0)
    direction = model.W_U[:, context.targets.token[row]] * weight / cache["ln_final.hook_scale"][0, s]
    assert abs(match * (out @ direction) - three_factor(context, cell, given, native)[0, row]) < 1e-10


def test_a_channels_gain_is_its_own_answer():
    """Where each channel is scaled by itself the gain is that factor: Gated DeltaNet's up to its norm's own answer."""
    context = context_of()
    native = context.layer(0)
    mixer, eye = context.model.blocks[0].mixer, torch.eye(5, dtype=torch.float64)
    gains = channel_gain(context, (0, 1), native)
    for channel in range(5):
        moved = native.read.clone()
        moved[:, :, 1] += 1e-6 * eye[channel]
        answer = (mixer.read_out(moved, native.beside) - mixer.read_out(native.read, native.beside)) / 1e-6
        assert torch.allclose(answer[0, :, 1, channel], gains[:, channel], rtol=1e-3)


def test_without_the_erase_a_key_only_decays():
    context, given = context_of(), added()
    decay = context.role((0, 1), "log_decay").exp()
    keys = propagated(context, (0, 1), given.key, erase=False)
    assert torch.allclose(keys[3], decay[1:4].prod() * given.key)
    assert distance(propagated(context, (0, 1), given.key), keys) > 1e-2


def test_only_the_predictors_that_are_asked_are_given_and_edits_do_not_meet():
    context, given = context_of(HYBRID), added(edits=3)
    whole = predict(context, (0, 1), given)
    assert tuple(whole) == PREDICTORS
    alone = predict(context, (0, 1), Added(given.key[1:2], given.value[1:2]), ("norm_midpoint", "in_layer"))
    assert tuple(alone) == ("norm_midpoint", "in_layer")
    for name, made in alone.items():
        assert distance(made[0], whole[name][1]) < 1e-10


@over_rules
def test_reach_is_the_largest_share_of_change_so_far(rule):
    context, given, (layer, head) = context_of((rule, rule)), added(edits=1, size=3.0), (0, 1)
    names = [f"blocks.{layer}.mixer.hook_read", f"blocks.{layer}.hook_mixer_out", f"blocks.{layer}.hook_resid_pre"]
    edit = WriteEdit(layer, head, T, "add", given.key[0, 0], given.value[0, 0])
    (_, plain), (_, changed) = (
        context.model.run_with_cache(context.trunk.text, names_filter=names, edits=made) for made in ([], [edit])
    )
    read, out, before = ([cache[name][0, T:] for cache in (plain, changed)] for name in names)
    shares = {
        "read_change": (read[1] - read[0])[:, head].norm(dim=-1) / read[0][:, head].norm(dim=-1),
        "stream_change": (out[1] - out[0]).norm(dim=-1) / (before[0] + out[0]).norm(dim=-1),
    }
    for name, made in reach(context, (layer, head), given).items():
        expected = torch.stack([shares[name][: horizon + 1].max() for horizon in context.targets.horizon])
        assert distance(made[0], expected) < 1e-9, name


def test_in_layer_is_linear_in_the_edit():
    context, native, given = context_of(), context_of().layer(0), added()
    change = read_change(context, (0, 1), given)
    once, twice = (in_layer(context, (0, 1), factor * change, native) for factor in (1.0, 2.0))
    assert torch.allclose(2 * once, twice)
