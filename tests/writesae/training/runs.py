"""Small runs on a tiny random model, and child processes that cost no import: what the tests of the engine share."""

import contextlib
import multiprocessing
import os
import socket

import torch

from tests.hooked_recurrent.models import tiny_model, tokens_of
from writesae import TrainConfig, WriteSAEConfig, train_many
from writesae.training.jobs import Job, Source

HOOKS = "blocks.{}.mixer.hook_write"
FORK = multiprocessing.get_context("fork")


def config(**fields):
    """Everything that has a state is on: warm-up, auxiliary loss, resampling."""
    few = {"steps": 24, "batch_size": 32, "warmup_steps": 4, "log_every": 10, "save_every": 8}
    return TrainConfig(**{**few, "dead_after": 3, "resample_every": 6, "calibration_writes": 128, **fields})


def jobs(**fields):
    """Two heads, two seeds, two sparsifiers, one of which looks at the whole batch."""
    size = {"d_k": 3, "d_v": 5, "n_atoms": 48, **fields}
    return [
        Job("first", Source(HOOKS.format(0), 1), WriteSAEConfig(k=2, **size)),
        Job("other_head", Source(HOOKS.format(1), 2), WriteSAEConfig(k=3, seed=1, activation="batch_topk", **size)),
        Job("other_seed", Source(HOOKS.format(0), 1), WriteSAEConfig(k=2, seed=5, **size)),
    ]


def run(chosen, out=None, heldout=False, length=20, **options):
    """`train_many` on twelve passages."""
    model = tiny_model()
    given = {"config": config(), **options}
    unseen = tokens_of(model, batch=2, length=9, seed=1) if heldout else None
    return train_many(model, chosen, tokens=tokens_of(model, batch=12, length=length), heldout=unseen, out=out, **given)


def weights(results):
    """All tensors of all dictionaries, counters included."""
    return {f"{job}/{name}": t for job, result in results.items() for name, t in result.sae.state_dict().items()}


def distance(one, other):
    """Largest difference between two sets of weights; 0.0 means bit for bit."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@contextlib.contextmanager
def one_thread():
    """One thread, so that a child process sums in the same order, and can be forked."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_child(work, *arguments):
    """Run `work` in a forked process; returns its exit code, -9 when it was killed."""
    process = FORK.Process(target=work, args=arguments)
    process.start()
    process.join(120)
    assert not process.is_alive(), "the child hangs"
    return process.exitcode


def _member(rank, size, port, work, arguments):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    work(rank, *arguments)
    torch.distributed.destroy_process_group()


def in_world(size, work, *arguments):
    """Run `work(rank, ...)` in as many processes as `torchrun` would start; returns their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    members = [FORK.Process(target=_member, args=(rank, size, port, work, arguments)) for rank in range(size)]
    for member in members:
        member.start()
    for member in members:
        member.join(120)
    hanging = [member for member in members if member.is_alive()]
    for member in hanging:
        member.kill()
    assert not hanging, "a process hangs"
    return [member.exitcode for member in members]
