"""What users give to sweeps: text, metrics of every kind, records, labels; and what they get back on any axes."""

import itertools
import json

import numpy as np
import pytest
import torch

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.patching import ablation, activation_patching
from tests.hooked_recurrent.models import STACKS, distance, tiny_model, tokens_of

EXACT = 1e-9
CODE, OTHER = "def f(self, x):\n    return self.", "def f(self, y):\n    return self."


@pytest.fixture(scope="module")
def shipped():
    return HookedRecurrentModel.from_pretrained("tiny-gated-deltanet")


@pytest.fixture(scope="module")
def model():
    return tiny_model(STACKS["hybrid"], seed=2)


def texts(model, rows=1):
    return (tokens_of(model, rows, 6, seed=seed) for seed in (1, 2))


def metric(logits):
    return logits[0, -1, 3] - logits[0, -1, 5]


def test_text_and_lists_of_text(shipped, as_users_run):
    by_tokens = activation_patching(shipped, shipped.to_tokens(OTHER), shipped.to_tokens(CODE), metric, layers=[1])
    by_text = activation_patching(shipped, OTHER, CODE, metric, layers=[1])
    assert torch.equal(by_text.values, by_tokens.values) and by_text.effect().abs().max() > 0.1
    rows = activation_patching(shipped, [OTHER, CODE], [CODE, CODE], metric, layers=[1])
    assert rows.axes["row"] == (0, 1) and distance(rows.values[0], by_text.values) <= 1e-4
    assert rows.effect()[1].abs().max() <= 1e-4
    with pytest.raises(ValueError, match=r"the clean text is \(1, 11\) tokens, the corrupted \(1, 10\)"):
        activation_patching(shipped, OTHER, CODE + " x", metric)
    labels = shipped.to_str_tokens(OTHER)
    by_text.figure(labels=labels).canvas.draw()
    with pytest.raises(ValueError, match="3 labels do not reach position 9: give one per position of the text"):
        by_text.figure(labels=labels[:3])


def test_metrics_of_every_kind(model):
    """Tensors of one entry, with a graph of their own, numpy, int; each is a float of the sweep, and no graph is kept."""
    corrupted, clean = texts(model)
    probe = torch.ones(29, dtype=torch.float64, requires_grad=True)
    found = {}
    for name, some in {
        "tensor": lambda logits: logits[0, -1].sum(),
        "one entry": lambda logits: logits[0, -1:].sum(-1),
        "graph": lambda logits: (logits[0, -1] * probe).sum(),
        "numpy": lambda logits: np.sum(logits[0, -1].numpy()),
    }.items():
        sweep = activation_patching(model, corrupted, clean, some, "write", layers=[0])
        assert sweep.values.dtype == torch.float64 and not sweep.values.requires_grad
        found[name] = sweep.values
    assert all(distance(values, found["tensor"]) <= EXACT for values in found.values())
    whole = activation_patching(model, corrupted, clean, lambda logits: int(logits[0, -1].argmax()), layers=[0])
    assert torch.equal(whole.values, whole.values.round())


def test_last_logits_are_also_what_attribution_differentiates(model):
    corrupted, clean = texts(model)
    options = {"site": "write", "attribution": True, "layers": [0]}
    last = activation_patching(model, corrupted, clean, lambda x: x.sin().sum(), logits="last", **options)
    full = activation_patching(model, corrupted, clean, lambda x: x[:, -1:].sin().sum(), **options)
    assert distance(last.values, full.values) <= EXACT and distance(last.estimate, full.estimate) <= EXACT


def test_numbers_may_come_from_generators(model):
    corrupted, clean = texts(model)
    some = activation_patching(
        model, corrupted, clean, metric, "write", axes=("layer", "head", "position"),
        layers=(layer for layer in (2, 0)), heads=iter([1]), positions=range(2, 4),
    )  # fmt: skip
    assert some.axes == {"layer": (2, 0), "head": (1,), "position": (2, 3)}


