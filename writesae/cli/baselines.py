"""`writesae baselines`: what else could stand in a write's place, at the same firings and the same budget."""

from typing import TYPE_CHECKING, Annotated

import typer

from writesae.cli.dry_run import Part, replacement_part, training_part
from writesae.cli.experiments import Horizon, PerAtom, Study, Work, study_verb
from writesae.cli.training_text import training_text

if TYPE_CHECKING:
    from writesae.evaluation.comparing.baselines import BaselinesConfig
    from writesae.evaluation.result import Result


@study_verb(text_seed=0)
def baselines(
    firings: Annotated[int, typer.Option(help="Most firings to test.")] = 400,
    per_atom: PerAtom = 5,
    horizon: Horizon = 16,
    train_passages: Annotated[
        int | None, typer.Option(help="Passages of training files; by default as many as the dictionary saw.")
    ] = None,
    *,
    seed: int,
) -> Work:
    """FlatSAE + SVD, rank-2 atoms, principal components, one matrix for all, a table by token: against rank-1 atoms.

    Flat and rank-2 dictionaries are trained here, as the dictionary itself was trained.

    Example: writesae baselines --sae runs/l2h1/sae --firings 400 --out results/baselines.json
    """
    from writesae.evaluation.comparing.baselines import BaselinesConfig, budget_of, flat_config
    from writesae.evaluation.comparing.baselines import baselines as run_baselines
    from writesae.training.jobs import Job, Source

    if train_passages is not None and train_passages < 1:
        raise ValueError(f"--train-passages must be at least 1, got {train_passages}")
    config = BaselinesConfig(per_atom=per_atom, total=firings, horizon=horizon, seed=seed)

    def run(study: Study, config: "BaselinesConfig") -> "Result":
        budget_of(study.sae)  # a dictionary without a budget is said before a text is read
        size = {"passages": train_passages, "length": study.tokens.shape[1], "text": study.text}
        learned = training_text(study.model, study.sae.provenance, **size)
        return study.run(run_baselines, config, "replace", train_tokens=learned)

    def parts(study: Study) -> list[Part]:
        job = Job("flat", Source(f"blocks.{study.layer}.mixer.hook_write", study.head), flat_config(study.sae.config))
        cell = (study.layer, study.head)
        return [
            training_part(study.model, [job], study.tokens, budget_of(study.sae), times=2),
            replacement_part(study.model, study.sae, study.tokens, cell, firings=firings),
        ]

    return Work(config, run, firings, "firings, after training two dictionaries", parts=parts)
