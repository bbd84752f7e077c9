"""Logs: JSON lines begin again from a checkpoint, TensorBoard's curves, trackers by their calls, what is not installed."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from writesae.training.logging import open_logs

LINES = {"a": [{"step": 0, "loss": 1.0}, {"step": 10, "loss": 0.5}], "b": [{"step": 0, "loss": 2.0}]}


def opened(log_to, out, before, first_step=0):
    return open_logs(log_to, out, before, first_step=first_step, project="p", config={"lr": 1})


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_begin_with_those_of_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"job": "a", "step": 0, "loss": 1.0}\n{"job": "a", "step": 20, "loss": 9.0}\n{"job": "a", "st')
    (log,) = opened((), tmp_path, LINES)
    log.write("b", {"step": 10, "loss": 1.5})
    assert [(line["job"], line["step"], line["loss"]) for line in read(path)] == [
        ("a", 0, 1.0), ("b", 0, 2.0), ("a", 10, 0.5), ("b", 10, 1.5),
    ]  # fmt: skip
    log.close()


def test_no_folder_no_files():
    assert opened((), None, LINES) == []


def test_tensorboard_has_every_number(tmp_path):
    _, board = opened(("tensorboard",), tmp_path, {"a": [], "b": []})
    for step in (0, 10):
        board.write("a", {"step": step, "loss": 1.0 / (step + 1), "fvu": 0.25})
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "a")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 1.0), (10, pytest.approx(1 / 11))]
    assert set(events.Tags()["scalars"]) == {"loss", "fvu"} and not (tmp_path / "tensorboard" / "b").exists()


def test_tensorboard_needs_a_folder():
    with pytest.raises(ValueError, match="give the run a folder"):
        opened(("tensorboard",), None, {"a": []})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_the_numbers_by_step(monkeypatch, name):
    calls = []
    run = SimpleNamespace(log=lambda numbers, step: calls.append((step, numbers)))
    module = ModuleType(name)
    module.init = lambda **given: calls.append(given) or run
    module.finish = lambda: calls.append("finished")
    monkeypatch.setitem(sys.modules, name, module)
    for before, key in (({"a": []}, "loss"), ({"a": [], "b": []}, "a/loss")):
        calls.clear()
        (log,) = opened((name,), None, before)
        log.write("a", {"step": 7, "loss": 0.5})
        log.close()
        assert calls == [{"project": "p", "name": None, "config": {"lr": 1}}, (7, {key: 0.5}), "finished"]


@pytest.mark.parametrize(
    ("log_to", "module"), [("wandb", "wandb"), ("trackio", "trackio"), ("tensorboard", "torch.utils.tensorboard")]
)
def test_what_is_not_installed_is_named(tmp_path, monkeypatch, log_to, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"pip install {log_to}"):
        opened((log_to,), tmp_path, {"a": []})
