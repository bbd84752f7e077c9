"""Many dictionaries at once equal each alone; a run that is killed, stopped or damaged goes on bit for bit."""

import json
import os
import signal
import sys

import pytest
import torch

from tests.hooked_recurrent.models import tiny_model, tokens_of
from tests.writesae.training.runs import HOOKS, config, distance, in_child, jobs, one_thread, run, weights
from writesae import ActivationStore, TrainConfig, WriteSAE, WriteSAEConfig
from writesae.training import checkpoint
from writesae.training.jobs import Job, Source
from writesae.training.run import Run


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def uninterrupted():
    with one_thread():
        results = run(jobs())
    assert all(result.log[-1]["resampled"] > 0 for result in results.values())  # so the generator has drawn
    return weights(results)


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_each_job_gets_what_it_gets_alone(uninterrupted):
    for job in jobs():
        assert distance(weights(run([job])), {n: t for n, t in uninterrupted.items() if n.startswith(job.name)}) == 0.0
    assert distance(weights(run(jobs()[::-1])), uninterrupted) == 0.0
    assert not torch.equal(uninterrupted["first/decoder.key_atoms"], uninterrupted["other_seed/decoder.key_atoms"])


def test_the_folder_of_a_run(tmp_path, uninterrupted):
    out = tmp_path / "out"
    told = []
    results = run(jobs(), out, heldout=True, on_line=lambda name, line: told.append((name, line["step"])))
    assert distance(weights(results), uninterrupted) == 0.0
    names = [job.name for job in jobs()]
    expected = [(name, step) for step in (0, 10, 20, 23) for name in names]
    assert [(line["job"], line["step"]) for line in lines(out)] == told == expected
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000016", "step-00000024"]
    described = json.loads((out / "config.json").read_text())
    assert (
        set(described) == {"format_version", "jobs", "training", "model", "tokens"} and list(described["jobs"]) == names
    )
    metrics = json.loads((out / "metrics.json").read_text())
    for name, result in results.items():
        loaded = WriteSAE.load(out / "sae" / name)
        assert torch.equal(loaded.key_atoms, result.sae.key_atoms)
        assert loaded.provenance["metrics"] == metrics[name] == result.metrics
        assert (loaded.provenance["hook"], loaded.provenance["head"]) == (
            HOOKS.format(int(name == "other_head")), 1 + (name == "other_head"),
        )  # fmt: skip
        assert metrics[name]["heldout"]["n_writes"] == 16
        assert {"loss_native", "loss_spliced", "loss_zeroed", "loss_recovered"} < set(metrics[name]["heldout"])


def killed_at(out, step, where):
    """A run in a child that kills itself the hard way: after a step, or in the middle of writing a checkpoint."""

    def child():
        def kill(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        def progress(stage, done, total):
            if (stage, done) == ("steps", step):
                if where == "step":
                    kill()
                setattr(checkpoint, where, kill)

        run(jobs(), out, progress=progress)

    assert in_child(child) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("step", "where", "left"),
    [
        (3, "step", []),
        (13, "step", [8]),
        (21, "step", [8, 16]),
        (14, "_write_job", [8]),
        (15, "_put_in_place", [8]),
        (23, "_remove", [8, 16, 24]),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, uninterrupted, step, where, left):
    killed_at(tmp_path, step, where)
    found = checkpoint.finished(tmp_path / "checkpoints")
    assert [int(path.name.removeprefix("step-")) for path in found] == left
    seen = []
    results = run(jobs(), tmp_path, resume=True, progress=lambda stage, done, total: seen.append(stage))
    assert distance(weights(results), uninterrupted) == 0.0
    assert seen.count("steps") == 24 - (left[-1] if left else 0)
    steps = [line["step"] for line in lines(tmp_path) if line["job"] == "first"]
    assert steps == [0, 10, 20, 23] == [line["step"] for line in results["first"].log]
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]


def test_going_on_from_an_older_checkpoint_when_the_newest_is_damaged(tmp_path, uninterrupted):
    killed_at(tmp_path, 21, "step")
    path = tmp_path / "checkpoints" / "step-00000016" / "other_head.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.warns(UserWarning, match="truncated or changed"):
        results = run(jobs(), tmp_path, resume=True)
    assert distance(weights(results), uninterrupted) == 0.0


def kinds():
    """Net writes, states by running sums, vectors of a head and of the residual stream; another sparsifier for each."""
    size = {"n_atoms": 32, "k": 3}
    hook = "blocks.0.mixer.{}".format
    return [
        Job("net", Source(hook("hook_write"), 1, "net"), WriteSAEConfig(3, 5, activation="gated", **size)),
        Job("state", Source(hook("hook_state"), 0), WriteSAEConfig(3, 5, activation="jumprelu", center=True, **size)),
        Job("read", Source(hook("hook_read"), 3), WriteSAEConfig.preset("flat", 5, 1, **size)),
        Job(
            "stream", Source("blocks.1.hook_resid_post"), WriteSAEConfig.preset("flat", 12, 1, matryoshka=(8,), **size)
        ),
    ]


@pytest.mark.parametrize("fields", [{}, {"cache_bytes": 0, "buffer_writes": 64}])
def test_every_kind_of_source_goes_on_bit_for_bit(tmp_path, fields):
    chosen = config(**fields, steps=14, batch_size=64, splice_passages=1)
    whole = run(kinds(), config=chosen, heldout=True)
    for name, result in whole.items():
        assert {"loss_recovered", "cosine"} < set(result.metrics["heldout"]), name
        assert 0 < result.metrics["heldout"]["l0"] and result.log[-1]["fvu"] < 2, name

    def progress(stage, done, total):
        if (stage, done) == ("steps", 11):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(kinds(), tmp_path, config=chosen, progress=progress)
    assert distance(weights(run(kinds(), tmp_path, resume=True, config=chosen)), weights(whole)) == 0.0
    origin = {name: WriteSAE.load(tmp_path / "sae" / name).provenance for name in whole}
    assert [(o["kind"], o.get("form"), o["layer"]) for o in origin.values()] == [
        ("write", "net", 0), ("state", None, 0), ("vector", None, 0), ("vector", None, 1),
    ]  # fmt: skip


