"""From a plan to a run: cut the text, ask the model for the widths, train."""

from collections.abc import Callable
from pathlib import Path

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.zoo.corpus import standard_library
from writesae.parallel import World
from writesae.stream.corpus import Passages, passages
from writesae.stream.sources import Source, describe
from writesae.training.jobs import Line, TrainResult
from writesae.training.plan import RunPlan
from writesae.training.run import train_many


def launch(
    model: HookedRecurrentModel,
    plan: RunPlan,
    out: str | Path,
    *,
    resume: bool = False,
    shard: bool = False,
    world: World | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    on_line: Callable[[str, Line], None] | None = None,
) -> dict[str, TrainResult]:
    """Run a plan on a model that is loaded already; see `train_many` for what it raises."""

    def widths(source: Source) -> tuple[int, int]:
        about = describe(model, source)
        return about.d_k, about.d_v

    text = _cut(model, plan, "train", plan.text.passages)
    heldout = _cut(model, plan, "heldout", plan.text.heldout_passages) if plan.text.heldout_passages else None
    return train_many(
        model,
        plan.jobs_at(widths),
        tokens=text,
        heldout=heldout,
        config=plan.training,
        out=out,
        resume=resume,
        shard=shard,
        world=world,
        progress=progress,
        on_line=on_line,
    )


def _cut(model: HookedRecurrentModel, plan: RunPlan, split: str, count: int) -> Passages:
    files = standard_library(split)
    return passages(files, model, plan.text.length, split=split, max_passages=count, seed=plan.text.seed)
