"""A training run as a file says it (YAML, JSON, TOML), resolved to the last default and checked before anything is loaded.

    model: tiny-gated-deltanet
    text: {passages: 1200, length: 256}
    training: {steps: 3000, lr: 5e-3}
    sae: {n_atoms: 1024, k: 8}                      # fields of every job's dictionary, and "preset"
    jobs:
      - {hook: blocks.2.mixer.hook_write, head: [0, 1], sae: {k: [8, 16]}}      # a list is tried value by value: four jobs

`training` has the fields of `TrainConfig`, `sae` those of `WriteSAEConfig` without d_k and d_v, which the model gives.
"""

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from hooked_recurrent.config import StrictConfig, require_positive
from writesae.config import TrainConfig, WriteSAEConfig, require_at_least_zero
from writesae.training.jobs import Job, Source

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # YAML reads 5e-3, without a point, as text
_ANY_WIDTH = 1 << 20
DICTIONARY = {"n_atoms": 1024, "k": 8}
"""What a dictionary is where the file says nothing."""
TRAINING: dict[str, Any] = {"steps": 3000}
"""How it is trained where the file says nothing; the rest is as in `TrainConfig`."""


@dataclass(frozen=True)
class TextPlan(StrictConfig):
    """Which text is read, split by file: files of a folder, or of the Python standard library."""

    folder: str | None = None
    """Folder of text files; the running interpreter's standard library where it is left out."""
    pattern: str = "*.txt"
    """Which files in or below that folder."""
    passages: int = 1200
    """Passages of training files."""
    length: int = 256
    """Tokens per passage."""
    heldout_passages: int = 100
    """Passages of held-out files, on which the dictionaries are measured; 0 measures on training text alone."""
    seed: int = 0
    """Seed of the choice of the passages."""

    def __post_init__(self) -> None:
        require_positive("text", passages=self.passages, length=self.length)
        require_at_least_zero("text", heldout_passages=self.heldout_passages)


@dataclass(frozen=True)
class JobPlan(StrictConfig):
    """One dictionary, without the widths that the model will give."""

    hook: str = "blocks.1.mixer.hook_write"
    """The hook whose activations are learned."""
    head: int | None = 0
    """The head, where the hook has heads."""
    form: str = "additive"
    """What a write is: "additive", or "net" with the erase."""
    name: str = "sae"
    """Names the job in logs and files."""
    sae: dict[str, Any] = field(default_factory=dict)
    """"preset" and fields of `WriteSAEConfig`."""

    def __post_init__(self) -> None:
        self.dictionary(_ANY_WIDTH, _ANY_WIDTH)

    def dictionary(self, d_k: int, d_v: int) -> WriteSAEConfig:
        """The configuration of the dictionary at these widths. Raises `ValueError` for unknown or bad fields."""
        fields = {**DICTIONARY, **self.sae}
        preset = fields.pop("preset", None)
        if preset is not None:
            chosen = WriteSAEConfig.preset(preset, d_k, d_v)
            fields = {"encoder": chosen.encoder, "decoder": chosen.decoder, "activation": chosen.activation, **fields}
        return WriteSAEConfig.from_dict({**fields, "d_k": d_k, "d_v": d_v})


@dataclass(frozen=True)
class RunPlan(StrictConfig):
    """Everything a run is made of but the model itself."""

    model: str = "tiny-gated-deltanet"
    """A bundled model, a folder or a hub name."""
    text: TextPlan = field(default_factory=TextPlan)
    """What it reads."""
    training: TrainConfig = field(default_factory=lambda: TrainConfig(**TRAINING))
    """How the dictionaries are trained."""
    jobs: tuple[JobPlan, ...] = (JobPlan(),)
    """The dictionaries."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunPlan":
        """Resolve what a file says. Raises `ValueError` naming the part and the field that is wrong."""
        values = dict(values)
        everyone = values.pop("sae", None) or {}
        listed = values.pop("jobs", None) or [{}]
        for name, value, kind in (("sae", everyone, Mapping), ("jobs", listed, list)):
            if not isinstance(value, kind):
                raise ValueError(
                    f"{name} must be a {'mapping' if kind is Mapping else 'list of mappings'}, got {value!r}"
                )
        values["jobs"] = [job for entry in listed for job in _expanded(entry, everyone, alone=len(listed) == 1)]
        parts: dict[str, type[StrictConfig]] = {"text": TextPlan, "training": TrainConfig}
        for name, part in parts.items():
            given = values.get(name) or {}
            if not isinstance(given, Mapping):
                raise ValueError(f"{name} must be a mapping, got {given!r}")
            values[name] = part.from_dict({**TRAINING, **given} if part is TrainConfig else given)
        plan: RunPlan = super().from_dict(values)
        return plan

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, every default written out; `from_dict` makes the same plan of it."""
        jobs = []
        for job in self.jobs:
            dictionary = job.dictionary(_ANY_WIDTH, _ANY_WIDTH).to_dict()
            dictionary = {name: value for name, value in dictionary.items() if name not in ("d_k", "d_v")}
            dictionary["matryoshka"] = list(dictionary["matryoshka"])
            jobs.append({**asdict(job), "sae": dictionary})
        training = {**self.training.to_dict(), "log_to": list(self.training.log_to)}
        return {"model": self.model, "text": self.text.to_dict(), "training": training, "jobs": jobs}

    def jobs_at(self, widths: Callable[[Source], tuple[int, int]]) -> list[Job]:
        """The jobs, with the widths (d_k, d_v) of their sources."""
        found = []
        for job in self.jobs:
            source = Source(job.hook, job.head, job.form)
            found.append(Job(job.name, source, job.dictionary(*widths(source))))
        return found


