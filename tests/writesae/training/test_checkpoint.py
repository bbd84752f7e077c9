"""Checkpoints under fault injection: full disks, kills, truncation; what was finished is never lost."""

import os
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch

from writesae.parallel import World
from writesae.training import checkpoint


def state(step, size=100):
    generator = torch.Generator().manual_seed(step)
    tensors = {"sae/weight": torch.randn(size, generator=generator), "generator": generator.get_state()}
    return {"tensors": tensors, "record": {"step": step, "log": [{"step": 0, "loss": 0.1 + step}]}}


def write(folder, step, names=("a", "b"), keep=2, **sizes):
    return checkpoint.write(folder, step, {name: state(step, **sizes) for name in names}, keep=keep, world=World())


def same(found, expected):
    return found["record"] == expected["record"] and all(
        torch.equal(found["tensors"][name], tensor) for name, tensor in expected["tensors"].items()
    )


@contextmanager
def disk_full_after(n_bytes):
    """No file may grow beyond this: the system itself refuses, in Python and in the library that writes tensors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def steps_in(folder):
    return [int(path.name.removeprefix("step-")) for path in checkpoint.finished(folder)]


def test_what_is_written_is_read_and_the_oldest_go(tmp_path):
    for step in (5, 10, 20, 100_000_000):
        write(tmp_path, step)
    assert steps_in(tmp_path) == [20, 100_000_000] and len(list(tmp_path.iterdir())) == 2
    path = checkpoint.latest(tmp_path, ["a", "b"])
    assert path.name == "step-100000000"
    assert all(same(found, state(100_000_000)) for found in checkpoint.read(path, ["a", "b"]).values())
    assert checkpoint.latest(tmp_path / "nowhere", ["a"]) is None


@pytest.mark.parametrize("n_bytes", [0, 300, 2000])
def test_a_full_disk_is_a_clear_error_and_loses_nothing(tmp_path, n_bytes):
    write(tmp_path, 10, keep=1)
    with (
        disk_full_after(n_bytes),
        pytest.raises(OSError, match=r"after step 20 could not.*newest finished one is .*10"),
    ):
        write(tmp_path, 20, keep=1, size=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]
    assert same(checkpoint.read(tmp_path / "step-00000010", ["a"])["a"], state(10))
    write(tmp_path, 20, keep=1, size=1000)
    assert steps_in(tmp_path) == [20]


def test_a_full_disk_in_the_middle_of_a_checkpoint(tmp_path, monkeypatch):
    """The first job is written, the second finds the disk full."""
    write(tmp_path, 10)
    real, calls = checkpoint.save_tensors, []

    def second_fails(path, tensors, metadata):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(path, tensors, metadata)

    monkeypatch.setattr(checkpoint, "save_tensors", second_fails)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 20)
    assert steps_in(tmp_path) == [10] and len(list(tmp_path.iterdir())) == 1
    assert len(calls) == 2


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("harm", "word"),
    [
        (lambda path: truncate(path / "b.safetensors"), "truncated or changed"),
        (lambda path: flip(path / "b.safetensors"), "truncated or changed"),
        (lambda path: truncate(path / "b.json"), "cannot be read"),
        (lambda path: (path / "b.json").write_text("[]"), "cannot be read"),
        (lambda path: (path / "b.json").write_text("{}"), "cannot be read"),
        (lambda path: (path / "b.safetensors").unlink(), r"lacks b\.safetensors"),
        (lambda path: (path / "b.json").unlink(), r"lacks b\.json"),
        (lambda path: (path / "b.json").write_text('{"format_version": 9, "sha256": ""}'), "format version 9"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, harm, word):
    write(tmp_path, 10)
    write(tmp_path, 20)
    harm(tmp_path / "step-00000020")
    with pytest.warns(UserWarning, match=word):
        assert checkpoint.latest(tmp_path, ["a", "b"]).name == "step-00000010"
    harm(tmp_path / "step-00000010")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=f"no checkpoint in .* can be used.*{word}"):
        checkpoint.latest(tmp_path, ["a", "b"])


def test_a_renamed_checkpoint_is_noticed(tmp_path):
    write(tmp_path, 10)
    os.rename(tmp_path / "step-00000010", tmp_path / "step-00000011")
    with pytest.raises(ValueError, match="holds step 10: it has been renamed"):
        checkpoint.read(tmp_path / "step-00000011", ["a"])


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    write(tmp_path, 10)
    write(tmp_path, 20)
    truncate(tmp_path / "step-00000020" / "a.safetensors")
    write(tmp_path, 20)
    assert steps_in(tmp_path) == [10, 20] and len(list(tmp_path.iterdir())) == 2
    assert same(checkpoint.read(tmp_path / "step-00000020", ["a"])["a"], state(20))


def test_a_later_damaged_one_does_not_push_out_what_is_whole(tmp_path):
    for step in (10, 20, 30):
        write(tmp_path, step, keep=3)
    for step in (20, 30):
        truncate(tmp_path / f"step-000000{step}" / "a.json")
    write(tmp_path, 15, keep=2)
    assert steps_in(tmp_path) == [10, 15, 20, 30]


def test_what_a_killed_process_left_is_swept_away(tmp_path):
    write(tmp_path, 10)
    shutil.copytree(tmp_path / "step-00000010", tmp_path / ".step-00000020.part")
    shutil.copytree(tmp_path / "step-00000010", tmp_path / ".step-00000005.old")
    (tmp_path / "notes.txt").write_text("mine")
    assert steps_in(tmp_path) == [10]
    write(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step-00000010", "step-00000020"]


def test_nothing_finished_goes_before_the_new_one_is_on_disk(tmp_path, monkeypatch):
    """When the first is removed, the second can be read already."""
    write(tmp_path, 10, keep=1)
    seen = []
    real = checkpoint._remove
    monkeypatch.setattr(checkpoint, "_remove", lambda path: (seen.append((path.name, steps_in(tmp_path))), real(path)))
    write(tmp_path, 20, keep=1)
    assert seen == [("step-00000010", [10, 20])] and steps_in(tmp_path) == [20]
