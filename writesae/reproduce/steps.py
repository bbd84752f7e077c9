"""The experiments of a reproduction by name, in the order of the paper: each takes the bench and gives results by variant."""

from collections.abc import Callable

from writesae.evaluation.partition import PartitionConfig, partition
from writesae.evaluation.population import PopulationConfig, population
from writesae.evaluation.replacement import ReplacementConfig, replacement
from writesae.evaluation.result import Result
from writesae.reproduce.bench import Bench

Results = dict[str, Result]


def _replacement(bench: Bench) -> Results:
    """The test of the paper's headline, for each kind of dictionary on the same passages."""
    config = ReplacementConfig(total=bench.config.firings, per_atom=bench.config.per_atom, seed=bench.config.seed)
    return {
        source: replacement(
            bench.model,
            bench.dictionary(source),
            bench.tokens,
            **bench.where,
            config=config,
            on_progress=bench.progress(f"replacement, {source}"),
        )
        for source in ("write", "state")
    }


def _population(bench: Bench) -> Results:
    """Every atom counts once; then register against bundle atoms, on the same firings."""
    size = bench.config
    config = PopulationConfig(n_atoms=max(10, size.firings // size.per_atom), per_atom=size.per_atom, seed=size.seed)
    found = population(
        bench.model,
        bench.dictionary(),
        bench.tokens,
        **bench.where,
        config=config,
        on_progress=bench.progress("population"),
    )
    return {"write": found}


def _partition(bench: Bench) -> Results:
    """Register and bundle atoms, with the dictionaries of other seeds to match."""
    config, results = PartitionConfig(seed=bench.config.seed), {}
    for source in ("write", "state"):
        first, *others = bench.dictionaries(source, [bench.cell], range(bench.config.seeds)).values()
        results[source] = partition(
            bench.model,
            first,
            bench.tokens,
            **bench.where,
            config=config,
            others=others,
            on_progress=bench.progress(f"partition, {source}"),
        )
    return results


STEPS: dict[str, Callable[[Bench], Results]] = {
    "replacement": _replacement,
    "population": _population,
    "partition": _partition,
}
"""By name, what a step does."""