BAD = {
    "negative": ({"positions": [-1]}, IndexError, "there is no position -1 to sweep; there are 0 to 5$"),
    "gaps": ({"site": "z", "layers": [1]}, IndexError, r"there is no layer 1 to sweep; there are 0 to 2: \[0, 2\]"),
    "a number": ({"layers": 1}, TypeError, "layers must be a list of whole numbers, got 1"),
    "no whole number": ({"layers": [0.7]}, TypeError, r"layers must be a list of whole numbers, got \[0.7\]"),
    "heads": ({"heads": [0]}, ValueError, "site 'resid_pre' has no head axis: leave heads out"),
    "word": ({"metric": ["x"]}, TypeError, "a metric must be a function of the logits"),
    "nothing": ({"metric": lambda logits: None}, TypeError, "a metric gives a number, got NoneType"),
    "inf": ({"metric": lambda logits: float("inf")}, ValueError, "the metric is Inf"),
    "float": ({"metric": lambda x: 1.0, "attribution": True}, TypeError, "which must give a tensor then, and no plain"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, model, as_users_run):
    given, error, words = BAD[case]
    with pytest.raises(error, match=words):
        activation_patching(model, *texts(model), **({"metric": metric} | given))


def test_a_kill_in_the_middle_of_a_batch_costs_nothing(model, tmp_path):
    """The record's folder is made; what was measured before Ctrl-C is in it, and no hook is left."""
    path, runs = tmp_path / "new" / "sweep.jsonl", []

    def interrupted(logits):
        runs.append(1)
        if len(runs) == stop:
            raise KeyboardInterrupt
        return metric(logits)

    stop = 9
    with pytest.raises(KeyboardInterrupt):
        ablation(model, next(texts(model)), interrupted, "write", axes=("layer", "head", "position"), record=str(path))
    assert len(path.read_text().splitlines()) == stop - 1  # the head, and all but the unchanged and the killed run
    assert not any(point.in_use for point in model.hook_dict.values()) and torch.is_grad_enabled()
    stop = 0
    options = {"site": "write", "axes": ("layer", "head", "position")}
    again = ablation(model, next(texts(model)), interrupted, record=path, **options)
    assert torch.equal(again.values, ablation(model, next(texts(model)), metric, **options).values)


def test_a_record_is_of_certain_heads_and_layers(model, tmp_path):
    path = tmp_path / "sweep.jsonl"
    tokens = next(texts(model))
    ablation(model, tokens, metric, "write", heads=[0], layers=[0], record=path)
    assert json.loads(path.read_text().splitlines()[0])["sweep"]["heads"] == [0]
    for other, words in (({"heads": [1], "layers": [0]}, "its heads is"), ({"heads": [0]}, "its axes is")):
        with pytest.raises(ValueError, match=f"records another sweep: {words}"):
            ablation(model, tokens, metric, "write", record=path, **other)


@pytest.mark.parametrize("axes", [("layer", "position"), ("layer", "head"), ("layer", "head", "position")])
def test_every_mean_of_every_kind_of_axes(axes, model):
    """Any axes may be averaged over, all of them too: tables and numbers follow."""
    sweep = activation_patching(model, *texts(model, rows=2), metric, "write", axes=axes, attribution=True)
    for count in range(len(axes) + 2):
        for gone in itertools.combinations(sweep.axes, count):
            mean = sweep
            for name in gone:
                mean = mean.mean(name)
            table = mean.to_dataframe()
            assert list(mean.axes) == [name for name in sweep.axes if name not in gone]
            assert list(table.columns) == [*mean.axes, "metric", "effect", "recovered", "estimate"]
            assert len(table) == mean.values.numel()
            assert abs(table.metric.mean() - sweep.values.mean().item()) <= EXACT
            assert abs(table.effect.mean() - sweep.effect().mean().item()) <= EXACT


def test_a_row_that_cannot_be_recovered(model):
    corrupted, clean = texts(model, rows=2)
    corrupted[1] = clean[1]
    sweep = activation_patching(model, corrupted, clean, lambda x: round(float(metric(x)), 3), layers=[0])
    assert [sweep.target[row] == sweep.baseline[row] for row in (0, 1)] == [False, True]
    assert list(sweep.to_dataframe().columns) == ["row", "layer", "position", "metric", "effect"]
