"""Sweeps against plain runs with functions on hooks, for every rule and the hybrid: nothing of the fork engine is trusted."""

import signal
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from hooked_recurrent.patching import SITES, ablation, activation_patching, attribution_patching
from tests.hooked_recurrent.models import STACKS, distance, over_stacks, tiny_model, tokens_of

EXACT = 1e-9  # float64
ROOT = Path(__file__).parents[3]
LENGTH = 6
AXES = [("layer", "position"), ("layer", "head"), ("layer", "head", "position")]


@lru_cache
def model_of(layer_types):
    return tiny_model(layer_types, seed=2).requires_grad_(False)


def texts(model, rows=1):
    return (tokens_of(model, rows, LENGTH, seed=seed) for seed in (1, 2))


def metric(logits):
    return logits[0, -1, 3] - logits[0, -1, 5] + 0.1 * logits[0].sin().mean()


def spread(logits):
    return logits[0, -1].softmax(-1).square().sum()


def by_hook_function(model, tokens, site, place, values):
    """The metric of a run in which a function on the site's own hook, write and state included, puts values there."""
    layer, head, position = place

    def put(tensor, hook):
        for index, absolute in enumerate(hook.positions.tolist()):
            if position in (None, absolute):
                here = (0, index) if head is None else (0, index, head)
                there = (absolute,) if head is None else (absolute, head)
                tensor[here] = values[there]

    logits = model.run_with_hooks(tokens, fwd_hooks=[(SITES[site].hook_name(layer), put)])
    return float(metric(logits))


def places(sweep):
    for index in torch.cartesian_prod(*(torch.arange(len(along)) for along in sweep.axes.values())):
        where = {name: along[at] for at, (name, along) in zip(index.tolist(), sweep.axes.items(), strict=True)}
        yield tuple(index.tolist()), (where["layer"], where.get("head"), where.get("position"))


def kept(model, tokens, site, layer):
    """What stands at a site, by its own hook."""
    name = SITES[site].hook_name(layer)
    return model.run_with_cache(tokens, names_filter=name)[1][name][0]


@over_stacks
@pytest.mark.parametrize("site", SITES)
def test_activation_patching_is_what_a_function_does(layer_types, site, as_users_run):
    model = model_of(layer_types)
    corrupted, clean = texts(model)
    layers = SITES[site].layers(model)
    if not layers:
        with pytest.raises(ValueError, match=f"this model has no site '{site}' in any layer"):
            activation_patching(model, corrupted, clean, metric, site)
        return
    for axes in AXES if SITES[site].by_head else AXES[:1]:
        sweep = activation_patching(model, corrupted, clean, metric, site, axes=axes)
        assert list(sweep.axes) == list(axes) and sweep.axes["layer"] == tuple(layers)
        assert sweep.baseline == pytest.approx([float(metric(model(corrupted)))])
        assert sweep.target == pytest.approx([float(metric(model(clean)))])
        moved = False
        for index, place in list(places(sweep))[:: 1 if len(axes) == 2 else 5]:
            values = kept(model, clean, site, place[0])
            expected = by_hook_function(model, corrupted, site, place, values)
            assert abs(sweep.values[index].item() - expected) <= EXACT
            moved |= abs(expected - sweep.baseline[0]) > 1e-6
        assert moved


@over_stacks
@pytest.mark.parametrize("site", SITES)
def test_attribution_is_the_derivative(layer_types, site, as_users_run):
    """Finite differences of the metric on the way to the clean activation, in every kind of sweep."""
    model = model_of(layer_types)
    corrupted, clean = texts(model)
    if not SITES[site].layers(model):
        return
    for axes in AXES if SITES[site].by_head else AXES[:1]:
        sweep = activation_patching(model, corrupted, clean, metric, site, axes=axes, attribution=True)
        assert sweep.estimate.shape == sweep.values.shape and sweep.estimate.abs().max() > 1e-6
        for index, place in list(places(sweep))[:: 3 if len(axes) == 2 else 11]:
            here, there = (kept(model, text, site, place[0]) for text in (corrupted, clean))
            eps = 1e-5
            along = [
                by_hook_function(model, corrupted, site, place, here + e * (there - here))
                for e in (2 * eps, eps, -eps, -2 * eps)
            ]
            slope = (-along[0] + 8 * along[1] - 8 * along[2] + along[3]) / (12 * eps)
            assert abs(sweep.estimate[index].item() - slope) <= 1e-8 * max(1.0, abs(slope))


