"""`writesae readers`: which later heads read the writes of an atom."""

from dataclasses import replace

from writesae.cli.erase import Atoms, Count, Form
from writesae.cli.experiments import Horizon, PerAtom, Work, study_verb


@study_verb()
def readers(
    atom: Atoms = None,
    count: Count = 8,
    per_atom: PerAtom = 40,
    form: Form = "additive",
    horizon: Horizon = 16,
    *,
    seed: int,
) -> Work:
    """Find the later heads whose output changes most when an atom's writes are deleted, on held-out text.

    Every firing is paired with a write of like norm at a position of the same passage where the atom is silent; the ratio
    is that of the changes, and an interval redraws whole passages. Only layers above the dictionary's can read its writes.

    Example: writesae readers --sae runs/l2h1/sae --count 4 --out readers.json
    """
    from writesae.evaluation.acting.readers import ReadersConfig
    from writesae.evaluation.acting.readers import readers as find_readers

    atoms = tuple(atom) if atom else None
    config = ReadersConfig(atoms=atoms, count=count, per_atom=per_atom, horizon=horizon, form=form, seed=seed)
    return Work(
        config,
        lambda study, config: study.run(find_readers, config, "readers"),
        (len(atom) if atom else count) * per_atom,
        "firings",
        at=lambda number: replace(config, atoms=atoms and atoms[:1], count=1, per_atom=number),
    )
