"""Two gloo processes make the steps of one, replicated or sharded, with everything that looks at the whole batch on."""

import json
import os
import signal

import pytest
import torch

from tests.writesae.training.runs import config, distance, in_world, jobs, one_thread, run, weights
from writesae import WriteSAE
from writesae.parallel import World
from writesae.sae.samples import Factored
from writesae.training import checkpoint
from writesae.training.trainer import Trainer


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def member(rank, out):
    """What each of the two processes does: every case, one after the other, in one world."""
    world = World.current()
    assert (world.rank, world.size) == (rank, 2)
    results = run(jobs(), out / "replicated", heldout=True)
    assert set(results) == {"first", "other_head", "other_seed"}
    copy = {name: tensor.clone() for name, tensor in weights(results).items()}
    for name, tensor in copy.items():
        both = world.all_gather(tensor[None].double())
        assert torch.equal(both[0], both[1]), f"the copies of {name} have drifted apart"
    interrupted(rank, out / "interrupted")
    with pytest.raises(OSError, match=r"after step 16 could not be written \((Errno|.*No space|another process)"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "save_tensors", full_disk_of(rank))
            run(jobs(), out / "full", shard=True)
    results = run(jobs(), out / "full", shard=True, resume=True)
    assert set(results) == ({"first", "other_seed"} if rank == 0 else {"other_head"})
    with pytest.raises(ValueError, match="has nothing for some of the 2 processes"):
        Trainer(WriteSAE(jobs()[0].sae), config(), world).advance(Factored(torch.ones(1, 3), torch.ones(1, 5)))


def interrupted(rank, out):
    """A signal that reaches one process stops both after the same step, and both go on."""

    def progress(stage, done, total):
        if rank == 1 and (stage, done) == ("steps", 11):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt, match="after step 11 of 24"):
        run(jobs(), out, shard=True, progress=progress)
    run(jobs(), out, shard=True, resume=True)


def full_disk_of(rank):
    """The second process's disk is full at step 16."""
    real = checkpoint.save_tensors

    def save(path, tensors, metadata):
        if rank == 1 and int(metadata["step"]) == 16:
            raise OSError(28, "No space left on device")
        return real(path, tensors, metadata)

    return save


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes leave on disk."""
    out = tmp_path_factory.mktemp("two")
    with one_thread():
        assert in_world(2, member, out) == [0, 0]
    return out


@pytest.fixture(scope="module")
def alone():
    with one_thread():
        return run(jobs())


def saved(out):
    found = {job.name: WriteSAE.load(out / "sae" / job.name).state_dict() for job in jobs()}
    return {f"{name}/{key}": tensor for name, tensors in found.items() for key, tensor in tensors.items()}


def test_shares_of_a_batch_add_up_to_the_whole(folder, alone):
    assert alone["first"].log[-1]["resampled"] > 0
    assert distance(saved(folder / "replicated"), weights(alone)) < 1e-5
    lines = [json.loads(line) for line in (folder / "replicated" / "log.jsonl").read_text().splitlines()]
    for name, result in alone.items():
        found = [line for line in lines if line["job"] == name]
        assert [line["step"] for line in found] == [line["step"] for line in result.log]
        for line, expected in zip(found, result.log, strict=True):
            for number in ("loss", "fvu", "l0", "aux", "dead", "resampled", "grad_norm"):
                assert line[number] == pytest.approx(expected[number], rel=1e-4, abs=1e-6), number


@pytest.mark.parametrize("case", ["interrupted", "full"])
def test_sharded_jobs_are_those_of_one_process(folder, alone, case):
    assert distance(saved(folder / case), weights(alone)) == 0.0
    lines = [json.loads(line) for line in (folder / case / "log.jsonl").read_text().splitlines()]
    assert sorted((line["step"], line["job"]) for line in lines) == sorted(
        (line["step"], name) for name, result in alone.items() for line in result.log
    )
    assert set(json.loads((folder / case / "metrics.json").read_text())) == set(alone)


def test_a_run_of_two_processes_goes_on_in_one(folder, alone):
    """How many processes there are is no part of a run."""
    assert distance(weights(run(jobs(), folder / "replicated", resume=True)), weights(alone)) < 1e-5
