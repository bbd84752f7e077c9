"""`writesae erase`: take away what an atom wrote, write it where the model did not, and follow its preferred token."""

from dataclasses import replace
from typing import Annotated

import typer

from writesae.cli.experiments import Horizon, PerAtom, Work, study_verb

Atoms = Annotated[
    list[int] | None, typer.Option("--atom", help="Study this atom, by number; may be given several times.")
]
Count = Annotated[int, typer.Option(help="Without --atom: as many of the atoms that fire most often.")]
Form = Annotated[str, typer.Option(help="What deletion takes: 'additive' k v^T, or 'net' with the erase.")]


@study_verb()
def erase(
    atom: Atoms = None,
    count: Count = 8,
    per_atom: PerAtom = 100,
    writes: Annotated[int, typer.Option(help="Most silent positions at which an atom is written.")] = 40,
    form: Form = "additive",
    horizon: Horizon = 16,
    *,
    seed: int,
) -> Work:
    """Erase atoms where they fire and write them where they are silent, on held-out text.

    The token that an atom's deletion costs most is chosen on one half of the passages and tested on the other; the number on
    the half that chose it stands beside it as same_half. Changes of its log-probability are in nats.

    Example: writesae erase --sae runs/l2h1/sae --count 4 --out erase.json
    """
    from writesae.evaluation.acting.erasure import ErasureConfig, erasure

    sizes: dict = {"count": count, "per_atom": per_atom, "writes": writes, "horizon": horizon}
    config = ErasureConfig(atoms=tuple(atom) if atom else None, form=form, seed=seed, **sizes)
    units = (len(atom) if atom else count) * per_atom
    small = replace(config, atoms=config.atoms and config.atoms[:1], count=1, writes=1)
    return Work(
        config,
        lambda study, config: study.run(erasure, config, "erase"),
        units,
        "firings",
        at=lambda number: replace(small, per_atom=number),
    )