def test_each_kind_gets_what_it_gets_alone():
    """States come by whole passages; what is trained beside them does not notice, whether all of it fits or not."""
    chosen = config(steps=6, batch_size=64, save_every=0)
    together = weights(run(kinds(), config=chosen))
    small = config(steps=6, batch_size=64, save_every=0, cache_bytes=12000)
    for job in kinds():
        own = {name: tensor for name, tensor in together.items() if name.startswith(f"{job.name}/")}
        assert distance(weights(run([job], config=chosen)), own) == 0.0
        assert distance(weights(run([job], config=small)), own) == 0.0


def test_a_store_serves_as_the_model_does(tmp_path, uninterrupted):
    model = tiny_model()
    sources = list(dict.fromkeys(job.source for job in jobs()))
    tokens = tokens_of(model, batch=12, length=20)
    store = ActivationStore.write(tmp_path / "store", model, tokens, sources, dtype="float32")
    assert distance(weights(run(jobs(), store=store)), uninterrupted) == 0.0
    assert Run(model, jobs(), tokens, TrainConfig(steps=1), store=store).stream.device == model.device
    with pytest.raises(ValueError, match="the store cannot serve this run: other tokens"):
        run(jobs(), store=store, length=21)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_first(tmp_path, uninterrupted, number):
    def progress(stage, done, total):
        if (stage, done) == ("steps", 11):
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 11 of 24, saved in .*step-00000011"):
        run(jobs(), tmp_path, progress=progress)
    assert signal.getsignal(number) is before
    assert [line["step"] for line in lines(tmp_path) if line["job"] == "first"] == [0, 10]
    results = run(jobs(), tmp_path, resume=True)
    assert distance(weights(results), uninterrupted) == 0.0
    again = run(jobs(), tmp_path, resume=True)  # a finished run is only measured and saved again
    assert distance(weights(again), uninterrupted) == 0.0


def test_a_full_disk_stops_the_run_and_it_goes_on_later(tmp_path, uninterrupted, monkeypatch):
    real = checkpoint.save_tensors

    def full(path, tensors, metadata):
        if int(metadata["step"]) > 8:
            raise OSError(28, "No space left on device")
        return real(path, tensors, metadata)

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    with pytest.raises(OSError, match=r"after step 16 .*No space left.*newest finished one is .*step-00000008"):
        run(jobs(), tmp_path)
    monkeypatch.undo()
    assert distance(weights(run(jobs(), tmp_path, resume=True)), uninterrupted) == 0.0


def test_a_folder_is_not_taken_from_another_run(tmp_path):
    short = {"steps": 2, "save_every": 1, "resample_every": 0}
    run(jobs()[:1], tmp_path, config=config(**short))
    with pytest.raises(ValueError, match="holds a training run already"):
        run(jobs()[:1], tmp_path, config=config(**short))
    for changed, word in (
        ({"config": config(**{**short, "lr": 0.1})}, r"training.lr was 0.005, is 0.1"),
        ({"config": config(**{**short, "steps": 3})}, r"training.steps was 2, is 3"),
        ({"config": config(**short), "length": 21}, r"tokens.length was 20, is 21; tokens.sha256"),
    ):
        with pytest.raises(ValueError, match=word):
            run(jobs()[:1], tmp_path, resume=True, **changed)
    with pytest.raises(ValueError, match=r"jobs.first.sae.k was 2, is 4"):
        run([Job("first", jobs()[0].source, WriteSAEConfig(3, 5, n_atoms=48, k=4))], tmp_path, resume=True,
            config=config(**short))  # fmt: skip
    with pytest.raises(ValueError, match=r"jobs.other_head.source.hook was 'absent'"):
        run(jobs()[:2], tmp_path, resume=True, config=config(**short))
    run(jobs()[:1], tmp_path, resume=True, config=config(**{**short, "save_every": 7, "keep": 5}))


def test_a_folder_that_is_no_runs_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"config": {}}')
    with pytest.raises(ValueError, match="is not that of a training run"):
        run(jobs()[:1], tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        run(jobs()[:1], tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "checkpoints" / "step-00000008").mkdir(parents=True)
    with pytest.raises(ValueError, match="checkpoints but no config.json"):
        run(jobs()[:1], tmp_path)


def test_a_log_that_cannot_be_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        run(jobs(), tmp_path / "out", config=config(log_to=("wandb",)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "word"),
    [
        ([], "no job"),
        (["a", "a"], "two jobs are called 'a'"),
        (["../a"], "must be letters"),
        ([".a"], "must be letters"),
    ],
)
def test_jobs_that_cannot_be_told_apart(names, word):
    one = jobs()[0]
    with pytest.raises(ValueError, match=word):
        run([Job(name, one.source, one.sae) for name in names])


def test_a_failing_job_is_named(monkeypatch):
    wide = Job("wide", Source(HOOKS.format(0), 0), WriteSAEConfig(4, 5, n_atoms=8, k=1))
    with pytest.raises(ValueError, match=r"job 'wide' has .*\(4, 5\).* gives \(3, 5\)"):
        run([jobs()[0], wide])
    with pytest.raises(ValueError, match=r"job 'first': the loss is (nan|inf) at step"):
        run(jobs(), config=config(lr=1e25, lr_min=1e25, grad_clip=0.0, warmup_steps=0))
