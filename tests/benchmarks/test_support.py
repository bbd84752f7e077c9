"""What the benchmarks measure with: medians in turn, allocator settings, memory, equality, tables."""

import statistics
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.support import machine, report


class Clock:
    """A clock that a test moves."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(machine, "time", clock)
    return clock


def side(clock, name, seconds, calls):
    """A side that takes these many seconds, call by call."""
    left = iter(seconds)

    def run():
        calls.append(name)
        clock.now += next(left)

    return run


def test_sides_run_in_turn_and_warm_ups_do_not_count(clock):
    calls = []
    sides = {"a": side(clock, "a", [100, 1, 5, 3], calls), "b": side(clock, "b", [100, 2, 2, 9], calls)}
    assert machine.median_seconds(sides, repeats=3) == {"a": 3, "b": 2}
    assert calls == ["a", "b"] * 4


def test_long_runs_stop_early_but_not_before_three_rounds(clock):
    sides = {"a": side(clock, "a", [machine.MOST_SECONDS] * 9, [])}
    assert len(machine.seconds_in_turn(sides, repeats=8)["a"]) == machine.FEWEST_ROUNDS
    sides = {"a": side(clock, "a", [1.0] * 9, [])}
    assert machine.seconds_in_turn(sides, repeats=8)["a"] == [1.0] * 8


def test_the_median_is_that_of_the_statistics_module(clock):
    seconds = [4.0, 1.0, 3.0, 2.0]
    found = machine.median_seconds({"a": side(clock, "a", seconds, [])}, repeats=4, warmups=0)
    assert found == {"a": statistics.median(seconds)}


def test_allocator_settings_are_told_apart():
    assert machine.allocator({"PATH": "x"}) == "default"
    tuned = machine.with_allocator("tuned", {"PATH": "x"})
    assert machine.allocator(tuned) == "tuned" and tuned["PATH"] == "x"
    assert machine.with_allocator("default", tuned) == {"PATH": "x"}
    assert machine.allocator({"MALLOC_TOP_PAD_": "1"}) == "other"
    assert machine.allocator(tuned | {"MALLOC_ARENA_MAX": "1"}) == "other"
    with pytest.raises(KeyError):
        machine.with_allocator("fast")


def test_the_machine_says_what_takes_part():
    told = machine.machine()
    assert told["torch"] == torch.__version__ and told["threads"] == torch.get_num_threads()
    assert set(machine.PACKAGES) <= set(told) and "not installed" != told["transformers"]
    assert told["allocator"] in ("default", "tuned", "other")


def test_equality_is_relative_to_the_largest_number():
    expected = torch.tensor([1.0, -200.0])
    assert machine.relative_error(expected + 1.0, expected) == pytest.approx(1 / 200)
    assert machine.must_equal("same", expected, expected) == 0
    with pytest.raises(RuntimeError, match="both sides: the two sides do not compute the same, off by 5.0e-03"):
        machine.must_equal("both sides", expected + 1.0, expected)
    with pytest.raises(RuntimeError, match="do not compute the same"):
        machine.must_equal("no number", expected * torch.nan, expected)
    with pytest.raises(RuntimeError, match="shapes differ"):
        machine.must_equal("shapes", expected[:1], expected)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks can be reset on Linux alone")
def test_the_peak_counts_what_one_run_holds_at_once():
    def run(megabytes):
        return lambda: torch.ones(megabytes * 2**18).sum()

    run(200)()  # an earlier peak must not hide it
    increase = machine.peak_increase(run(1), run(64))["increase"]
    assert 60 * 2**20 < increase < 80 * 2**20


def test_a_script_answers_with_its_last_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('words')\nprint('{\"a\": [1, \"' + sys.argv[1] + '\"]}')\n")
    assert machine.answer_of(script, ["x"]) == {"a": [1, "x"]}
    script.write_text("raise SystemExit('it went wrong')\n")
    with pytest.raises(RuntimeError, match="script.py x failed: it went wrong"):
        machine.answer_of(script, ["x"])
    with pytest.raises(RuntimeError, match="failed with exit status 1"):
        machine.in_process(script, [])


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("theirs / ours", 12.34, "12.3x"),
        ("theirs / ours", 1.234, "1.23x"),
        ("ratio", 0.0123, "0.012x"),
        ("peak, MB", 2_500_000, "2.5"),
        ("error", 1.23e-6, "1.2e-06"),
        ("ours, tokens/s", 12345.6, "12,346"),
        ("ours, ms", 0.01234, "12.3"),
        ("ours", 1.23456, "1.2346"),
        ("ours", 0.000123, "1.23e-04"),
        ("T", 4096, "4,096"),
        ("rule", "RWKV-7", "RWKV-7"),
        ("ours", None, "-"),
    ],
)
def test_a_column_says_how_its_values_are_written(name, value, text):
    assert report.cell(name, value) == text


def test_a_table_has_the_columns_of_all_rows():
    shown = report.table("title", [{"a": 1, "b": 2.0}, {"a": 3, "c": None}])
    assert [column.header for column in shown.columns] == ["a", "b", "c"] and shown.row_count == 2


def test_another_allocator_means_another_process(tmp_path, monkeypatch):
    """The script is run again under each setting, with the same options but those two, and what it wrote is put together."""
    script, path = tmp_path / "script.py", tmp_path / "found.json"
    script.write_text(
        "import json, os, sys\n"
        "name = 'tuned' if 'MALLOC_TOP_PAD_' in os.environ else 'default'\n"
        "path = sys.argv[sys.argv.index('--json') + 1]\n"
        "json.dump({name: sys.argv[1:sys.argv.index('--json')]}, open(path, 'w'))\n"
    )
    parser = report.parser_of("A script.", repeats=3)
    for given in (
        ["--quick", "--allocator", "both", "--json", str(path)],
        ["--quick", "--allocator=both", f"--json={path}"],
    ):
        monkeypatch.setattr(sys, "argv", ["script.py", *given])
        assert report.other_allocator(parser.parse_args(given), script)
        assert report.json.loads(path.read_text()) == {"default": ["--quick"], "tuned": ["--quick"]}
    for given in ([], ["--allocator", report.allocator()] if report.allocator() != "other" else []):
        assert not report.other_allocator(parser.parse_args(given), script)
