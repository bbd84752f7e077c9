"""From a plan to a run: cut the text, ask the model for the widths, fill the cache if one is wanted, train."""

from collections.abc import Callable
from pathlib import Path

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.zoo.corpus import standard_library
from writesae.parallel import World
from writesae.stream.corpus import Passages, passages, text_folder
from writesae.stream.sources import Source, describe
from writesae.stream.store import ActivationStore
from writesae.training.jobs import Job, Line, TrainResult
from writesae.training.plan import RunPlan
from writesae.training.run import train_many

Progress = Callable[[str, int, int], None]


def launch(
    model: HookedRecurrentModel,
    plan: RunPlan,
    out: str | Path,
    *,
    cache: str | Path | None = None,
    resume: bool = False,
    shard: bool = False,
    world: World | None = None,
    progress: Progress | None = None,
    on_line: Callable[[str, Line], None] | None = None,
) -> dict[str, TrainResult]:
    """Run a plan on a model that is loaded already; see `train_many` for what it raises.

    `cache` is a folder for an `ActivationStore`: it is read where it holds what the plan needs, and written where it is not
    there or not finished.
    """
    world = world or World.current()
    jobs = jobs_of(model, plan)  # a hook that is not there is said before a text is read
    text = _cut(model, plan, "train", plan.text.passages)
    heldout = _cut(model, plan, "heldout", plan.text.heldout_passages) if plan.text.heldout_passages else None
    store = None
    if cache is not None:
        if world.is_main:
            write_cache(model, plan, cache, progress=progress)
        world.barrier()
        store = ActivationStore.open(cache)
    return train_many(
        model,
        jobs,
        tokens=text,
        heldout=heldout,
        config=plan.training,
        out=out,
        resume=resume,
        store=store,
        shard=shard,
        world=world,
        progress=progress,
        on_line=on_line,
    )


def jobs_of(model: HookedRecurrentModel, plan: RunPlan) -> list[Job]:
    """The plan's jobs at the model's widths. Raises `ValueError` for sources that the model does not have."""

    def widths(source: Source) -> tuple[int, int]:
        about = describe(model, source)
        return about.d_k, about.d_v

    return plan.jobs_at(widths)


def write_cache(
    model: HookedRecurrentModel,
    plan: RunPlan,
    folder: str | Path,
    *,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> ActivationStore:
    """Keep on disk what the plan's jobs read of the training text; see `ActivationStore.write` for what it raises."""
    sources = list(dict.fromkeys(job.source for job in jobs_of(model, plan)))
    text = _cut(model, plan, "train", plan.text.passages)
    return ActivationStore.write(
        folder,
        model,
        text.tokens,
        sources,
        dtype=dtype,
        passages_per_forward=plan.training.passages_per_forward,
        progress=(lambda done, total: progress("cache", done, total)) if progress else None,
    )


def _cut(model: HookedRecurrentModel, plan: RunPlan, split: str, count: int) -> Passages:
    folder = plan.text.folder
    files = standard_library(split) if folder is None else text_folder(folder, split, plan.text.pattern)
    return passages(files, model, plan.text.length, split=split, max_passages=count, seed=plan.text.seed)