@over_stacks
@pytest.mark.parametrize("site", ["z", "read", "write", "state", "mixer_out"])
@pytest.mark.parametrize("how", ["zero", "mean", "resample", "delete"])
def test_ablation_is_what_a_function_does(layer_types, site, how, as_users_run):
    model = model_of(layer_types)
    tokens, reference = texts(model, rows=2)
    tokens = tokens[:1]
    if how == "delete" and site not in ("write", "state"):
        with pytest.raises(ValueError, match=f"only a write or a state can be deleted, not '{site}'"):
            ablation(model, tokens, metric, site, how)
        return
    axes = AXES[2] if SITES[site].by_head else AXES[0]
    sweep = ablation(model, tokens, metric, site, how, reference=reference, seed=3, axes=axes)
    draws = torch.randint(reference.numel(), (1, LENGTH), generator=torch.Generator().manual_seed(3))[0]
    for index, place in list(places(sweep))[::7]:
        name = SITES[site].hook_name(place[0])
        pool = model.run_with_cache(reference, names_filter=name)[1][name].flatten(0, 1)
        values = {"mean": pool.mean(0).expand(LENGTH, *pool.shape[1:]), "resample": pool[draws]}
        put = values.get(how, torch.zeros_like(pool[:LENGTH]))
        expected = by_hook_function(model, tokens, site, place, put)
        assert abs(sweep.values[index].item() - expected) <= EXACT


def test_a_net_write_goes_with_its_erase():
    model = model_of(STACKS["gated_delta_net"])
    tokens, _ = texts(model)
    additive, net = (
        ablation(model, tokens, metric, "write", "delete", axes=AXES[2], form=form) for form in ("additive", "net")
    )

    def no_strength(tensor, hook):
        tensor[:, 2, 1] = 0.0

    logits = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.mixer.hook_beta", no_strength)])
    assert abs(net.values[0, 1, 2].item() - float(metric(logits))) <= EXACT
    assert distance(additive.values, net.values) > 1e-6


def test_rows_have_an_axis_and_a_metric_each():
    model = model_of(STACKS["hybrid"])
    corrupted, clean = texts(model, rows=2)
    both = activation_patching(model, corrupted, clean, [metric, spread], "write", attribution=True)
    assert list(both.axes) == ["row", "layer", "position"] and both.axes["row"] == (0, 1)
    for row, one in enumerate((metric, spread)):
        alone = activation_patching(
            model, corrupted[row : row + 1], clean[row : row + 1], one, "write", attribution=True
        )
        assert distance(both.values[row], alone.values) <= EXACT
        assert distance(both.estimate[row], alone.estimate) <= EXACT
        assert both.target[row] == pytest.approx(alone.target[0])
    mean = both.mean("row")
    assert distance(mean.values, both.values.mean(0)) <= EXACT and len(mean.baseline) == len(mean.target) == 1
    assert mean.recovered().shape == (2, LENGTH)


def test_some_places_only_and_the_last_logits_alone():
    model = model_of(STACKS["rwkv7"])
    corrupted, clean = texts(model)

    def last(logits):
        return logits[0, -1, 3]

    full = activation_patching(model, corrupted, clean, last, "z", axes=AXES[2], attribution=True)
    some = activation_patching(
        model, corrupted, clean, last, "z", axes=AXES[2], attribution=True,
        layers=[1], heads=[3, 0], positions=[5, 2], logits="last",
    )  # fmt: skip
    assert some.axes == {"layer": (1,), "head": (3, 0), "position": (5, 2)}
    assert distance(some.values, full.values[1:, [3, 0]][:, :, [5, 2]]) <= EXACT
    assert distance(some.estimate, full.estimate[1:, [3, 0]][:, :, [5, 2]]) <= EXACT


