"""The experiments of a reproduction by name, in the order of the paper: each takes the bench and gives results by variant."""

from collections.abc import Callable

import torch

from writesae.evaluation.baselines import BaselinesConfig, baselines
from writesae.evaluation.class_differences import ClassDifferencesConfig, class_differences
from writesae.evaluation.encoder_swap import EncoderSwapConfig, encoder_swap
from writesae.evaluation.erasure import ErasureConfig, erasure
from writesae.evaluation.logit_shift import LogitShiftConfig, logit_shift
from writesae.evaluation.partition import PartitionConfig, partition
from writesae.evaluation.passage_test import PassageTestConfig, passage_test
from writesae.evaluation.population import PopulationConfig, population
from writesae.evaluation.readers import ReadersConfig, readers
from writesae.evaluation.replacement import ReplacementConfig, replacement
from writesae.evaluation.result import Result
from writesae.reproduce.bench import Bench

Results = dict[str, Result]


def _replacement(bench: Bench) -> Results:
    """The test of the paper's headline, for each kind of dictionary on the same passages."""
    size = bench.config
    config = ReplacementConfig(total=size.firings, per_atom=size.per_atom, seed=size.seed)
    return {
        source: bench.test(replacement, f"replacement, {source}", bench.dictionary(source), config)
        for source in ("write", "state")
    }


def _population(bench: Bench) -> Results:
    """Every atom counts once; then register against bundle atoms, on the same firings."""
    size = bench.config
    config = PopulationConfig(n_atoms=max(10, size.firings // size.per_atom), per_atom=size.per_atom, seed=size.seed)
    return {"write": bench.test(population, "population", bench.dictionary(), config)}


def _passage_test(bench: Bench) -> Results:
    return {
        "write": bench.test(passage_test, "passages", bench.dictionary(), PassageTestConfig(seed=bench.config.seed))
    }


def _logits(bench: Bench) -> Results:
    """The dictionary's own cell, and as many others again, with random atoms there."""
    cells = [(int(row.layer), int(row.head)) for row in bench.cells.itertuples()]
    others = [cell for cell in cells if cell != bench.cell]
    generator = torch.Generator().manual_seed(bench.config.seed)
    some = [others[i] for i in torch.randperm(len(others), generator=generator)[:3].tolist()]
    config = LogitShiftConfig(total=bench.config.contexts, cells=(bench.cell, *some), seed=bench.config.seed)
    return {"write": bench.test(logit_shift, "logit shifts", bench.dictionary(), config)}


def _erase(bench: Bench) -> Results:
    size = bench.config
    config = ErasureConfig(count=4 if size.quick else 8, per_atom=30 if size.quick else 100, seed=size.seed)
    return {"write": bench.test(erasure, "erasure", bench.dictionary(), config)}


def _partition(bench: Bench) -> Results:
    """Register and bundle atoms, with the dictionaries of other seeds to match."""
    config, results = PartitionConfig(seed=bench.config.seed), {}
    for source in ("write", "state"):
        first, *others = bench.dictionaries(source, [bench.cell], range(bench.config.seeds)).values()
        results[source] = bench.test(partition, f"partition, {source}", first, config, others=others)
    return results


def _class_differences(bench: Bench) -> Results:
    """Register against bundle atoms; split by the threshold, for a mixture may put all atoms on one side."""
    tested, parts = _population(bench)["write"], _partition(bench)["write"]
    return {"write": class_differences(tested.replacement, parts, config=ClassDifferencesConfig(cut="threshold"))}  # type: ignore[attr-defined, arg-type]


def _readers(bench: Bench) -> Results:
    size = bench.config
    config = ReadersConfig(count=4 if size.quick else 8, per_atom=10 if size.quick else 40, seed=size.seed)
    return {"write": bench.test(readers, "readers", bench.dictionary(), config)}


def _baselines(bench: Bench) -> Results:
    config = BaselinesConfig(total=bench.config.firings // 6, seed=bench.config.seed)
    sae = bench.dictionary()
    return {"write": bench.test(baselines, "baselines", sae, config, train_tokens=bench.train_text)}


def _encoder_swap(bench: Bench) -> Results:
    size = bench.config
    config = EncoderSwapConfig(
        seeds=tuple(range(min(3, size.seeds))),
        n_atoms=size.n_atoms,
        k=size.k,
        steps=size.train_steps // 4,
        total=size.firings // 16,
        seed=size.seed,
    )
    found = encoder_swap(
        bench.model,
        bench.tokens,
        train_tokens=bench.train_text,
        cells=[bench.cell],
        config=config,
        folder=bench.folder / "encoder_swap",
        on_progress=bench.progress("encoder swap"),
    )
    return {"write": found}


STEPS: dict[str, Callable[[Bench], Results]] = {
    "replacement": _replacement,
    "population": _population,
    "passage_test": _passage_test,
    "logits": _logits,
    "erase": _erase,
    "partition": _partition,
    "class_differences": _class_differences,
    "readers": _readers,
    "baselines": _baselines,
    "encoder_swap": _encoder_swap,
}
"""By name, what a step does."""