def read_plan(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML, JSON or TOML file. Raises `ValueError` when the file is missing or holds no mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = tomllib.loads(text) if Path(path).suffix == ".toml" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping such as 'training: ...', got {type(values).__name__}")
    return _with_numbers(values)


def overridden(values: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the flags in their places: a flag is a dotted name, "training.steps", and None leaves things as they are.

    "job.<field>" makes one job of that field instead of those of the file; "sae.<field>" counts for every job.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    merged = dict(values)
    of_jobs = {name.removeprefix("job."): value for name, value in given.items() if name.startswith("job.")}
    of_dictionaries = {name.removeprefix("sae."): value for name, value in given.items() if name.startswith("sae.")}
    if of_jobs:
        merged["jobs"] = [of_jobs]
    if of_dictionaries:
        jobs = merged.get("jobs") or [{}]
        merged["jobs"] = [{**job, "sae": {**(job.get("sae") or {}), **of_dictionaries}} for job in jobs]
    for name, value in given.items():
        part, _, key = name.partition(".")
        if not key:
            merged[part] = value
        elif part not in ("job", "sae"):
            merged[part] = {**(merged.get(part) or {}), key: value}
    return merged


def _with_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _with_numbers(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_numbers(inner) for inner in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _expanded(entry: Any, everyone: Mapping[str, Any], alone: bool) -> Iterator[JobPlan]:
    """One job for every combination of the values that are listed in an entry."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"a job must be a mapping such as {{hook: ..., head: 0}}, got {entry!r}")
    given = {**entry, "sae": {**everyone, **(entry.get("sae") or {})}}
    flat = {name: value for name, value in given.items() if name != "sae"}
    flat |= {f"sae.{name}": value for name, value in given["sae"].items()}
    tried = {name: value for name, value in flat.items() if _is_tried(name, value)}
    for values in product(*tried.values()):
        chosen = {**flat, **dict(zip(tried, values, strict=True))}
        dictionary = {name[4:]: value for name, value in chosen.items() if name.startswith("sae.")}
        job = {name: value for name, value in chosen.items() if not name.startswith("sae.")}
        job.setdefault("head", 0 if ".mixer." in job.get("hook", JobPlan.hook) else None)
        job.setdefault("name", "sae" if alone and not tried else _name_of(job))
        marks = [f"{name.removeprefix('sae.')}{chosen[name]}" for name in tried if name not in ("hook", "head")]
        if "name" in entry:
            marks = [f"{name.removeprefix('sae.')}{chosen[name]}" for name in tried]
        yield JobPlan.from_dict({**job, "name": "-".join([job["name"], *marks]), "sae": dictionary})


def _name_of(job: Mapping[str, Any]) -> str:
    """blocks.2.mixer.hook_write of head 1 is called l2.hook_write.h1."""
    hook = re.sub(r"^blocks\.(\d+)\.(mixer\.)?", r"l\1.", job.get("hook", JobPlan.hook))
    return hook if job["head"] is None else f"{hook}.h{job['head']}"


def _is_tried(name: str, value: Any) -> bool:
    """Whether a value is a list of values to try; the value of matryoshka is a list itself."""
    if name == "sae.matryoshka":
        return isinstance(value, list) and bool(value) and all(isinstance(inner, list) for inner in value)
    return isinstance(value, list)