@pytest.mark.parametrize("memory", [1, 20_000])
def test_a_small_memory_changes_nothing(memory):
    model = model_of(STACKS["hybrid"])
    corrupted, clean = texts(model)
    free, bound = (
        activation_patching(model, corrupted, clean, metric, "state", axes=AXES[2], memory=m) for m in (2**30, memory)
    )
    assert distance(bound.values, free.values) <= EXACT


def test_gradients_are_left_alone():
    model = tiny_model(STACKS["mamba2"], seed=2)
    corrupted, clean = texts(model)
    sweep = activation_patching(model, corrupted, clean, metric, "write", attribution=True)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not sweep.values.requires_grad and not sweep.estimate.requires_grad


BAD = {
    "site": ({"site": "reed"}, ValueError, "there is no site 'reed' to sweep; did you mean 'read'?"),
    "axes": ({"axes": ("position",)}, ValueError, "unknown axes"),
    "no heads": ({"axes": ("layer", "head")}, ValueError, "site 'resid_pre' has no head axis"),
    "layer": ({"layers": [2]}, IndexError, r"there is no layer 2 to sweep; there are 0 to 1"),
    "twice": ({"layers": [1, 1]}, ValueError, "layers must be one or more different numbers"),
    "head": ({"site": "z", "heads": [4]}, IndexError, "there is no head 4 to sweep; there are 0 to 3"),
    "position": ({"positions": [6]}, IndexError, "there is no position 6 to sweep; there are 0 to 5"),
    "logits": ({"logits": "first"}, ValueError, "logits must be 'all' or 'last', got 'first'"),
    "option": ({"axis": ("layer", "head")}, TypeError, "axis"),
    "metrics": ({"metric": [metric, metric]}, ValueError, "2 metrics for 1 rows"),
    "vector": ({"metric": lambda logits: logits[0, -1]}, ValueError, "a metric gives one number per text"),
    "nan": ({"metric": lambda logits: float("nan")}, ValueError, "the metric is NaN"),
    "all positions": ({"site": "z", "axes": AXES[1], "positions": [1]}, ValueError, "change all positions"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sweeps(case, as_users_run):
    options, error, words = BAD[case]
    model = model_of(STACKS["gated_delta_net"])
    corrupted, clean = texts(model)
    with pytest.raises(error, match=words):
        activation_patching(model, corrupted, clean, **({"metric": metric} | options))
    with pytest.raises(ValueError, match=r"the clean text is \(1, 5\) tokens, the corrupted \(1, 6\)"):
        activation_patching(model, corrupted, clean[:, :5], metric)
    with pytest.raises(ValueError, match="unknown ablation 'none'"):
        ablation(model, corrupted, metric, how="none")


class Killed(Exception):
    pass


@pytest.mark.parametrize("torn", ["", "[3, 0.2", "["], ids=["whole", "in a number", "at once"])
def test_a_killed_sweep_goes_on(tmp_path, torn, as_users_run):
    model = model_of(STACKS["hybrid"])
    corrupted, clean = texts(model, rows=2)
    path = tmp_path / "sweep.jsonl"
    runs = []

    def counted(logits):
        runs.append(1)
        if len(runs) == limit:
            raise Killed
        return metric(logits)

    options = {"site": "write", "axes": AXES[2], "memory": 30_000}
    limit = 0
    whole = activation_patching(model, corrupted, clean, counted, **options)
    total, limit = len(runs), 60
    runs.clear()
    with pytest.raises(Killed):
        activation_patching(model, corrupted, clean, counted, record=path, **options)
    measured = len(path.read_text().splitlines()) - 1
    assert 10 < measured < whole.values.numel()
    path.write_text(path.read_text() + torn)
    limit = 0
    runs.clear()
    resumed = activation_patching(model, corrupted, clean, counted, record=path, **options)
    assert torch.equal(resumed.values, whole.values)
    assert len(runs) == total - measured
    runs.clear()
    again = activation_patching(model, corrupted, clean, counted, record=path, **options)
    assert torch.equal(again.values, whole.values) and len(runs) == 4  # the unchanged runs alone


def test_a_record_of_something_else_is_refused(tmp_path):
    model = model_of(STACKS["gated_delta_net"])
    corrupted, clean = texts(model)
    path = tmp_path / "sweep.jsonl"
    activation_patching(model, corrupted, clean, metric, "write", record=path)
    before = path.read_bytes()
    for tokens, options, words in (
        (corrupted, {"site": "z"}, "records another sweep: its kind is"),
        (corrupted.flip(1), {"site": "write"}, "records another sweep: its tokens is"),
        (corrupted, {"site": "write", "axes": AXES[1]}, "records another sweep: its axes is"),
    ):
        with pytest.raises(ValueError, match=words):
            activation_patching(model, tokens, clean, metric, record=path, **options)
    with pytest.raises(ValueError, match="records another model or metric"):
        activation_patching(model, corrupted, clean, spread, "write", record=path)
    assert path.read_bytes() == before
    path.write_text("something of the user's\n")
    with pytest.raises(ValueError, match="is no record of a sweep"):
        activation_patching(model, corrupted, clean, metric, "write", record=path)
    assert path.read_text() == "something of the user's\n"


def test_the_same_sweep_twice_is_bit_for_bit_the_same():
    model = model_of(STACKS["hybrid"])
    corrupted, clean = texts(model)
    one, other = (activation_patching(model, corrupted, clean, metric, "state") for _ in range(2))
    assert torch.equal(one.values, other.values) and one.baseline == other.baseline
    assert replace(one, values=other.values) is not one


@pytest.mark.parametrize("rows", [1, 2])
def test_attribution_alone_is_the_estimate_beside_the_true_effect(rows):
    model = model_of(STACKS["hybrid"])
    corrupted, clean = texts(model, rows)
    options = {"site": "write", "axes": AXES[2], "heads": [2, 0]}
    both = activation_patching(model, corrupted, clean, metric, attribution=True, **options)
    alone = attribution_patching(model, corrupted, clean, metric, **options)
    assert torch.equal(alone.estimate, both.estimate) and alone.axes == both.axes and alone.target == both.target
    assert distance(alone.effect(), both.estimate) <= EXACT and alone.baseline == both.baseline


KILLED = """
import os, signal, sys
from hooked_recurrent.patching import activation_patching
from tests.hooked_recurrent.patching.test_sweeps import AXES, STACKS, metric, model_of, texts

runs = []

def counted(logits):
    runs.append(1)
    if len(runs) == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    return metric(logits)

model = model_of(STACKS["hybrid"])
corrupted, clean = texts(model)
activation_patching(model, corrupted, clean, counted, "write", axes=AXES[2], memory=30_000, record=sys.argv[1])
"""


def test_a_sweep_goes_on_after_its_process_was_killed(tmp_path):
    path = tmp_path / "sweep.jsonl"
    process = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    measured = len(path.read_text().splitlines()) - 1
    model = model_of(STACKS["hybrid"])
    corrupted, clean = texts(model)
    runs = []

    def counted(logits):
        runs.append(1)
        return metric(logits)

    options = {"site": "write", "axes": AXES[2], "memory": 30_000}
    resumed = activation_patching(model, corrupted, clean, counted, record=path, **options)
    assert 10 < measured and len(runs) == resumed.values.numel() - measured + 2  # and the two unchanged runs
    assert torch.equal(resumed.values, activation_patching(model, corrupted, clean, metric, **options).values)
