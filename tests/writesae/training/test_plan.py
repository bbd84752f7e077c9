"""A run as a file says it: defaults, lists that are tried, flags on top, and what is wrong named before anything is loaded."""

import json

import pytest
import yaml

from writesae.config import TrainConfig
from writesae.training.plan import JobPlan, RunPlan, TextPlan, overridden, read_plan

FILE = """
model: tiny-mamba2
text: {passages: 20, length: 64}
training: {steps: 40, lr: 5e-3, log_to: [tensorboard]}
sae: {n_atoms: 32, matryoshka: [4, 8]}
jobs:
  - {hook: blocks.2.mixer.hook_write, head: [0, 1], sae: {k: [4, 8]}}
  - {hook: blocks.0.hook_resid_post, sae: {preset: flat, matryoshka: []}, name: stream}
"""


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "run.yaml").write_text(FILE)
    return RunPlan.from_dict(read_plan(tmp_path / "run.yaml"))


def test_nothing_said_is_the_default():
    plan = RunPlan.from_dict({})
    assert plan == RunPlan() and plan.training == TrainConfig(steps=3000) and plan.text == TextPlan()
    (job,) = plan.jobs_at(lambda source: (3, 5))
    assert (job.name, job.source.hook, job.source.head) == ("sae", "blocks.1.mixer.hook_write", 0)
    assert (job.sae.d_k, job.sae.d_v, job.sae.n_atoms, job.sae.k) == (3, 5, 1024, 8)


def test_listed_values_are_tried_one_by_one(plan):
    assert [job.name for job in plan.jobs] == [
        "l2.hook_write.h0-k4", "l2.hook_write.h0-k8", "l2.hook_write.h1-k4", "l2.hook_write.h1-k8", "stream",
    ]  # fmt: skip
    jobs = plan.jobs_at(lambda source: (12, 1) if "resid" in source.hook else (3, 5))
    assert [(job.source.head, job.sae.k) for job in jobs] == [(0, 4), (0, 8), (1, 4), (1, 8), (None, 8)]
    assert jobs[0].sae.matryoshka == (4, 8) and jobs[4].sae.matryoshka == ()
    assert (jobs[4].sae.encoder, jobs[4].sae.decoder, jobs[4].sae.d_k) == ("linear", "dense", 12)
    assert plan.training.lr == 0.005 and plan.training.log_to == ("tensorboard",)


def test_the_resolved_plan_says_the_same(plan):
    resolved = plan.to_dict()
    again = RunPlan.from_dict(json.loads(json.dumps(resolved)))
    assert again.to_dict() == resolved and again.jobs_at(lambda s: (9, 9)) == plan.jobs_at(lambda s: (9, 9))
    assert RunPlan.from_dict(yaml.safe_load(yaml.safe_dump(resolved))).training == plan.training
    assert "d_k" not in resolved["jobs"][0]["sae"] and resolved["jobs"][0]["sae"]["bandwidth"] > 0


def test_a_list_of_matryoshkas_is_tried_too():
    plan = RunPlan.from_dict({"jobs": [{"name": "m", "sae": {"matryoshka": [[4], [4, 8]]}}]})
    assert [job.dictionary(9, 9).matryoshka for job in plan.jobs] == [(4,), (4, 8)]
    assert len({job.name for job in plan.jobs}) == 2


def test_flags_stand_above_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text(FILE)
    values = read_plan(tmp_path / "run.yaml")
    nothing = {"model": None, "training.steps": None, "job.hook": None, "sae.k": None}
    assert overridden(values, nothing) == values
    flags = {"model": "tiny-rwkv7", "training.steps": 7, "text.length": 32, "sae.n_atoms": 16}
    plan = RunPlan.from_dict(overridden(values, flags))
    assert (plan.model, plan.training.steps, plan.text.length, plan.text.passages) == ("tiny-rwkv7", 7, 32, 20)
    assert {job.dictionary(9, 9).n_atoms for job in plan.jobs} == {16} and len(plan.jobs) == 5
    (job,) = RunPlan.from_dict(overridden(values, {"job.hook": "blocks.0.mixer.hook_write", "job.head": 3})).jobs
    assert (job.hook, job.head, job.name) == ("blocks.0.mixer.hook_write", 3, "sae")
    assert values == read_plan(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"trainig": {}}, "did you mean 'training'"),
        ({"training": {"step": 3}}, "TrainConfig has no field 'step'; did you mean 'steps'"),
        ({"text": {"passages": 0}}, "text.passages must be greater than 0"),
        ({"text": 3}, "text must be a mapping"),
        ({"sae": {"atoms": 3}}, "WriteSAEConfig has no field 'atoms'"),
        ({"sae": {"preset": "bilinaer"}}, "did you mean 'bilinear'"),
        ({"sae": {"k": 2000}}, "at most n_atoms=1024"),
        ({"sae": [1]}, "sae must be a mapping"),
        ({"jobs": {"hook": "x"}}, "jobs must be a list"),
        ({"jobs": ["x"]}, "a job must be a mapping"),
        ({"jobs": [{"hoook": "x"}]}, "JobPlan has no field 'hoook'"),
    ],
)
def test_what_is_wrong_is_named(values, word):
    with pytest.raises(ValueError, match=word):
        RunPlan.from_dict(values)


@pytest.mark.parametrize(
    ("text", "word"), [("a: [", "cannot be read"), ("- 1", "must hold a mapping"), (None, "cannot be read")]
)
def test_a_file_that_is_no_plan(tmp_path, text, word):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=word):
        read_plan(path)


def test_json_is_read_alike(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"training": {"steps": 5}}))
    assert RunPlan.from_dict(read_plan(path)).training.steps == 5
    assert JobPlan().dictionary(4, 4).k == 8
